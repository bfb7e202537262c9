#include "launch.h"

#include "launch_hopper.h"

namespace bsa {

std::size_t workspaceSize(Family family, bsa_params const& params)
{
    (void) params;
    switch (family)
    {
    case Family::kHOPPER: return kHOPPER_WORKSPACE_BYTES;
    case Family::kDECODE:
    case Family::kPREFILL: break;
    }
    return 0;
}

bsa_status launchChoice(
    Driver const& driver, Device& device, Choice const& choice, bsa_params const& params, void* stream)
{
    switch (choice.family)
    {
    case Family::kHOPPER: return launchHopper(driver, device, choice, params, stream);
    case Family::kDECODE:
    case Family::kPREFILL: break;
    }
    return BSA_ERROR_INTERNAL;
}

} // namespace bsa
