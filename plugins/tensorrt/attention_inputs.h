/* Which inputs of the op a node has, and at which position: what its `inputs` attribute says. */
#ifndef BLOCKSKIP_ATTENTION_INPUTS_H
#define BLOCKSKIP_ATTENTION_INPUTS_H

#include <array>
#include <cstdint>
#include <string>

namespace blockskip
{

/* The inputs of the op contract, in its order. */
enum class Input : int32_t
{
    kQ,
    kK,
    kV,
    kBIAS,
    kKV_LENGTHS,
    kQ_START,
    kQ_LENGTHS,
    kSINKS,
    kTHRESHOLD_SCALE,
};

constexpr int32_t kINPUT_COUNT = 9;

class AttentionInputs
{
public:
    /* Throws std::invalid_argument for an unknown, repeated, misplaced or missing required name. */
    explicit AttentionInputs(std::string const& names);

    /* Number of inputs the node has. */
    int32_t count() const
    {
        return mCount;
    }

    /* Position of an input among the node's inputs, or -1 where the node does not have it. */
    int32_t position(Input input) const
    {
        return mPosition[static_cast<size_t>(input)];
    }

    /* The input at a position in [0, count()). */
    Input at(int32_t position) const
    {
        return mInput[static_cast<size_t>(position)];
    }

private:
    int32_t mCount{0};
    std::array<int32_t, kINPUT_COUNT> mPosition;
    std::array<Input, kINPUT_COUNT> mInput{};
};

/* The contract's name of an input. */
char const* inputName(Input input);

} // namespace blockskip

#endif
