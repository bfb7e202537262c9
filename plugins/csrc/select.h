// Which kernels run a call, or why none do.
#pragma once

#include "../include/block_skip_attention.h"
#include "kernel_table.h"

#include <string>

namespace bsa {

constexpr int kMAX_KERNELS = 3;
constexpr int kANY_CAPABILITY = 0; // no device is known: any compiled architecture will do

// The kernels of a call; which place means what, and which may be null, is the family's own affair.
//     kHOPPER: 0 the skipping kernel, 1 the dense one. Both where the threshold is only known on the device: each
//              computes the batch entries that are its own.
//     kDECODE: 0 scores (and the products with V of dense batch entries), 1 the products of those that skip, null where
//              none can, 2 the sum of the partial results.
//     kPREFILL: 0 the kernel.
struct Choice {
    Family family{Family::kHOPPER};
    Kernel const* kernels[kMAX_KERNELS]{};
};

// Fills `choice` with kernels for a device of this compute capability (times ten) and returns true, or returns false
// with the reason.
bool choose(bsa_params const& params, int capability, Choice& choice, std::string& reason);

// Whether the sizes and fields of `params` make sense at all.
bool validate(bsa_params const& params, std::string& reason);

} // namespace bsa
