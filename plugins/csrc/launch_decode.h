// Launching the decode kernels.
#pragma once

#include "../include/block_skip_attention.h"
#include "device.h"
#include "select.h"

#include <cstddef>
#include <cstdint>

namespace bsa {

constexpr int kDECODE_LANES = 16;  // query rows of an item at most
constexpr int kDECODE_CHUNK = 512; // keys of a partial result

// How a call is cut into items of at most 16 rows that share a K/V head, see kernels/decode_common.py.
struct DecodeItems {
    std::int32_t rows;      // lanes in use
    std::int32_t rowBlocks; // items of one K/V head
    std::int32_t chunks;    // partial results of an item
    std::int64_t count;

    explicit DecodeItems(bsa_params const& params);
};

// Where the intermediate results of a call lie, in bytes from the start of the workspace.
struct DecodeWorkspace {
    std::size_t partial, chunkMax, chunkSum, blockMax, blockSum, probabilities;
    std::size_t bytes;
};

DecodeWorkspace decodeWorkspace(Choice const& choice, bsa_params const& params);

bsa_status launchDecode(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream);

} // namespace bsa
