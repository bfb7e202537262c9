/* The TensorRT plugin: one class with the three capabilities (core, build, runtime) of IPluginV3. */
#ifndef BLOCKSKIP_ATTENTION_PLUGIN_H
#define BLOCKSKIP_ATTENTION_PLUGIN_H

#include "attention_fields.h"
#include "attention_inputs.h"
#include "block_skip_attention.h"

#include <NvInferRuntime.h>

#include <memory>
#include <string>

namespace blockskip
{

constexpr char kPLUGIN_NAME[] = "BlockSkipSoftmaxAttention";
constexpr char kPLUGIN_VERSION[] = "1";
constexpr char kPLUGIN_NAMESPACE[] = "blockskip";

/* A clone holds its own state, so that every execution context works on an object of its own: contexts on several
 * streams share nothing but the loaded kernels. */
class AttentionPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime
{
public:
    explicit AttentionPlugin(AttentionFields fields);
    AttentionPlugin(AttentionPlugin const& other);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    nvinfer1::AsciiChar const* getPluginName() const noexcept override;
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override;
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
        nvinfer1::DimsExprs const* shapeInputs, int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    void requireCounts(int32_t nbInputs, int32_t nbOutputs) const;

    AttentionFields mFields;
    AttentionInputs mInputs;
    std::string mDescription;
    std::unique_ptr<SerializedFields> mSerialized;
    // The call of the current shapes, set by onShapeChange; enqueue only adds the pointers.
    bsa_params mCall{};
    bool mHasCall{false};
    nvinfer1::IErrorRecorder* mRecorder{nullptr};
};

} // namespace blockskip

#endif
