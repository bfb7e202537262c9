#include "walk_plan.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>

namespace host
{

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

namespace
{

std::map<std::string, DataType> const kTYPES{{"float", DataType::kFLOAT}, {"half", DataType::kHALF},
    {"bf16", DataType::kBF16}, {"int32", DataType::kINT32}, {"int64", DataType::kINT64}, {"int8", DataType::kINT8},
    {"bool", DataType::kBOOL}};

size_t bytesOf(DataType type)
{
    switch (type)
    {
    case DataType::kFLOAT:
    case DataType::kINT32: return 4;
    case DataType::kINT64: return 8;
    case DataType::kHALF:
    case DataType::kBF16: return 2;
    default: return 1;
    }
}

std::string word(std::istream& line)
{
    std::string text;
    if (!(line >> text))
    {
        throw std::runtime_error("a word is missing");
    }
    return text;
}

nvinfer1::Dims readDims(std::istream& line, std::string const& label)
{
    if (word(line) != label)
    {
        throw std::runtime_error("expected \"" + label + "\"");
    }
    nvinfer1::Dims dims{};
    std::istringstream sizes{word(line)};
    std::string size;
    while (std::getline(sizes, size, ','))
    {
        if (dims.nbDims == nvinfer1::Dims::MAX_DIMS)
        {
            throw std::runtime_error("more than 8 dimensions");
        }
        dims.d[dims.nbDims++] = std::stoll(size);
    }
    return dims;
}

Attribute readAttribute(std::istream& line)
{
    Attribute attribute{};
    attribute.name = word(line);
    std::string const kind = word(line);
    if (kind == "int")
    {
        attribute.type = PluginFieldType::kINT32;
        attribute.integer = std::stoi(word(line));
    }
    else if (kind == "float")
    {
        attribute.type = PluginFieldType::kFLOAT32;
        attribute.real = std::stof(word(line));
    }
    else if (kind == "string")
    {
        attribute.type = PluginFieldType::kCHAR;
        line >> attribute.text; // may be empty
    }
    else
    {
        throw std::runtime_error("unknown kind of attribute \"" + kind + "\"");
    }
    return attribute;
}

Tensor readTensor(std::istream& line)
{
    Tensor tensor{};
    tensor.name = word(line);
    auto const type = kTYPES.find(word(line));
    if (type == kTYPES.end())
    {
        throw std::runtime_error("unknown type of tensor \"" + tensor.name + "\"");
    }
    tensor.type = type->second;
    tensor.min = readDims(line, "min");
    tensor.opt = readDims(line, "opt");
    tensor.max = readDims(line, "max");
    return tensor;
}

void readStatement(std::vector<Node>& nodes, std::string const& text, std::string const& folder)
{
    std::istringstream line{text};
    std::string const kind = word(line);
    if (kind == "node")
    {
        nodes.push_back(Node{word(line), {}, {}});
        return;
    }
    if (nodes.empty())
    {
        throw std::runtime_error("a node has to come first");
    }
    Node& node = nodes.back();
    if (kind == "attribute")
    {
        node.attributes.push_back(readAttribute(line));
        return;
    }
    if (kind == "profile")
    {
        node.profiles.push_back(Profile{word(line), {}, {}});
        return;
    }
    if (node.profiles.empty())
    {
        throw std::runtime_error("a profile has to come first");
    }
    Profile& profile = node.profiles.back();
    if (kind == "input")
    {
        profile.inputs.push_back(readTensor(line));
    }
    else if (kind == "output")
    {
        profile.outputs.push_back(readTensor(line));
    }
    else if (kind == "data")
    {
        std::string const name = word(line);
        auto const input = std::find_if(profile.inputs.begin(), profile.inputs.end(),
            [&name](Tensor const& tensor) { return tensor.name == name; });
        if (input == profile.inputs.end())
        {
            throw std::runtime_error("data for \"" + name + "\", which is no input");
        }
        input->data = folder + word(line);
    }
    else
    {
        throw std::runtime_error("unknown statement \"" + kind + "\"");
    }
}

} // namespace

size_t Tensor::bytes() const
{
    size_t count = bytesOf(type);
    for (int32_t i = 0; i < opt.nbDims; ++i)
    {
        count *= static_cast<size_t>(opt.d[i]);
    }
    return count;
}

bool Profile::hasData() const
{
    return std::all_of(inputs.begin(), inputs.end(), [](Tensor const& tensor) { return !tensor.data.empty(); });
}

std::vector<Node> readPlan(std::string const& path)
{
    std::ifstream file{path};
    if (!file)
    {
        throw std::runtime_error("cannot read the plan " + path);
    }
    // npos + 1 is 0: no folder in the path
    std::string const folder = path.substr(0, path.rfind('/') + 1);
    std::vector<Node> nodes;
    std::string line;
    for (int32_t number = 1; std::getline(file, line); ++number)
    {
        try
        {
            if (!line.empty())
            {
                readStatement(nodes, line, folder);
            }
        }
        catch (std::exception const& error)
        {
            throw std::runtime_error(path + ":" + std::to_string(number) + ": " + error.what());
        }
    }
    if (nodes.empty())
    {
        throw std::runtime_error(path + " holds no node");
    }
    return nodes;
}

} // namespace host
