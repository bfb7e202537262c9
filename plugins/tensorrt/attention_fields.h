/* The op's attributes as TensorRT carries them: plugin fields by name, types and order of the op contract. */
#ifndef BLOCKSKIP_ATTENTION_FIELDS_H
#define BLOCKSKIP_ATTENTION_FIELDS_H

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace blockskip
{

/* The skip threshold of one phase: a constant, or a calibrated curve over the length. */
struct PhaseThreshold
{
    float threshold{0.0F};
    float a{0.0F};
    float b{0.0F};
    float target{0.0F};

    /* a * exp(b * target), to be divided by the number of keys; 0 where the threshold is the constant. */
    float factor() const;
};

/* Everything a node of the op says about itself; shapes and types come from TensorRT. */
struct AttentionFields
{
    std::string inputs;
    int32_t br{0};
    int32_t bc{0};
    int32_t isCausal{0};
    float scale{0.0F};
    float softcap{0.0F};
    int32_t window{0};
    std::string unit;
    PhaseThreshold prefill;
    PhaseThreshold decode;
    /* Not part of the contract: the parser does not tell a plugin how many outputs its node uses. Without it both are
     * produced, which is always right and costs the counting. */
    std::string outputs{"o,counts"};

    bool hasCounts() const;

    /* All fields as "name=value;...": timing-cache identifier and engine-inspector text. */
    std::string describe() const;
};

/* Reads the fields of one plugin; throws std::invalid_argument naming the field for a missing, unknown-valued or
 * contradictory one. Names that are not ours are refused when `strict` (a plan holds exactly what we serialised). */
AttentionFields parseFields(nvinfer1::PluginFieldCollection const* collection, bool strict);

/* What the creator advertises: names and types only. */
nvinfer1::PluginFieldCollection const* advertisedFields();

/* Owns the memory behind a PluginFieldCollection made from AttentionFields; neither copied nor moved, since the
 * collection points into it. */
class SerializedFields
{
public:
    explicit SerializedFields(AttentionFields const& fields);
    SerializedFields(SerializedFields const&) = delete;
    SerializedFields& operator=(SerializedFields const&) = delete;

    nvinfer1::PluginFieldCollection const* collection() const
    {
        return &mCollection;
    }

private:
    AttentionFields mFields;
    std::vector<nvinfer1::PluginField> mPluginFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

} // namespace blockskip

#endif
