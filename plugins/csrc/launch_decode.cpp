// A decode call: how its work is cut up, its workspace, and two or three launches with one argument list.

#include "launch_decode.h"

#include "arguments.h"
#include "enqueue.h"

#include <algorithm>

namespace bsa {
namespace {

constexpr std::int64_t kCHUNKS_PER_PROGRAM = 4; // the best or within 2 % of it in every shape of README.md
constexpr std::int32_t kOUTPUT_COLUMNS = 32;    // of a program of the last kernel

std::int64_t divideUp(std::int64_t a, std::int64_t b)
{
    return (a + b - 1) / b;
}

// Programs that share the chunks of an item: a few chunks each, more programs where those would not fill the device.
std::int32_t chooseSplits(bsa_params const& p, DecodeItems const& items, int multiprocessors)
{
    std::int64_t const chunks = std::max(items.chunks, 1);
    std::int64_t const filling = divideUp(multiprocessors, std::max<std::int64_t>(items.count, 1));
    std::int64_t const wanted
        = p.kv_splits > 0 ? p.kv_splits : std::max(divideUp(chunks, kCHUNKS_PER_PROGRAM), filling);
    std::int64_t const splits = std::min(wanted, chunks);
    return static_cast<std::int32_t>(divideUp(chunks, divideUp(chunks, splits)));
}

} // namespace

DecodeItems::DecodeItems(bsa_params const& p)
{
    std::int32_t const group = p.heads_q / p.heads_k;
    std::int32_t const heads = std::min(group, kDECODE_LANES / p.seq_q);
    rows = heads * p.seq_q;
    rowBlocks = static_cast<std::int32_t>(divideUp(group, heads));
    chunks = static_cast<std::int32_t>(divideUp(p.seq_k, kDECODE_CHUNK));
    count = static_cast<std::int64_t>(p.batch) * p.heads_k * rowBlocks;
}

DecodeWorkspace decodeWorkspace(Choice const& choice, bsa_params const& p)
{
    if (p.seq_q == 0)
    {
        return {};
    }
    DecodeItems const items{p};
    Kernel const& kernel = *choice.kernels[0];
    auto const chunks = static_cast<std::size_t>(items.count) * static_cast<std::size_t>(items.chunks);
    std::size_t const blocks = chunks * static_cast<std::size_t>(kDECODE_CHUNK / kernel.columns);
    std::size_t const lanes = kDECODE_LANES * sizeof(float);
    auto const rows = static_cast<std::size_t>(items.rows);
    bool const skips = choice.kernels[1] != nullptr;

    DecodeWorkspace place{};
    auto const reserve = [&place](std::size_t bytes) {
        std::size_t const start = place.bytes;
        place.bytes += (bytes + 255) / 256 * 256;
        return start;
    };
    place.partial = reserve(chunks * rows * static_cast<std::size_t>(kernel.head) * sizeof(float));
    place.chunkMax = reserve(chunks * lanes);
    place.chunkSum = reserve(chunks * lanes);
    place.blockMax = reserve(blocks * lanes);
    place.blockSum = reserve(skips ? blocks * lanes : 0);
    place.probabilities = reserve(skips ? chunks * rows * kDECODE_CHUNK * sizeof(std::uint16_t) : 0);
    return place;
}

bsa_status launchDecode(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream)
{
    Arguments arguments{params};
    bsa_params& p = arguments.params;
    DecodeItems items{p};
    DecodeWorkspace const place = decodeWorkspace(choice, p);
    auto const at = [&p](std::size_t offset) { return static_cast<char*>(p.workspace) + offset; };
    void* sections[] = {at(place.partial), at(place.chunkMax), at(place.chunkSum), at(place.blockMax),
        at(place.blockSum), at(place.probabilities)};
    std::int32_t splits = chooseSplits(p, items, device.multiprocessors());

    arguments.add(p.q, p.k, p.v, p.o, p.bias, p.bias, // the bias as elements, and as bytes
        p.sinks, p.kv_lengths, p.q_start, p.q_lengths, p.threshold_scale, p.counts, p.lse);
    for (void*& section : sections)
    {
        arguments.add(section);
    }
    arguments.add(arguments.given, p.heads_q, p.heads_k, p.seq_q, p.seq_k, p.head_dim, p.head_dim_v, items.rows,
        items.rowBlocks, splits, items.chunks);
    arguments.addScaling();
    arguments.addStrides();
    arguments.addBiasStrides();
    arguments.addScratch();

    std::int64_t const programs = items.count * splits;
    std::int64_t const outputs
        = static_cast<std::int64_t>(p.batch) * p.heads_q * p.seq_q * (choice.kernels[0]->head / kOUTPUT_COLUMNS);
    for (Kernel const* kernel : choice.kernels)
    {
        if (kernel == nullptr)
        {
            continue;
        }
        bsa_status const status
            = enqueue(driver, device, *kernel, kernel->role == 'c' ? outputs : programs, arguments, stream);
        if (status != BSA_OK)
        {
            return status;
        }
    }
    return BSA_OK;
}

} // namespace bsa
