// One Hopper kernel launch: tensor maps, argument list, grid.

#include "launch_hopper.h"

#include "arguments.h"
#include "driver.h"
#include "enqueue.h"
#include "failure.h"

#include <algorithm>
#include <utility>

namespace bsa {
namespace {

// Heads whose causal row blocks are worked on together, all of them longest block first. As measured, see README.md:
// where keys are few, as many as half of an H100's L2 holds K and V of; otherwise a fixed number, more where work items
// have more than 128 rows and so read less of L2.
std::int64_t causalHeads(Kernel const& kernel, int keys)
{
    constexpr std::int64_t kL2_BYTES = 24'000'000;
    std::int64_t const bytes = std::max<std::int64_t>(4LL * keys * kernel.head, 1); // of K and V of a head
    std::int64_t const fitting = kL2_BYTES / bytes;
    bool const small = bytes <= 800'000;
    if (kernel.role == 'd' && kernel.head == 64)
    {
        return std::max<std::int64_t>(fitting, 44);
    }
    if (kernel.role == 'd')
    {
        return keys > 1024 && !small ? std::min<std::int64_t>(fitting, 4) : fitting;
    }
    if (kernel.rows > 128)
    {
        return small ? fitting : 4;
    }
    return keys > 2048 ? 1 : fitting;
}

// First head of the last section, which takes over from those before it until there are enough work items, longest first,
// for an even end: three for each multiprocessor, or two where sections have as many anyway.
std::int32_t firstOfLastSection(
    std::int64_t section, std::int64_t heads, std::int64_t blocks, std::int64_t multiprocessors)
{
    std::int64_t const items = (section * blocks < 2 * multiprocessors ? 3 : 2) * multiprocessors;
    std::int64_t const least = (items + blocks - 1) / blocks;
    return static_cast<std::int32_t>(std::max<std::int64_t>(heads - least, 0) / section * section);
}

// First row of the first causal row block, at most 0. Blocks end where the sequence ends, to the rows of a decision: what
// they have too many rows is missing where little is seen, not in the block that sees everything.
std::int32_t causalFirstRow(Kernel const& kernel, int rows, int blocks)
{
    std::int64_t const decision = kernel.joint ? 128 : 64;
    return static_cast<std::int32_t>(
        (rows + decision - 1) / decision * decision - static_cast<std::int64_t>(blocks) * kernel.rows);
}

// Offset of the first row of a head's last row block, at most 0, where three warpgroups compute full attention: it begins
// within the block before if it would have rows for one warpgroup only. That takes two thirds of the time of three, and
// two blocks for two warpgroups less than one for three and one for one.
std::int32_t fullOverlap(Kernel const& kernel, int rows, int blocks)
{
    constexpr int kGROUP_ROWS = 64;
    bool const three = kernel.rows == 3 * kGROUP_ROWS && kernel.role == 's';
    int const last = rows - (blocks - 1) * kernel.rows;
    return three && blocks > 1 && last <= kGROUP_ROWS ? -kGROUP_ROWS : 0;
}

bool encode(Driver const& driver, TensorMap& map, void const* address, int dtype, std::int64_t const stride[3],
    int batch, int heads, int sequence, int columns, int boxRows, int boxColumns, CudaResult& code)
{
    std::uint64_t const sizes[4] = {static_cast<std::uint64_t>(columns), static_cast<std::uint64_t>(sequence),
        static_cast<std::uint64_t>(heads), static_cast<std::uint64_t>(batch)};
    // A dimension of one element may come with any stride, also one the encoder refuses.
    std::int64_t const packed = (columns + 7) / 8 * 16;
    auto bytes = [packed](std::int64_t elements, int size) {
        return static_cast<std::uint64_t>(size <= 1 ? packed : elements * 2);
    };
    std::uint64_t const strides[3] = {bytes(stride[2], sequence), bytes(stride[1], heads), bytes(stride[0], batch)};
    std::uint32_t const box[4] = {static_cast<std::uint32_t>(boxColumns), static_cast<std::uint32_t>(boxRows), 1, 1};
    std::uint32_t const ones[4] = {1, 1, 1, 1};
    int const type = dtype == BSA_FLOAT16 ? kTENSOR_MAP_FLOAT16 : kTENSOR_MAP_BFLOAT16;
    code = driver.cuTensorMapEncodeTiled(&map, type, 4, const_cast<void*>(address), sizes, strides, box, ones, 0,
        kTENSOR_MAP_SWIZZLE_128B, kTENSOR_MAP_L2_PROMOTION_256B, 0);
    return code == kCUDA_SUCCESS;
}

// Which batch entries a launch computes: all, or those whose threshold is or is not zero on the device.
enum class Share
{
    kALL,
    kDENSE,
    kSPARSE,
};

// Enqueues `kernel`; `counter` is four bytes of device memory that no other launch in flight uses.
bsa_status launchKernel(Driver const& driver, Device& device, Kernel const& kernel, bsa_params const& params,
    Share share, std::uint32_t* counter, void* stream)
{
    Arguments arguments{params};
    bsa_params& p = arguments.params;
    TensorMap maps[4];
    CudaResult code = kCUDA_SUCCESS;
    // No keys at all: the maps still need an address. What is read through them is masked.
    int const keys = std::max(p.seq_k, 1);
    void const* const k = p.seq_k > 0 ? p.k : p.o;
    void const* const v = p.seq_k > 0 ? p.v : p.o;
    bool const encoded = encode(driver, maps[0], p.q, p.dtype, p.q_stride, p.batch, p.heads_q, p.seq_q, p.head_dim,
                             kernel.boxRows[0], kernel.boxColumns[0], code)
        && encode(driver, maps[1], k, p.dtype, p.k_stride, p.batch, p.heads_k, keys, p.head_dim, kernel.boxRows[1],
            kernel.boxColumns[1], code)
        && encode(driver, maps[2], v, p.dtype, p.v_stride, p.batch, p.heads_k, keys, p.head_dim_v, kernel.boxRows[2],
            kernel.boxColumns[2], code)
        && encode(driver, maps[3], p.o, p.dtype, p.o_stride, p.batch, p.heads_q, p.seq_q, p.head_dim_v,
            kernel.boxRows[3], kernel.boxColumns[3], code);
    if (!encoded)
    {
        return failCuda(driver, "cuTensorMapEncodeTiled", code);
    }

    std::int32_t group = p.heads_q / p.heads_k;
    std::int32_t rowBlocks = (p.seq_q + kernel.rows - 1) / kernel.rows;
    std::int32_t heads = p.batch * p.heads_q;
    std::int32_t firstRow
        = kernel.causal ? causalFirstRow(kernel, p.seq_q, rowBlocks) : fullOverlap(kernel, p.seq_q, rowBlocks);
    std::int32_t section
        = static_cast<std::int32_t>(std::clamp<std::int64_t>(causalHeads(kernel, p.seq_k), 1, heads));
    std::int32_t lastSection = firstOfLastSection(section, heads, rowBlocks, device.multiprocessors());

    std::int32_t& given = arguments.given;
    given |= share == Share::kALL ? 0 : share == Share::kDENSE ? kRUN_WHERE_DENSE : kRUN_WHERE_SPARSE;
    std::int64_t const items = static_cast<std::int64_t>(rowBlocks) * heads;
    std::int64_t const grid = std::min<std::int64_t>(items, device.multiprocessors());
    if (items > grid && (kernel.role != 'd' || kernel.causal))
    {
        // uneven work: the CTAs take items from a counter; even work is dealt out in turn and needs none
        given |= kCOUNTER;
        if (bsa_status const status = enqueueZeros(driver, counter, 1, stream); status != BSA_OK)
        {
            return status;
        }
    }

    for (TensorMap& map : maps)
    {
        arguments.addMap(map);
    }
    arguments.add(p.kv_lengths, p.q_start, p.q_lengths, p.threshold_scale, p.sinks, p.counts, p.lse, counter, given,
        p.heads_q, group, p.seq_q, p.seq_k, rowBlocks, firstRow, heads, section, lastSection);
    arguments.addScaling();
    arguments.add(p.bias, p.bias); // as elements, and as bytes
    arguments.addBiasStrides();
    arguments.addScratch();
    return enqueue(driver, device, kernel, grid, arguments, stream);
}

} // namespace

bsa_status launchHopper(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream)
{
    auto* counters = static_cast<std::uint32_t*>(params.workspace);
    auto const [sparse, dense] = std::pair{choice.kernels[0], choice.kernels[1]};
    bool const both = sparse != nullptr && dense != nullptr;
    bsa_status status = clearCounts(driver, params, stream);
    if (status == BSA_OK && sparse != nullptr)
    {
        status = launchKernel(
            driver, device, *sparse, params, both ? Share::kSPARSE : Share::kALL, counters, stream);
    }
    if (status == BSA_OK && dense != nullptr)
    {
        status = launchKernel(
            driver, device, *dense, params, both ? Share::kDENSE : Share::kALL, counters + 32, stream);
    }
    return status;
}

} // namespace bsa
