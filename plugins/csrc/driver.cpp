#include "driver.h"

#include <dlfcn.h>

#include <string>

#ifndef BSA_LIBCUDA
#define BSA_LIBCUDA "libcuda.so.1" // the tests put an emulation here
#endif

namespace bsa {
namespace {

struct Opened {
    Driver driver{};
    std::string failure;
};

template <typename Function>
bool resolve(void* library, char const* name, char const* fallback, Function& function)
{
    void* symbol = dlsym(library, name);
    if (symbol == nullptr && fallback != nullptr)
    {
        symbol = dlsym(library, fallback);
    }
    function = reinterpret_cast<Function>(symbol);
    return symbol != nullptr;
}

Opened open()
{
    Opened result;
    void* library = dlopen(BSA_LIBCUDA, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        char const* words = dlerror();
        result.failure = words != nullptr ? words : BSA_LIBCUDA " cannot be opened";
        return result;
    }
    Driver& d = result.driver;
    bool const complete = resolve(library, "cuInit", nullptr, d.cuInit)
        && resolve(library, "cuCtxGetCurrent", nullptr, d.cuCtxGetCurrent)
        && resolve(library, "cuCtxGetDevice", nullptr, d.cuCtxGetDevice)
        && resolve(library, "cuDeviceGetAttribute", nullptr, d.cuDeviceGetAttribute)
        && resolve(library, "cuGetErrorString", nullptr, d.cuGetErrorString)
        && resolve(library, "cuModuleLoadData", nullptr, d.cuModuleLoadData)
        && resolve(library, "cuModuleGetFunction", nullptr, d.cuModuleGetFunction)
        && resolve(library, "cuFuncSetAttribute", nullptr, d.cuFuncSetAttribute)
        && resolve(library, "cuMemsetD32Async", nullptr, d.cuMemsetD32Async)
        && resolve(library, "cuTensorMapEncodeTiled", nullptr, d.cuTensorMapEncodeTiled)
        && resolve(library, "cuLaunchKernelEx", nullptr, d.cuLaunchKernelEx);
    if (!complete)
    {
        result.failure = BSA_LIBCUDA " lacks a function of CUDA 12.0; update the driver";
    }
    else if (CudaResult const status = d.cuInit(0); status != kCUDA_SUCCESS)
    {
        result.failure = "cuInit failed with " + std::to_string(status);
    }
    return result;
}

} // namespace

Driver const* Driver::get(char const** why) noexcept
{
    static Opened const opened = open();
    if (!opened.failure.empty())
    {
        *why = opened.failure.c_str();
        return nullptr;
    }
    return &opened.driver;
}

} // namespace bsa
