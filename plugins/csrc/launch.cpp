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

} // namespace bsa
