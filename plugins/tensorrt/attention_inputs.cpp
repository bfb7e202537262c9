#include "attention_inputs.h"

#include <sstream>
#include <stdexcept>

namespace blockskip
{

namespace
{

constexpr std::array<char const*, kINPUT_COUNT> kNAMES{
    "q", "k", "v", "bias", "kv_lengths", "q_start", "q_lengths", "sinks", "threshold_scale"};

} // namespace

char const* inputName(Input input)
{
    return kNAMES[static_cast<size_t>(input)];
}

AttentionInputs::AttentionInputs(std::string const& names)
{
    mPosition.fill(-1);
    std::istringstream stream{names};
    std::string name;
    size_t next = 0; // the contract's order means that an earlier input can no longer follow
    while (std::getline(stream, name, ','))
    {
        size_t index = next;
        while (index < kNAMES.size() && name != kNAMES[index])
        {
            ++index;
        }
        if (index == kNAMES.size())
        {
            throw std::invalid_argument("field \"inputs\": found \"" + names + "\", where \"" + name
                + "\" is unknown, repeated or out of order; expected a part of "
                  "\"q,k,v,bias,kv_lengths,q_start,q_lengths,sinks,threshold_scale\" in this order");
        }
        mPosition[index] = mCount;
        mInput[static_cast<size_t>(mCount)] = static_cast<Input>(index);
        ++mCount;
        next = index + 1;
    }
    for (Input required : {Input::kQ, Input::kK, Input::kV})
    {
        if (position(required) < 0)
        {
            throw std::invalid_argument("field \"inputs\": found \"" + names + "\", where the required input \""
                + inputName(required) + "\" is missing");
        }
    }
}

} // namespace blockskip
