// What is loaded on one CUDA context.
#pragma once

#include "driver.h"
#include "kernel_table.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

namespace bsa {

class Device {
public:
    // The state of the calling thread's current context, or null with the reason. States live as long as the process.
    static Device* current(Driver const& driver, std::string& reason);

    // The kernel's function, loaded on first use; safe from several threads.
    bool function(Driver const& driver, Kernel const& kernel, CudaFunction& result, std::string& reason);

    int multiprocessors() const noexcept
    {
        return mMultiprocessors;
    }

    // Compute capability, times ten.
    int capability() const noexcept
    {
        return 10 * mMajor + mMinor;
    }

private:
    int mMajor{0};
    int mMinor{0};
    int mMultiprocessors{0};
    std::mutex mLoading;
    std::unique_ptr<std::atomic<CudaFunction>[]> mFunctions;
};

} // namespace bsa
