// The part of the CUDA driver API this library uses, opened at run time: no CUDA header, no link against CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bsa {

using CudaResult = int;
using CudaContext = void*;
using CudaModule = void*;
using CudaFunction = void*;
using CudaStream = void*;

constexpr CudaResult kCUDA_SUCCESS = 0;
constexpr int kFUNCTION_MAX_DYNAMIC_SHARED_BYTES = 8;
constexpr int kDEVICE_MULTIPROCESSORS = 16;
constexpr int kDEVICE_CAPABILITY_MAJOR = 75;
constexpr int kDEVICE_CAPABILITY_MINOR = 76;
constexpr int kLAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION = 6;
constexpr int kTENSOR_MAP_FLOAT16 = 6;
constexpr int kTENSOR_MAP_BFLOAT16 = 9;
constexpr int kTENSOR_MAP_SWIZZLE_128B = 3;
constexpr int kTENSOR_MAP_L2_PROMOTION_256B = 3;

struct alignas(64) TensorMap {
    std::uint64_t opaque[16];
};

// CUlaunchConfig with its attributes, as far as they are used here.
struct LaunchAttribute {
    int id;
    int padding;
    std::uint64_t value[8];
};
struct LaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned sharedBytes;
    CudaStream stream;
    LaunchAttribute* attributes;
    unsigned attributeCount;
};

// Function pointers of libcuda; each has the driver's own name.
struct Driver {
    CudaResult (*cuInit)(unsigned);
    CudaResult (*cuCtxGetCurrent)(CudaContext*);
    CudaResult (*cuCtxGetDevice)(int*);
    CudaResult (*cuDeviceGetAttribute)(int*, int, int);
    CudaResult (*cuGetErrorString)(CudaResult, const char**);
    CudaResult (*cuModuleLoadData)(CudaModule*, const void*);
    CudaResult (*cuModuleGetFunction)(CudaFunction*, CudaModule, const char*);
    CudaResult (*cuFuncSetAttribute)(CudaFunction, int, int);
    CudaResult (*cuMemsetD32Async)(std::uint64_t, unsigned, std::size_t, CudaStream);
    CudaResult (*cuTensorMapEncodeTiled)(TensorMap*, int type, unsigned rank, void* address, const std::uint64_t* sizes,
        const std::uint64_t* strides, const std::uint32_t* box, const std::uint32_t* elementStrides, int interleave,
        int swizzle, int promotion, int fill);
    CudaResult (*cuLaunchKernelEx)(LaunchConfig const*, CudaFunction, void** arguments, void** extra);

    // The driver, or null with the reason in `why`. Thread-safe; the library stays open for the life of the process.
    static Driver const* get(char const** why) noexcept;
};

} // namespace bsa
