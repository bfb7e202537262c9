// Which kernel runs a call, or why none does.
#pragma once

#include "../include/block_skip_attention.h"
#include "kernel_table.h"

#include <string>

namespace bsa {

// One call may need two launches: where the threshold is only known on the device, the dense kernel computes the batch
// entries whose threshold turns out to be zero and the skipping kernel the others.
struct Choice {
    Kernel const* sparse{nullptr};
    Kernel const* dense{nullptr};
};

// Fills `choice` and returns true, or returns false with the reason.
bool choose(bsa_params const& params, Choice& choice, std::string& reason);

// Whether the sizes and fields of `params` make sense at all.
bool validate(bsa_params const& params, std::string& reason);

} // namespace bsa
