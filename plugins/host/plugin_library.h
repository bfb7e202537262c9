/* The plugin library as TensorRT's registry sees it: opened at run time, known only by its entry points. */
#ifndef BLOCKSKIP_PLUGIN_LIBRARY_H
#define BLOCKSKIP_PLUGIN_LIBRARY_H

#include "walk_plan.h"

#include <NvInferRuntime.h>

#include <memory>
#include <string>

namespace host
{

/* TensorRT deletes plugins through their interface. */
using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;

class PluginLibrary
{
public:
    /* Opens the library, gives it the logger and finds the creator of the op; throws std::runtime_error. */
    PluginLibrary(std::string const& path, nvinfer1::ILoggerFinder& finder);

    /* What the creator advertises. */
    nvinfer1::PluginFieldCollection const& fields() const;

    /* createPlugin with the fields the ONNX parser would read off the node: those the creator advertises. */
    Plugin createForBuild(Node const& node) const;

    /* createPlugin as a plan's deserialisation does it, from a copy of the plugin's own fields. */
    Plugin createForRuntime(nvinfer1::IPluginV3& built, std::string const& name) const;

private:
    nvinfer1::IPluginCreatorV3One* mCreator{nullptr};
};

/* A plugin that went through everything TensorRT puts between a node and an execution: clone, plan, clone. Throws where
 * the result differs from `built`. */
Plugin throughPlan(PluginLibrary const& library, nvinfer1::IPluginV3& built, std::string const& name);

/* The capability interfaces; throw where the plugin lacks them. */
nvinfer1::IPluginV3OneBuild& buildOf(nvinfer1::IPluginV3& plugin);
nvinfer1::IPluginV3OneRuntime& runtimeOf(nvinfer1::IPluginV3& plugin);

} // namespace host

#endif
