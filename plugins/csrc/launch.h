// From a choice of kernels to launches.
#pragma once

#include "../include/block_skip_attention.h"
#include "device.h"
#include "select.h"

#include <cstddef>

namespace bsa {

// Bytes of workspace that the chosen kernels need; depends on sizes and options alone.
std::size_t workspaceSize(Choice const& choice, bsa_params const& params);

// Enqueues the kernels of the call on `stream`.
bsa_status launchChoice(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream);

} // namespace bsa
