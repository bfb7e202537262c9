/* What TensorRT's registry holds: makes plugins from the fields of a node or of a plan. */
#ifndef BLOCKSKIP_ATTENTION_CREATOR_H
#define BLOCKSKIP_ATTENTION_CREATOR_H

#include <NvInferRuntime.h>

namespace blockskip
{

class AttentionCreator final : public nvinfer1::IPluginCreatorV3One
{
public:
    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name,
        nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;
};

} // namespace blockskip

#endif
