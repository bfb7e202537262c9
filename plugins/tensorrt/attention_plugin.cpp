#include "attention_plugin.h"

#include "attention_call.h"
#include "plugin_log.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace blockskip
{

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IErrorRecorder;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

namespace
{

constexpr int32_t kOK = 0;
constexpr int32_t kFAILED = 1;

/* Whether an input may have `type`, given the type of q. */
bool acceptsType(Input input, DataType type, DataType qType)
{
    switch (input)
    {
    case Input::kQ: return type == DataType::kHALF || type == DataType::kBF16;
    case Input::kK:
    case Input::kV:
    case Input::kSINKS: return type == qType;
    case Input::kBIAS: return type == qType || type == DataType::kBOOL;
    case Input::kTHRESHOLD_SCALE: return type == DataType::kFLOAT;
    default: return type == DataType::kINT32;
    }
}

} // namespace

AttentionPlugin::AttentionPlugin(AttentionFields fields)
    : mFields(std::move(fields))
    , mInputs(mFields.inputs)
    , mDescription(mFields.describe())
{
}

AttentionPlugin::AttentionPlugin(AttentionPlugin const& other)
    : nvinfer1::IPluginV3(other)
    , nvinfer1::IPluginV3OneCore(other)
    , nvinfer1::IPluginV3OneBuild(other)
    , nvinfer1::IPluginV3OneRuntime(other)
    , mFields(other.mFields)
    , mInputs(other.mInputs)
    , mDescription(other.mDescription)
    , mCall(other.mCall)
    , mHasCall(other.mHasCall)
    , mRecorder(other.mRecorder)
{
}

nvinfer1::IPluginCapability* AttentionPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* AttentionPlugin::clone() noexcept
{
    return guarded<nvinfer1::IPluginV3*>(
        "clone", mRecorder, nullptr, [this] { return std::make_unique<AttentionPlugin>(*this).release(); });
}

nvinfer1::AsciiChar const* AttentionPlugin::getPluginName() const noexcept
{
    return kPLUGIN_NAME;
}

nvinfer1::AsciiChar const* AttentionPlugin::getPluginVersion() const noexcept
{
    return kPLUGIN_VERSION;
}

nvinfer1::AsciiChar const* AttentionPlugin::getPluginNamespace() const noexcept
{
    return kPLUGIN_NAMESPACE;
}

int32_t AttentionPlugin::getNbOutputs() const noexcept
{
    return mFields.hasCounts() ? 2 : 1;
}

void AttentionPlugin::requireCounts(int32_t nbInputs, int32_t nbOutputs) const
{
    if (nbInputs != mInputs.count())
    {
        throw std::invalid_argument("the node has " + std::to_string(nbInputs) + " inputs, its attribute \"inputs\" = \""
            + mFields.inputs + "\" names " + std::to_string(mInputs.count()));
    }
    if (nbOutputs != getNbOutputs())
    {
        throw std::invalid_argument("the node has " + std::to_string(nbOutputs)
            + " outputs, its attribute \"outputs\" = \"" + mFields.outputs + "\" names "
            + std::to_string(getNbOutputs()));
    }
}

int32_t AttentionPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    return guarded("getOutputDataTypes", mRecorder, kFAILED, [&] {
        requireCounts(nbInputs, nbOutputs);
        outputTypes[0] = inputTypes[mInputs.position(Input::kQ)];
        if (mFields.hasCounts())
        {
            outputTypes[1] = DataType::kINT32;
        }
        return kOK;
    });
}

int32_t AttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/, nvinfer1::DimsExprs* outputs,
    int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept
{
    return guarded("getOutputShapes", mRecorder, kFAILED, [&] {
        requireCounts(nbInputs, nbOutputs);
        nvinfer1::DimsExprs const& q = inputs[mInputs.position(Input::kQ)];
        nvinfer1::DimsExprs const& v = inputs[mInputs.position(Input::kV)];
        if (q.nbDims != 4 || v.nbDims != 4)
        {
            throw std::invalid_argument("q and v must have rank 4: [B, Hq, Sq, D] and [B, Hk, Sk, Dv]");
        }
        outputs[0].nbDims = 4; // o [B, Hq, Sq, Dv]
        outputs[0].d[0] = q.d[0];
        outputs[0].d[1] = q.d[1];
        outputs[0].d[2] = q.d[2];
        outputs[0].d[3] = v.d[3];
        if (mFields.hasCounts())
        {
            outputs[1].nbDims = 2; // counts [Hq, 2]
            outputs[1].d[0] = q.d[1];
            outputs[1].d[1] = exprBuilder.constant(2);
        }
        return kOK;
    });
}

/* Exactly one combination per type of q: row-major everywhere, types as in the contract. What is accepted here is never
 * refused later for its type or layout. TensorRT documents boolean plugin inputs as unsupported on its side; accepting
 * them costs nothing where a version never offers them. */
bool AttentionPlugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    return guarded("supportsFormatCombination", mRecorder, false, [&] {
        requireCounts(nbInputs, nbOutputs);
        PluginTensorDesc const& desc = inOut[pos].desc;
        if (desc.format != TensorFormat::kLINEAR)
        {
            return false;
        }
        DataType const qType = inOut[mInputs.position(Input::kQ)].desc.type;
        if (pos < nbInputs)
        {
            return acceptsType(mInputs.at(pos), desc.type, qType);
        }
        return desc.type == (pos == nbInputs ? qType : DataType::kINT32);
    });
}

/* Called before the layer is timed: the moment to stop a plan whose shapes no kernel serves. */
int32_t AttentionPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*out*/, int32_t nbOutputs) noexcept
{
    return guarded("configurePlugin", mRecorder, kFAILED, [&] {
        requireCounts(nbInputs, nbOutputs);
        for (bsa_params const& call : sampleCalls(mFields, mInputs, in))
        {
            requireKernel(call);
        }
        return kOK;
    });
}

/* Enough for every size in the profile's range, on every device: an engine may be built for more than this one. */
size_t AttentionPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    DynamicPluginTensorDesc const* /*outputs*/, int32_t nbOutputs) const noexcept
{
    return guarded("getWorkspaceSize", mRecorder, size_t{0}, [&] {
        requireCounts(nbInputs, nbOutputs);
        size_t bytes = 0;
        for (bsa_params const& call : sampleCalls(mFields, mInputs, inputs))
        {
            bytes = std::max(bytes, bsa_workspace_size_any_device(&call));
        }
        return bytes;
    });
}

char const* AttentionPlugin::getTimingCacheID() noexcept
{
    return mDescription.c_str();
}

char const* AttentionPlugin::getMetadataString() noexcept
{
    return mDescription.c_str();
}

int32_t AttentionPlugin::onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* /*out*/,
    int32_t nbOutputs) noexcept
{
    return guarded("onShapeChange", mRecorder, kFAILED, [&] {
        mHasCall = false;
        requireCounts(nbInputs, nbOutputs);
        bsa_params const call = describeCall(mFields, mInputs, in);
        requireKernel(call);
        // Loading here keeps it out of enqueue, so that a first enqueue may already be captured into a graph. Without
        // a GPU there is nothing to load yet; enqueue would say so.
        bsa_status const status = bsa_prepare(&call);
        if (status != BSA_OK && status != BSA_ERROR_NO_DRIVER && status != BSA_ERROR_NO_DEVICE)
        {
            throw std::runtime_error(std::string{bsa_status_string(status)} + ": " + bsa_last_error());
        }
        mCall = call;
        mHasCall = true;
        return kOK;
    });
}

int32_t AttentionPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /*outputDesc*/,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    return guarded("enqueue", mRecorder, kFAILED, [&] {
        bsa_params call = mHasCall ? mCall : describeCall(mFields, mInputs, inputDesc);
        if (call.batch == 0 || call.seq_q == 0)
        {
            return kOK; // nothing to write
        }
        bindTensors(call, mInputs, inputs, outputs, workspace);
        bsa_status const status = bsa_launch(&call, stream);
        if (status != BSA_OK)
        {
            throw std::runtime_error(std::string{bsa_status_string(status)} + ": " + bsa_last_error());
        }
        return kOK;
    });
}

nvinfer1::IPluginV3* AttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext* context) noexcept
{
    return guarded<nvinfer1::IPluginV3*>("attachToContext", mRecorder, nullptr, [&] {
        auto attached = std::make_unique<AttentionPlugin>(*this);
        attached->mHasCall = false;
        attached->mRecorder = context == nullptr ? nullptr : context->getErrorRecorder();
        return attached.release();
    });
}

nvinfer1::PluginFieldCollection const* AttentionPlugin::getFieldsToSerialize() noexcept
{
    return guarded<nvinfer1::PluginFieldCollection const*>("getFieldsToSerialize", mRecorder, nullptr, [this] {
        if (mSerialized == nullptr)
        {
            mSerialized = std::make_unique<SerializedFields>(mFields);
        }
        return mSerialized->collection();
    });
}

} // namespace blockskip
