#include "plugin_library.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <stdexcept>
#include <vector>

namespace host
{

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

namespace
{

template <typename Function>
Function symbol(void* library, char const* name)
{
    void* address = dlsym(library, name);
    if (address == nullptr)
    {
        throw std::runtime_error(std::string{"the library does not export "} + name);
    }
    return reinterpret_cast<Function>(address);
}

void require(bool condition, std::string const& what)
{
    if (!condition)
    {
        throw std::runtime_error(what);
    }
}

size_t bytesOf(PluginFieldType type)
{
    return type == PluginFieldType::kINT32 || type == PluginFieldType::kFLOAT32 ? 4 : 1;
}

} // namespace

PluginLibrary::PluginLibrary(std::string const& path, nvinfer1::ILoggerFinder& finder)
{
    // Never closed: plugins may outlive this object.
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    require(library != nullptr, std::string{"cannot load the plugin library: "} + (library ? "" : dlerror()));
    symbol<void (*)(nvinfer1::ILoggerFinder*)>(library, "setLoggerFinder")(&finder);
    int32_t count = 0;
    auto* const* creators = symbol<IPluginCreatorInterface* const* (*) (int32_t&)>(library, "getCreators")(count);
    require(count == 1, "the library has " + std::to_string(count) + " creators, expected 1");
    require(std::strcmp(creators[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0,
        std::string{"the creator is a "} + creators[0]->getInterfaceInfo().kind);
    mCreator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]);
    require(std::string{mCreator->getPluginName()} == "BlockSkipSoftmaxAttention"
            && std::string{mCreator->getPluginVersion()} == "1"
            && std::string{mCreator->getPluginNamespace()} == "blockskip",
        "the creator does not carry the op's name, version and namespace");
}

PluginFieldCollection const& PluginLibrary::fields() const
{
    PluginFieldCollection const* advertised = mCreator->getFieldNames();
    require(advertised != nullptr && advertised->nbFields > 0, "the creator advertises no fields");
    return *advertised;
}

Plugin PluginLibrary::createForBuild(Node const& node) const
{
    PluginFieldCollection const& advertised = this->fields();
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < advertised.nbFields; ++i)
    {
        auto const attribute = std::find_if(node.attributes.begin(), node.attributes.end(),
            [&](Attribute const& a) { return a.name == advertised.fields[i].name; });
        if (attribute == node.attributes.end())
        {
            continue;
        }
        void const* data = attribute->type == PluginFieldType::kINT32 ? static_cast<void const*>(&attribute->integer)
            : attribute->type == PluginFieldType::kFLOAT32            ? static_cast<void const*>(&attribute->real)
                                                           : static_cast<void const*>(attribute->text.data());
        int32_t const length
            = attribute->type == PluginFieldType::kCHAR ? static_cast<int32_t>(attribute->text.size()) : 1;
        fields.emplace_back(attribute->name.c_str(), data, attribute->type, length);
    }
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    Plugin plugin{mCreator->createPlugin(node.name.c_str(), &collection, nvinfer1::TensorRTPhase::kBUILD)};
    require(plugin != nullptr, "createPlugin failed for the build phase");
    return plugin;
}

Plugin PluginLibrary::createForRuntime(IPluginV3& built, std::string const& name) const
{
    PluginFieldCollection const* saved = runtimeOf(built).getFieldsToSerialize();
    require(saved != nullptr, "getFieldsToSerialize failed");
    // A plan lives in other memory than the plugin that wrote it, and strings in it have no terminator.
    std::deque<std::string> names;
    std::deque<std::vector<char>> values;
    std::vector<PluginField> fields;
    for (int32_t i = 0; i < saved->nbFields; ++i)
    {
        PluginField const& field = saved->fields[i];
        auto const* bytes = static_cast<char const*>(field.data);
        size_t const size = bytesOf(field.type) * static_cast<size_t>(field.length);
        names.emplace_back(field.name);
        values.emplace_back(bytes, bytes + size);
        values.back().push_back('!');
        fields.emplace_back(names.back().c_str(), values.back().data(), field.type, field.length);
    }
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    Plugin plugin{mCreator->createPlugin(name.c_str(), &collection, nvinfer1::TensorRTPhase::kRUNTIME)};
    require(plugin != nullptr, "createPlugin failed for the runtime phase");
    return plugin;
}

Plugin throughPlan(PluginLibrary const& library, IPluginV3& built, std::string const& name)
{
    Plugin const cloned{built.clone()};
    Plugin const loaded = library.createForRuntime(*cloned, name);
    Plugin result{loaded->clone()};
    require(std::strcmp(buildOf(built).getMetadataString(), buildOf(*result).getMetadataString()) == 0,
        "the plugin read back from its own fields differs from the one that wrote them");
    return result;
}

nvinfer1::IPluginV3OneBuild& buildOf(IPluginV3& plugin)
{
    auto* capability = plugin.getCapabilityInterface(PluginCapabilityType::kBUILD);
    require(capability != nullptr, "the plugin has no build capability");
    return *static_cast<nvinfer1::IPluginV3OneBuild*>(capability);
}

nvinfer1::IPluginV3OneRuntime& runtimeOf(IPluginV3& plugin)
{
    auto* capability = plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME);
    require(capability != nullptr, "the plugin has no runtime capability");
    return *static_cast<nvinfer1::IPluginV3OneRuntime*>(capability);
}

} // namespace host
