#include "enqueue.h"

#include "failure.h"

#include <string>

namespace bsa {

bsa_status enqueue(Driver const& driver, Device& device, Kernel const& kernel, std::int64_t programs,
    Arguments& arguments, void* stream)
{
    if (programs > 0x7fffffff)
    {
        return fail(BSA_ERROR_UNSUPPORTED, "more than 2^31 blocks of work");
    }
    CudaFunction function = nullptr;
    std::string why;
    if (!device.function(driver, kernel, function, why))
    {
        return fail(BSA_ERROR_CUDA, why);
    }
    LaunchAttribute early{kLAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION, 0, {1}};
    LaunchConfig const config{{static_cast<unsigned>(programs), 1, 1}, {static_cast<unsigned>(kernel.threads), 1, 1},
        static_cast<unsigned>(kernel.sharedBytes), stream, &early, kernel.early ? 1U : 0U};
    CudaResult const code = driver.cuLaunchKernelEx(&config, function, arguments.data(), nullptr);
    return code == kCUDA_SUCCESS ? BSA_OK : failCuda(driver, kernel.name, code);
}

bsa_status enqueueZeros(Driver const& driver, void* address, std::size_t count, void* stream)
{
    CudaResult const code = driver.cuMemsetD32Async(reinterpret_cast<std::uint64_t>(address), 0, count, stream);
    return code == kCUDA_SUCCESS ? BSA_OK : failCuda(driver, "cuMemsetD32Async", code);
}

bsa_status clearCounts(Driver const& driver, bsa_params const& params, void* stream)
{
    return params.counts == nullptr
        ? BSA_OK
        : enqueueZeros(driver, params.counts, 2 * static_cast<std::size_t>(params.heads_q), stream);
}

} // namespace bsa
