// One launch of a portable prefill kernel: argument list and grid.

#include "launch_prefill.h"

#include "arguments.h"
#include "enqueue.h"

#include <algorithm>

namespace bsa {
namespace {

constexpr std::int64_t kL2_BYTES = 4'000'000; // K and V of the heads worked on together; the smallest L2 of 8.x and 12.x

} // namespace

bsa_status launchPrefill(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream)
{
    Kernel const& kernel = *choice.kernels[0];
    Arguments arguments{params};
    bsa_params& p = arguments.params;
    std::int32_t group = p.heads_q / p.heads_k;
    std::int32_t rowBlocks = (p.seq_q - 1) / kernel.rows + 1;
    std::int32_t heads = p.batch * p.heads_q;
    std::int64_t const bytesPerHead = std::max<std::int64_t>(4LL * p.seq_k * kernel.head, 1);
    // heads that share K and V count once
    std::int32_t section
        = static_cast<std::int32_t>(std::clamp<std::int64_t>(kL2_BYTES / bytesPerHead * group, group, heads));

    arguments.add(p.q, p.k, p.v, p.o, p.kv_lengths, p.q_start, p.q_lengths, p.threshold_scale, p.sinks, p.counts,
        p.lse, p.bias, p.bias); // the bias as elements, and as bytes
    arguments.addStrides();
    arguments.addBiasStrides();
    arguments.add(arguments.given, p.heads_q, group, p.seq_q, p.seq_k, p.head_dim, p.head_dim_v, rowBlocks, heads,
        section);
    arguments.addScaling();
    arguments.addScratch();

    if (bsa_status const status = clearCounts(driver, params, stream); status != BSA_OK)
    {
        return status;
    }
    return enqueue(driver, device, kernel, static_cast<std::int64_t>(rowBlocks) * heads, arguments, stream);
}

} // namespace bsa
