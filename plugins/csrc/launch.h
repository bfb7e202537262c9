// One kernel launch.
#pragma once

#include "../include/block_skip_attention.h"
#include "device.h"
#include "kernel_table.h"

#include <cstdint>

namespace bsa {

// Which batch entries a launch computes: all, or those whose threshold is or is not zero on the device.
enum class Share
{
    kALL,
    kDENSE,
    kSPARSE,
};

// Enqueues `kernel` on `stream`; `counter` is four bytes of device memory that no other launch in flight uses.
bsa_status launchKernel(Driver const& driver, Device& device, Kernel const& kernel, bsa_params const& params,
    Share share, std::uint32_t* counter, void* stream);

} // namespace bsa
