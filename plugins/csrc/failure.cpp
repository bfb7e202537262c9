#include "failure.h"

#include <utility>

namespace bsa {
namespace {

thread_local std::string gLastFailure;

} // namespace

bsa_status fail(bsa_status status, std::string words)
{
    gLastFailure = std::move(words);
    return status;
}

bsa_status failCuda(Driver const& driver, char const* what, CudaResult code)
{
    char const* words = nullptr;
    driver.cuGetErrorString(code, &words);
    return fail(BSA_ERROR_CUDA, std::string(what) + ": " + (words != nullptr ? words : "unknown error"));
}

std::string const& lastFailure() noexcept
{
    return gLastFailure;
}

} // namespace bsa
