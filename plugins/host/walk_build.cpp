#include "walk_build.h"

#include "tensorrt_side.h"

#include <stdexcept>
#include <string>

namespace host
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

namespace
{

void require(bool condition, std::string const& what)
{
    if (!condition)
    {
        throw std::runtime_error(what);
    }
}

PluginTensorDesc linear(DataType type, Dims const& dims)
{
    return PluginTensorDesc{dims, type, TensorFormat::kLINEAR, 1.0F};
}

/* As during building: -1 where the profile leaves a dimension open. */
DynamicPluginTensorDesc ranged(Tensor const& tensor)
{
    Dims declared = tensor.opt;
    for (int32_t i = 0; i < declared.nbDims; ++i)
    {
        declared.d[i] = tensor.min.d[i] == tensor.max.d[i] ? tensor.opt.d[i] : -1;
    }
    return DynamicPluginTensorDesc{linear(tensor.type, declared), tensor.min, tensor.max, tensor.opt};
}

void checkTypes(IPluginV3OneBuild& build, Profile const& profile)
{
    std::vector<DataType> given;
    for (Tensor const& tensor : profile.inputs)
    {
        given.push_back(tensor.type);
    }
    std::vector<DataType> answered(profile.outputs.size(), DataType::kINT8);
    require(build.getOutputDataTypes(answered.data(), static_cast<int32_t>(answered.size()), given.data(),
                static_cast<int32_t>(given.size()))
            == 0,
        "getOutputDataTypes failed");
    for (size_t i = 0; i < answered.size(); ++i)
    {
        require(answered[i] == profile.outputs[i].type, "getOutputDataTypes: wrong type of " + profile.outputs[i].name);
    }
}

void checkShapes(IPluginV3OneBuild& build, Profile const& profile, Dims Tensor::*shape)
{
    Expressions expressions;
    std::vector<DimsExprs> given;
    for (Tensor const& tensor : profile.inputs)
    {
        Dims const& dims = tensor.*shape;
        DimsExprs exprs{};
        exprs.nbDims = dims.nbDims;
        for (int32_t i = 0; i < dims.nbDims; ++i)
        {
            exprs.d[i] = expressions.make(dims.d[i], tensor.min.d[i] == tensor.max.d[i]);
        }
        given.push_back(exprs);
    }
    std::vector<DimsExprs> answered(profile.outputs.size());
    require(build.getOutputShapes(given.data(), static_cast<int32_t>(given.size()), nullptr, 0, answered.data(),
                static_cast<int32_t>(answered.size()), expressions)
            == 0,
        "getOutputShapes failed");
    for (size_t i = 0; i < answered.size(); ++i)
    {
        Dims const& expected = profile.outputs[i].*shape;
        bool same = answered[i].nbDims == expected.nbDims;
        for (int32_t d = 0; same && d < expected.nbDims; ++d)
        {
            same = static_cast<Dimension const*>(answered[i].d[d])->value() == expected.d[d];
        }
        require(same, "getOutputShapes: wrong shape of " + profile.outputs[i].name);
    }
}

/* Depth-first over every type and format of every tensor, asking at each position as TensorRT does; returns how many
 * full combinations the plugin accepts whose input types are those of the profile. */
int32_t countCombinations(IPluginV3OneBuild& build, std::vector<DynamicPluginTensorDesc>& inOut, size_t position,
    std::vector<DataType> const& wanted, size_t inputs)
{
    if (position == inOut.size())
    {
        return 1;
    }
    int32_t accepted = 0;
    for (int32_t type = 0; type < nvinfer1::EnumMax<DataType>(); ++type)
    {
        for (int32_t format = 0; format < nvinfer1::EnumMax<TensorFormat>(); ++format)
        {
            PluginTensorDesc& desc = inOut[position].desc;
            desc.type = static_cast<DataType>(type);
            desc.format = static_cast<TensorFormat>(format);
            bool const supported = build.supportsFormatCombination(static_cast<int32_t>(position), inOut.data(),
                static_cast<int32_t>(inputs), static_cast<int32_t>(inOut.size() - inputs));
            if (supported && desc.type == wanted[position])
            {
                accepted += countCombinations(build, inOut, position + 1, wanted, inputs);
            }
            desc.type = static_cast<DataType>(type);
            desc.format = static_cast<TensorFormat>(format);
        }
    }
    return accepted;
}

} // namespace

std::vector<PluginTensorDesc> describe(std::vector<Tensor> const& tensors, Dims Tensor::*shape)
{
    std::vector<PluginTensorDesc> descs;
    for (Tensor const& tensor : tensors)
    {
        descs.push_back(linear(tensor.type, tensor.*shape));
    }
    return descs;
}

BuildAnswer walkBuild(nvinfer1::IPluginV3& plugin, Profile const& profile)
{
    IPluginV3OneBuild& build = buildOf(plugin);
    require(build.getNbOutputs() == static_cast<int32_t>(profile.outputs.size()), "getNbOutputs: wrong number");
    checkTypes(build, profile);
    for (Dims Tensor::*shape : {&Tensor::min, &Tensor::opt, &Tensor::max})
    {
        checkShapes(build, profile, shape);
    }
    std::vector<DynamicPluginTensorDesc> inOut;
    std::vector<DataType> wanted;
    for (auto const* tensors : {&profile.inputs, &profile.outputs})
    {
        for (Tensor const& tensor : *tensors)
        {
            inOut.push_back(ranged(tensor));
            wanted.push_back(tensor.type);
        }
    }
    std::vector<DynamicPluginTensorDesc> const configured{inOut};
    BuildAnswer answer;
    answer.combinations = countCombinations(build, inOut, 0, wanted, profile.inputs.size());
    require(answer.combinations == 1,
        "supportsFormatCombination: " + std::to_string(answer.combinations) + " combinations for these types, expected 1");
    auto const inputs = static_cast<int32_t>(profile.inputs.size());
    auto const outputs = static_cast<int32_t>(profile.outputs.size());
    require(build.configurePlugin(configured.data(), inputs, configured.data() + inputs, outputs) == 0,
        "configurePlugin failed");
    answer.workspace = build.getWorkspaceSize(configured.data(), inputs, configured.data() + inputs, outputs);
    char const* cacheId = build.getTimingCacheID();
    require(cacheId != nullptr && *cacheId != '\0', "getTimingCacheID: nothing to tell two nodes apart");
    return answer;
}

} // namespace host
