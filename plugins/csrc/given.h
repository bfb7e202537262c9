// The kernels' argument `given`: which optional inputs and outputs a call has.
#pragma once

#include "../include/block_skip_attention.h"

#include <cstdint>

namespace bsa {

// kernels/hopper_common.py and kernels/plain_common.py have the same list.
enum Given : std::int32_t
{
    kKV_LENGTHS = 1,
    kQ_START = 2,
    kQ_LENGTHS = 4,
    kTHRESHOLD_SCALE = 8,
    kSINKS = 16,
    kCOUNTS = 32,
    kLSE = 64,
    kCOUNTER = 128,
    kADDITIVE_BIAS = 256,
    kBOOL_BIAS = 512,
    kRUN_WHERE_DENSE = 1024,
    kRUN_WHERE_SPARSE = 2048,
    kIS_CAUSAL = 4096,
    kCOUNTS_128_ROWS = 8192,
    kUNIT_GROUP = 16384,
};

// The bits that follow from the call alone.
inline std::int32_t givenBy(bsa_params const& p)
{
    std::int32_t given = 0;
    given |= p.kv_lengths != nullptr ? kKV_LENGTHS : 0;
    given |= p.q_start != nullptr ? kQ_START : 0;
    given |= p.q_lengths != nullptr ? kQ_LENGTHS : 0;
    given |= p.threshold_scale != nullptr ? kTHRESHOLD_SCALE : 0;
    given |= p.sinks != nullptr ? kSINKS : 0;
    given |= p.counts != nullptr ? kCOUNTS : 0;
    given |= p.lse != nullptr ? kLSE : 0;
    given |= p.is_causal != 0 ? kIS_CAUSAL : 0;
    given |= p.br == 128 ? kCOUNTS_128_ROWS : 0;
    given |= p.bias_kind == BSA_BIAS_ADDITIVE ? kADDITIVE_BIAS : 0;
    given |= p.bias_kind == BSA_BIAS_BOOL ? kBOOL_BIAS : 0;
    given |= p.unit == BSA_UNIT_GROUP ? kUNIT_GROUP : 0;
    return given;
}

constexpr double kLOG2_E = 1.4426950408889634;

// The numbers of a call as the kernels want them: scores and soft-cap in log2 units.
struct Scaling {
    float scaleLog2;
    float softcapLog2;
    float softcapRate; // softcap * tanh(scale * s / softcap) = softcap * (1 - 2 / (exp2(rate * s) + 1))

    explicit Scaling(bsa_params const& p)
        : scaleLog2(static_cast<float>(p.scale * kLOG2_E))
        , softcapLog2(static_cast<float>(p.softcap * kLOG2_E))
        , softcapRate(p.softcap > 0.0F ? static_cast<float>(2.0 * kLOG2_E * p.scale / p.softcap) : 0.0F)
    {
    }
};

} // namespace bsa
