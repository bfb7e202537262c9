#include "launch.h"

#include "failure.h"
#include "launch_decode.h"
#include "launch_hopper.h"
#include "launch_prefill.h"

namespace bsa {

std::size_t workspaceSize(Choice const& choice, bsa_params const& params)
{
    switch (choice.family)
    {
    case Family::kHOPPER: return kHOPPER_WORKSPACE_BYTES;
    case Family::kDECODE: return decodeWorkspace(choice, params).bytes;
    case Family::kPREFILL: return 0;
    }
    return 0;
}

bsa_status launchChoice(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream)
{
    switch (choice.family)
    {
    case Family::kHOPPER: return launchHopper(driver, device, choice, params, stream);
    case Family::kDECODE: return launchDecode(driver, device, choice, params, stream);
    case Family::kPREFILL: return launchPrefill(driver, device, choice, params, stream);
    }
    return fail(BSA_ERROR_INTERNAL, "a kernel of this family cannot be launched");
}

bsa_status clearCounts(Driver const& driver, bsa_params const& params, void* stream)
{
    if (params.counts == nullptr)
    {
        return BSA_OK;
    }
    CudaResult const code = driver.cuMemsetD32Async(
        reinterpret_cast<std::uint64_t>(params.counts), 0, 2 * static_cast<std::size_t>(params.heads_q), stream);
    return code == kCUDA_SUCCESS ? BSA_OK : failCuda(driver, "cuMemsetD32Async", code);
}

} // namespace bsa
