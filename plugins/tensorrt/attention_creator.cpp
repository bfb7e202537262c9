#include "attention_creator.h"

#include "attention_fields.h"
#include "attention_plugin.h"
#include "plugin_log.h"

#include <memory>
#include <stdexcept>
#include <string>

namespace blockskip
{

nvinfer1::IPluginV3* AttentionCreator::createPlugin(nvinfer1::AsciiChar const* name,
    nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase phase) noexcept
{
    return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, nullptr, [&]() -> nvinfer1::IPluginV3* {
        try
        {
            // A plan holds exactly the fields that this plugin wrote; a network may carry more.
            bool const strict = phase == nvinfer1::TensorRTPhase::kRUNTIME;
            return std::make_unique<AttentionPlugin>(parseFields(fc, strict)).release();
        }
        catch (std::exception const& error)
        {
            throw std::invalid_argument(std::string{"node \""} + (name == nullptr ? "" : name) + "\": " + error.what());
        }
    });
}

nvinfer1::PluginFieldCollection const* AttentionCreator::getFieldNames() noexcept
{
    return guarded<nvinfer1::PluginFieldCollection const*>(
        "getFieldNames", nullptr, nullptr, [] { return advertisedFields(); });
}

nvinfer1::AsciiChar const* AttentionCreator::getPluginName() const noexcept
{
    return kPLUGIN_NAME;
}

nvinfer1::AsciiChar const* AttentionCreator::getPluginVersion() const noexcept
{
    return kPLUGIN_VERSION;
}

nvinfer1::AsciiChar const* AttentionCreator::getPluginNamespace() const noexcept
{
    return kPLUGIN_NAMESPACE;
}

} // namespace blockskip
