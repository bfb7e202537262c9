/* From what TensorRT knows about a layer (fields, dimensions, types) to one call of the kernel library. */
#ifndef BLOCKSKIP_ATTENTION_CALL_H
#define BLOCKSKIP_ATTENTION_CALL_H

#include "attention_fields.h"
#include "attention_inputs.h"
#include "block_skip_attention.h"

#include <NvInferRuntime.h>

#include <vector>

namespace blockskip
{

/* The parameters of a call; its pointers only say what is present until bindTensors sets them. Throws
 * std::invalid_argument naming the tensor whose rank, size or type contradicts the contract. Every dimension must be
 * known. `in` holds `inputs.count()` tensors. */
bsa_params describeCall(
    AttentionFields const& fields, AttentionInputs const& inputs, nvinfer1::PluginTensorDesc const* in);

/* Throws std::invalid_argument with the kernel library's reason where it has no kernel for the call. */
void requireKernel(bsa_params const& params);

/* Sets the pointers; `out` holds o, and counts where params has them; `workspace` holds bsa_workspace_size(params) bytes. */
void bindTensors(
    bsa_params& params, AttentionInputs const& inputs, void const* const* in, void* const* out, void* workspace);

/* The calls of a profile on which its memory need and its support are judged: every combination of the smallest, the
 * best and the largest batch and lengths, and of the few query rows at which kernels change over. A dimension is
 * nowhere larger than in `max`. */
std::vector<bsa_params> sampleCalls(AttentionFields const& fields, AttentionInputs const& inputs,
    nvinfer1::DynamicPluginTensorDesc const* in);

} // namespace blockskip

#endif
