// Launching the portable prefill kernels.
#pragma once

#include "../include/block_skip_attention.h"
#include "device.h"
#include "select.h"

namespace bsa {

bsa_status launchPrefill(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream);

} // namespace bsa
