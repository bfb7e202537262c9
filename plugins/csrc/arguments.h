// The argument list of a kernel launch.
#pragma once

#include "driver.h"

#include <cstdint>

namespace bsa {

// Pointers to the arguments in the kernel's order (build_kernels.py lists it), then two pointers of Triton's own that
// stay null. What is added must outlive the launch call.
class Arguments {
public:
    template <typename T>
    void add(T& value)
    {
        mPointers[mCount++] = &value;
    }

    // A tensor map is followed by sizes and strides the kernels do not read.
    void addMap(TensorMap& map)
    {
        add(map);
        for (int i = 0; i < 4; ++i)
        {
            add(mZero32);
        }
        for (int i = 0; i < 4; ++i)
        {
            add(mZero64);
        }
    }

    void addScratch()
    {
        add(mZero64);
        add(mZero64);
    }

    void** data()
    {
        return mPointers;
    }

private:
    void* mPointers[80]{};
    int mCount{0};
    std::int32_t mZero32{0};
    std::int64_t mZero64{0};
};

} // namespace bsa
