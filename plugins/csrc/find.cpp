#include "find.h"

#include <set>
#include <utility>

namespace bsa {
namespace {

bool fits(Kernel const& kernel, Wanted const& wanted)
{
    bool const prefill = wanted.family != Family::kDECODE;
    return kernel.family == wanted.family && kernel.dtype == wanted.dtype && kernel.head == wanted.head
        && kernel.role == wanted.role && (!prefill || wanted.role == 'g' || kernel.causal == wanted.causal)
        && (!prefill || wanted.role == 'd' || kernel.joint == wanted.joint) && kernel.rows <= wanted.maxRows;
}

} // namespace

std::string capabilityName(int capability)
{
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

std::string architectureList()
{
    std::set<std::pair<int, std::string>> names; // in the order of age
    for (std::size_t i = 0; i < kKERNEL_COUNT; ++i)
    {
        names.emplace(kKERNELS[i].architecture, kKERNELS[i].target);
    }
    std::string list;
    for (auto const& [age, name] : names)
    {
        list += (list.empty() ? "\"" : ", \"") + name + "\"";
    }
    return "[" + list + "]";
}

std::vector<int> capabilitiesCompiled()
{
    std::set<int> capabilities;
    for (std::size_t i = 0; i < kKERNEL_COUNT; ++i)
    {
        capabilities.insert(kKERNELS[i].architecture);
    }
    return {capabilities.begin(), capabilities.end()};
}

Kernel const* find(Wanted const& wanted)
{
    Kernel const* found = nullptr;
    for (std::size_t i = 0; i < kKERNEL_COUNT; ++i)
    {
        Kernel const& kernel = kKERNELS[i];
        if (fits(kernel, wanted) && (wanted.capability == 0 || kernel.runsOn(wanted.capability))
            && (found == nullptr || kernel.rows > found->rows))
        {
            found = &kernel;
        }
    }
    return found;
}

std::string whyMissing(Wanted const& wanted)
{
    std::set<std::string> others;
    for (std::size_t i = 0; i < kKERNEL_COUNT; ++i)
    {
        if (fits(kKERNELS[i], wanted))
        {
            others.insert(kKERNELS[i].target);
        }
    }
    std::string const what = "the " + std::string(wanted.family == Family::kDECODE ? "decode" : "prefill")
        + " kernel for head size " + std::to_string(wanted.head);
    if (others.empty())
    {
        return what + " was left out when this library was built";
    }
    std::string list;
    for (std::string const& name : others)
    {
        list += (list.empty() ? "" : ", ") + name;
    }
    return "the current device has compute capability " + capabilityName(wanted.capability) + "; " + what
        + " was built for " + list;
}

} // namespace bsa
