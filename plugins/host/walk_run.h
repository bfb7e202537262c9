/* The runtime half of the walk: shapes on every machine, real buffers and streams on one with a GPU. */
#ifndef BLOCKSKIP_WALK_RUN_H
#define BLOCKSKIP_WALK_RUN_H

#include "cuda_driver.h"
#include "plugin_library.h"
#include "walk_plan.h"

#include <string>

namespace host
{

/* attachToContext, and onShapeChange at the profile's smallest, best and largest shapes; throws std::runtime_error. */
void walkShapes(nvinfer1::IPluginV3& plugin, Profile const& profile);

/* One execution at the profile's best shape, on memory and a stream of the caller's: context, shapes, enqueue. Does not
 * wait for the stream. */
void enqueueOnce(nvinfer1::IPluginV3& plugin, Profile const& profile, void const* const* inputs, void* const* outputs,
    void* workspace, cudaStream_t stream);

/* Runs the profile at its best shape: two execution contexts enqueue at once from two threads on two streams into
 * poisoned outputs, then one context is captured into a CUDA graph and replayed. All results have to be the same bits.
 * Writes each output to DIRECTORY/NODE.PROFILE.OUTPUT.bin and returns the mean time of a replay in milliseconds. */
float walkGpu(nvinfer1::IPluginV3& plugin, Node const& node, Profile const& profile, size_t workspace, Gpu& gpu,
    std::string const& directory);

} // namespace host

#endif
