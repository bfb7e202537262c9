// One launch of a portable prefill kernel: argument list and grid.

#include "launch_prefill.h"

#include "arguments.h"
#include "driver.h"
#include "failure.h"
#include "given.h"
#include "launch.h"

#include <algorithm>
#include <string>

namespace bsa {
namespace {

constexpr std::int64_t kL2_BYTES = 4'000'000; // K and V of the heads worked on together; the smallest L2 of 8.x and 12.x
constexpr std::int64_t kMAX_GRID = 0x7fffffff;

} // namespace

bsa_status launchPrefill(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream)
{
    Kernel const& kernel = *choice.kernels[0];
    CudaFunction function = nullptr;
    std::string why;
    if (!device.function(driver, kernel, function, why))
    {
        return fail(BSA_ERROR_CUDA, why);
    }

    bsa_params p = params;
    std::int32_t given = givenBy(p);
    std::int32_t group = p.heads_q / p.heads_k;
    std::int32_t rowBlocks = (p.seq_q - 1) / kernel.rows + 1;
    std::int32_t heads = p.batch * p.heads_q;
    std::int64_t const items = static_cast<std::int64_t>(rowBlocks) * heads;
    if (items > kMAX_GRID)
    {
        return fail(BSA_ERROR_UNSUPPORTED, "more than 2^31 blocks of query rows");
    }
    std::int64_t const bytesPerHead = std::max<std::int64_t>(4LL * p.seq_k * kernel.head, 1);
    // heads that share K and V count once
    std::int32_t section
        = static_cast<std::int32_t>(std::clamp<std::int64_t>(kL2_BYTES / bytesPerHead * group, group, heads));
    Scaling scaling{p};

    if (bsa_status const status = clearCounts(driver, params, stream); status != BSA_OK)
    {
        return status;
    }
    Arguments arguments;
    arguments.add(p.q);
    arguments.add(p.k);
    arguments.add(p.v);
    arguments.add(p.o);
    arguments.add(p.kv_lengths);
    arguments.add(p.q_start);
    arguments.add(p.q_lengths);
    arguments.add(p.threshold_scale);
    arguments.add(p.sinks);
    arguments.add(p.counts);
    arguments.add(p.lse);
    arguments.add(p.bias);
    arguments.add(p.bias);
    for (auto* strides : {p.q_stride, p.k_stride, p.v_stride, p.o_stride})
    {
        for (int i = 0; i < 3; ++i)
        {
            arguments.add(strides[i]);
        }
    }
    for (std::int64_t& stride : p.bias_stride)
    {
        arguments.add(stride);
    }
    arguments.add(given);
    arguments.add(p.heads_q);
    arguments.add(group);
    arguments.add(p.seq_q);
    arguments.add(p.seq_k);
    arguments.add(p.head_dim);
    arguments.add(p.head_dim_v);
    arguments.add(rowBlocks);
    arguments.add(heads);
    arguments.add(section);
    arguments.add(scaling.scaleLog2);
    arguments.add(p.threshold);
    arguments.add(p.threshold_factor);
    arguments.add(p.window);
    arguments.add(scaling.softcapLog2);
    arguments.add(scaling.softcapRate);
    arguments.addScratch();

    CudaResult const code = driver.cuLaunchKernel(function, static_cast<unsigned>(items), 1, 1,
        static_cast<unsigned>(kernel.threads), 1, 1, static_cast<unsigned>(kernel.sharedBytes), stream,
        arguments.data(), nullptr);
    return code == kCUDA_SUCCESS ? BSA_OK : failCuda(driver, kernel.name, code);
}

} // namespace bsa
