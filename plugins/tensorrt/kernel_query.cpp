/* One question without TensorRT: do the kernels serve this node at these shapes? The engine builder asks it before a
 * build that would only find out after minutes; the answer is what onShapeChange would say. */

#include "attention_call.h"

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <exception>

/* 1 if the node's kernels exist, else 0 with the reason in `reason` (always terminated). `in` holds one description
 * per input of the node, with every dimension known. Thread-safe; needs no GPU. */
extern "C" __attribute__((visibility("default"))) int32_t blockskipSupports(
    nvinfer1::PluginFieldCollection const* fields, nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, char* reason,
    size_t reasonSize) noexcept
{
    auto const answer = [&](char const* text) {
        if (reason != nullptr && reasonSize > 0)
        {
            size_t const length = std::min(std::strlen(text), reasonSize - 1);
            std::memcpy(reason, text, length);
            reason[length] = '\0';
        }
    };
    try
    {
        blockskip::AttentionFields const parsed = blockskip::parseFields(fields, false);
        blockskip::AttentionInputs const inputs{parsed.inputs};
        if (nbInputs != inputs.count())
        {
            answer("the number of inputs differs from the names in the attribute \"inputs\"");
            return 0;
        }
        blockskip::requireKernel(blockskip::describeCall(parsed, inputs, in));
        answer("");
        return 1;
    }
    catch (std::exception const& error)
    {
        answer(error.what());
    }
    catch (...)
    {
        answer("unknown exception");
    }
    return 0;
}
