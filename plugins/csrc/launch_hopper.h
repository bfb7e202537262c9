// Launching the Hopper prefill kernels.
#pragma once

#include "../include/block_skip_attention.h"
#include "device.h"
#include "select.h"

#include <cstddef>

namespace bsa {

constexpr std::size_t kHOPPER_WORKSPACE_BYTES = 256; // the work counter of each of at most two launches

bsa_status launchHopper(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream);

} // namespace bsa
