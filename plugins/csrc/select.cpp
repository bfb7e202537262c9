#include "select.h"

#include "find.h"
#include "launch_decode.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace bsa {
namespace {

constexpr int kMAX_HEAD = 256;
constexpr int kTILE_COLUMNS = 128;
constexpr int kHOPPER = 90;                          // compute capability, times ten
constexpr std::int64_t kMAX_BLOCKS = 0x7fffffff;     // of query rows: their numbers have 31 bits
constexpr int kSMALL_ROWS = 128;                     // query rows of a work item where larger ones would be wasted
constexpr std::int64_t kPREFILL_ROW_STRIDE = 1 << 24; // offsets within 128 rows of K or V have 32 bits there

// Whether the portable kernels are to be tried where Hopper's would run. Only a library that was built for it asks.
bool prefersPortable()
{
#if defined(BSA_PORTABLE_ON_HOPPER)
    char const* family = std::getenv("BSA_FAMILY");
    return family != nullptr && std::strcmp(family, "portable") == 0;
#else
    return false;
#endif
}

std::string number(std::int64_t value)
{
    return std::to_string(value);
}

bool alignedStrides(std::int64_t const* stride, int batch, int heads, int sequence)
{
    // The copy engine needs positive strides of whole 16 bytes; a dimension of at most one element is never stepped over.
    auto fits = [](std::int64_t step, int size) { return size <= 1 || (step > 0 && step % 8 == 0); };
    return fits(stride[0], batch) && fits(stride[1], heads) && fits(stride[2], sequence);
}

bool alignedAddress(void const* address)
{
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// The head size of the kernel that a call needs.
int paddedHead(bsa_params const& p)
{
    int const widest = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
    return widest <= 64 ? 64 : widest <= 128 ? 128 : kMAX_HEAD;
}

// What every family asks of the tensors.
bool readable(bsa_params const& p, std::string& reason)
{
    int const widest = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
    if (widest > kMAX_HEAD || p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0)
    {
        reason = "head sizes " + number(p.head_dim) + " and " + number(p.head_dim_v)
            + " must be multiples of 8 and at most " + number(kMAX_HEAD);
        return false;
    }
    if (!alignedStrides(p.q_stride, p.batch, p.heads_q, p.seq_q) || !alignedStrides(p.k_stride, p.batch, p.heads_k, p.seq_k)
        || !alignedStrides(p.v_stride, p.batch, p.heads_k, p.seq_k)
        || !alignedStrides(p.o_stride, p.batch, p.heads_q, p.seq_q))
    {
        reason = "strides of q, k, v and o must be positive multiples of 8 elements";
        return false;
    }
    if (!alignedAddress(p.q) || !alignedAddress(p.k) || !alignedAddress(p.v) || !alignedAddress(p.o))
    {
        reason = "q, k, v and o must be 16-byte aligned";
        return false;
    }
    return true;
}

// What the host knows of the threshold. A positive one may still become zero by the scale, and 1 or more by a short
// length; both are only known on the device.
struct Threshold {
    bool neverSkips;
    bool mayBeDense;

    explicit Threshold(bsa_params const& p)
    {
        bool const calibrated = p.threshold_factor > 0.0F;
        neverSkips = !calibrated && !(p.threshold > 0.0F && (p.threshold_scale != nullptr || p.threshold < 1.0F));
        mayBeDense = p.threshold_scale != nullptr || calibrated;
    }
};

bool take(Wanted const& wanted, Kernel const*& kernel, std::string& reason)
{
    kernel = find(wanted);
    if (kernel == nullptr)
    {
        reason = whyMissing(wanted);
    }
    return kernel != nullptr;
}

bool chooseDecode(bsa_params const& p, int capability, Choice& choice, std::string& reason)
{
    if (p.bc != kTILE_COLUMNS || (p.seq_q > 1 && p.br < p.seq_q))
    {
        reason = "tiles of " + number(p.br) + " x " + number(p.bc) + " are not compiled; supported are tiles of 128 keys"
            " and of at least as many rows as seq_q, here " + number(p.seq_q);
        return false;
    }
    choice = Choice{Family::kDECODE, {}};
    auto const want = [&](char role, Kernel const*& kernel) {
        return take({Family::kDECODE, capability, p.dtype, paddedHead(p), role}, kernel, reason);
    };
    return want('s', choice.kernels[0]) && (Threshold{p}.neverSkips || want('v', choice.kernels[1]))
        && want('c', choice.kernels[2]);
}

// What both prefill families ask of the decision.
bool decidable(bsa_params const& p, std::string& reason)
{
    if (p.bc != kTILE_COLUMNS || (p.seq_q != 1 && p.br != 64 && p.br != 128))
    {
        reason = "tiles of " + number(p.br) + " x " + number(p.bc)
            + " are not compiled; supported are 64 x 128 and 128 x 128 (1 x 128 where seq_q is 1)";
        return false;
    }
    if (p.unit != BSA_UNIT_HEAD && p.heads_q != p.heads_k)
    {
        reason = "unit \"group\" is not compiled for grouped heads and more than " + number(kDECODE_LANES)
            + " query rows; use unit \"head\"";
        return false;
    }
    std::int64_t const heads = static_cast<std::int64_t>(p.batch) * p.heads_q;
    if (heads > kMAX_BLOCKS || heads * ((p.seq_q - 1) / 64 + 1) > kMAX_BLOCKS)
    {
        reason = "batch * heads_q * seq_q are more than 2^31 blocks of 64 query rows";
        return false;
    }
    return true;
}

// A single row is its own row block, so 64 rows of which one exists decide exactly as 1 x 128.
bool decidesJointly(bsa_params const& p)
{
    return p.seq_q != 1 && p.br == 128;
}

bool isGeneral(bsa_params const& p)
{
    return p.bias_kind != BSA_BIAS_NONE || p.window > 0 || p.softcap > 0.0F;
}

bool choosePortable(bsa_params const& p, int capability, Choice& choice, std::string& reason)
{
    if (p.seq_k > 1 && (p.k_stride[2] >= kPREFILL_ROW_STRIDE || p.v_stride[2] >= kPREFILL_ROW_STRIDE))
    {
        reason = "rows of k and v must lie less than " + number(kPREFILL_ROW_STRIDE) + " elements apart";
        return false;
    }
    choice = Choice{Family::kPREFILL, {}};
    char const role = isGeneral(p) ? 'g' : 's';
    return take({Family::kPREFILL, capability, p.dtype, paddedHead(p), role, false, decidesJointly(p)},
        choice.kernels[0], reason);
}

// Rows that a multiprocessor computes if it takes work items of so many rows in turn with the others, empty rows and
// idle rounds included. Counted for the H100, so that a call runs the same kernel on every device.
std::int64_t rowsInTurn(bsa_params const& p, std::int64_t rows)
{
    constexpr std::int64_t kMULTIPROCESSORS = 132;
    std::int64_t const items = (p.seq_q + rows - 1) / rows * p.batch * p.heads_q;
    return (items + kMULTIPROCESSORS - 1) / kMULTIPROCESSORS * rows;
}

// A skipping kernel: of two, the one with the larger work items unless they waste more than what they are faster by, as
// measured: a quarter in full attention, an eighth in causal, a twentieth where 128 rows decide.
Kernel const* chooseRows(bsa_params const& p, Wanted const& wanted)
{
    Wanted few = wanted;
    few.maxRows = kSMALL_ROWS;
    Kernel const* const small = find(few);
    Kernel const* const large = find(wanted);
    int const parts = decidesJointly(p) ? 20 : p.is_causal != 0 ? 8 : 4;
    bool const wasteful
        = small != nullptr && rowsInTurn(p, large->rows) * parts > rowsInTurn(p, small->rows) * (parts + 1);
    return wasteful ? small : large;
}

bool chooseHopper(bsa_params const& p, int capability, Choice& choice, std::string& reason)
{
    Threshold const threshold{p};
    choice = Choice{Family::kHOPPER, {}};
    auto const wanted = [&](char role) {
        return Wanted{
            Family::kHOPPER, capability, p.dtype, paddedHead(p), role, p.is_causal != 0, decidesJointly(p)};
    };
    auto const want = [&](char role, Kernel const*& kernel) { return take(wanted(role), kernel, reason); };
    if (isGeneral(p))
    {
        return want('g', choice.kernels[0]);
    }
    if (!threshold.neverSkips)
    {
        choice.kernels[0] = chooseRows(p, wanted('s'));
    }
    return (threshold.neverSkips || choice.kernels[0] != nullptr || want('s', choice.kernels[0]))
        && (!(threshold.neverSkips || threshold.mayBeDense) || want('d', choice.kernels[1]));
}

bool choosePrefill(bsa_params const& p, int capability, Choice& choice, std::string& reason)
{
    if (!decidable(p, reason))
    {
        return false;
    }
    if (prefersPortable() && choosePortable(p, capability, choice, reason))
    {
        return true;
    }
    std::string portableReason;
    if (chooseHopper(p, capability, choice, reason) || choosePortable(p, capability, choice, portableReason))
    {
        return true;
    }
    reason = capability == kHOPPER ? reason : portableReason;
    return false;
}

} // namespace

bool validate(bsa_params const& p, std::string& reason)
{
    if (p.batch < 0 || p.heads_q <= 0 || p.heads_k <= 0 || p.seq_q < 0 || p.seq_k < 0 || p.head_dim <= 0
        || p.head_dim_v <= 0)
    {
        reason = "a size is negative or zero";
    }
    else if (p.heads_q % p.heads_k != 0)
    {
        reason = "heads_q " + number(p.heads_q) + " is no multiple of heads_k " + number(p.heads_k);
    }
    else if (p.dtype != BSA_FLOAT16 && p.dtype != BSA_BFLOAT16)
    {
        reason = "dtype " + number(p.dtype) + " is neither BSA_FLOAT16 nor BSA_BFLOAT16";
    }
    else if (p.bias_kind < BSA_BIAS_NONE || p.bias_kind > BSA_BIAS_BOOL)
    {
        reason = "bias_kind " + number(p.bias_kind) + " is unknown";
    }
    else if ((p.bias_kind != BSA_BIAS_NONE) != (p.bias != nullptr))
    {
        reason = "bias and bias_kind contradict each other";
    }
    else if (!(p.scale > 0.0F) || !std::isfinite(p.scale) || !(p.softcap >= 0.0F) || p.window < 0)
    {
        reason = "scale must be positive and finite, softcap and window not negative";
    }
    else
    {
        return true;
    }
    return false;
}

bool choose(bsa_params const& p, int capability, Choice& choice, std::string& reason)
{
    if (!readable(p, reason))
    {
        return false;
    }
    bool const fewRows = p.seq_q >= 1 && p.seq_q <= kDECODE_LANES;
    if (fewRows && chooseDecode(p, capability, choice, reason))
    {
        return true;
    }
    std::string prefillReason;
    if (choosePrefill(p, capability, choice, prefillReason))
    {
        return true;
    }
    reason = fewRows ? reason : prefillReason;
    return false;
}

} // namespace bsa
