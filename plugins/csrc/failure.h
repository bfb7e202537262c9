// The words of the last failure, per thread.
#pragma once

#include "../include/block_skip_attention.h"
#include "driver.h"

#include <string>

namespace bsa {

// Keeps the words for bsa_last_error and hands the status on.
bsa_status fail(bsa_status status, std::string words);

bsa_status failCuda(Driver const& driver, char const* what, CudaResult code);

std::string const& lastFailure() noexcept;

} // namespace bsa
