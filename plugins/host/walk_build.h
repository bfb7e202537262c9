/* The build half of the walk: what TensorRT asks a plugin before it runs anything. */
#ifndef BLOCKSKIP_WALK_BUILD_H
#define BLOCKSKIP_WALK_BUILD_H

#include "plugin_library.h"
#include "walk_plan.h"

#include <cstddef>
#include <cstdint>

namespace host
{

struct BuildAnswer
{
    int32_t combinations{0}; // type and format combinations the plugin accepts for the profile's inputs
    size_t workspace{0};     // bytes
};

/* Output types and shapes, formats, configuration and workspace for one profile, each compared with what the plan
 * expects; throws std::runtime_error naming the step. */
BuildAnswer walkBuild(nvinfer1::IPluginV3& plugin, Profile const& profile);

/* Descriptions of the profile's tensors at one of its shapes. */
std::vector<nvinfer1::PluginTensorDesc> describe(std::vector<Tensor> const& tensors, nvinfer1::Dims Tensor::*shape);

} // namespace host

#endif
