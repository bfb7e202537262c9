/* What the host walks: nodes with their attributes, and per optimisation profile the tensors each would get.
 *
 * A plan is a text file of one statement a line, words separated by single spaces (written by write_plan.py):
 *     node NAME
 *     attribute NAME int|float|string VALUE
 *     profile NAME
 *     input|output NAME TYPE min D,D,.. opt D,D,.. max D,D,..
 *     data NAME FILE                 beside the plan: an input's raw bytes at its `opt` shape, for a run on a GPU
 * A profile belongs to the node above it, tensors and data to the profile above them. TYPE is TensorRT's:
 * float half bf16 int32 int64 int8 bool. */
#ifndef BLOCKSKIP_WALK_PLAN_H
#define BLOCKSKIP_WALK_PLAN_H

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace host
{

struct Attribute
{
    std::string name;
    nvinfer1::PluginFieldType type;
    int32_t integer{0};
    float real{0.0F};
    std::string text;
};

struct Tensor
{
    std::string name;
    nvinfer1::DataType type;
    nvinfer1::Dims min, opt, max;
    std::string data; // path of the file, "" where none

    /* Bytes at the `opt` shape. */
    size_t bytes() const;
};

struct Profile
{
    std::string name;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;

    bool hasData() const;
};

struct Node
{
    std::string name;
    std::vector<Attribute> attributes;
    std::vector<Profile> profiles;
};

/* Throws std::runtime_error with path and line for what cannot be read. */
std::vector<Node> readPlan(std::string const& path);

} // namespace host

#endif
