/* The walk as one C function, for a process that has the memory to run a node on. */

#include "plugin_library.h"
#include "tensorrt_side.h"
#include "walk_build.h"
#include "walk_plan.h"
#include "walk_run.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <vector>

namespace
{

template <typename T>
T const& find(std::vector<T> const& all, char const* name)
{
    auto const found = std::find_if(all.begin(), all.end(), [name](T const& one) { return one.name == name; });
    if (found == all.end())
    {
        throw std::runtime_error(std::string{"the plan has no "} + name);
    }
    return *found;
}

} // namespace

/* Walks one profile of one node of the plan and enqueues it once on the caller's memory at the profile's best shape.
 * `workspace` has to hold `workspaceBytes`. Returns 0, or 1 with the reason in `reason` (always terminated). */
extern "C" __attribute__((visibility("default"))) int32_t blockskipWalkEnqueue(char const* library, char const* plan,
    char const* node, char const* profile, void const* const* inputs, void* const* outputs, void* workspace,
    size_t workspaceBytes, cudaStream_t stream, char* reason, size_t reasonSize) noexcept
{
    try
    {
        static host::Logger sLogger;
        host::PluginLibrary const loaded{library, sLogger};
        std::vector<host::Node> const nodes = host::readPlan(plan);
        host::Node const& chosen = find(nodes, node);
        host::Profile const& at = find(chosen.profiles, profile);
        host::Plugin const built = loaded.createForBuild(chosen);
        if (host::walkBuild(*built, at).workspace > workspaceBytes)
        {
            throw std::runtime_error("the workspace is smaller than the plugin asks for");
        }
        host::Plugin const plugin = host::throughPlan(loaded, *built, chosen.name);
        host::enqueueOnce(*plugin, at, inputs, outputs, workspace, stream);
        return 0;
    }
    catch (std::exception const& error)
    {
        std::strncpy(reason, error.what(), reasonSize - 1);
        reason[reasonSize - 1] = '\0';
        return 1;
    }
}
