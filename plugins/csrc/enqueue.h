// What is put on a stream.
#pragma once

#include "../include/block_skip_attention.h"
#include "arguments.h"
#include "device.h"

#include <cstddef>
#include <cstdint>

namespace bsa {

// Enqueues `programs` CTAs of the kernel.
bsa_status enqueue(Driver const& driver, Device& device, Kernel const& kernel, std::int64_t programs,
    Arguments& arguments, void* stream);

// Enqueues `count` zeros of 32 bits.
bsa_status enqueueZeros(Driver const& driver, void* address, std::size_t count, void* stream);

// Enqueues zeros into the tile counts, where the call has them.
bsa_status clearCounts(Driver const& driver, bsa_params const& params, void* stream);

} // namespace bsa
