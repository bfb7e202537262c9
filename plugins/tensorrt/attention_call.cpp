#include "attention_call.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

namespace blockskip
{

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

namespace
{

/* As the op contract writes a dimension: full size. */
struct Sizes
{
    int64_t batch, headsQ, headsK, seqQ, seqK, dim, dimV;
};

std::string show(Dims const& dims)
{
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

[[noreturn]] void refuse(Input input, Dims const& dims, std::string const& expected)
{
    throw std::invalid_argument(
        std::string{"input \""} + inputName(input) + "\": found shape " + show(dims) + ", expected " + expected);
}

void expect(Input input, Dims const& dims, std::initializer_list<int64_t> sizes, char const* names)
{
    bool same = dims.nbDims == static_cast<int32_t>(sizes.size());
    for (int32_t i = 0; same && i < dims.nbDims; ++i)
    {
        same = dims.d[i] == *(sizes.begin() + i);
    }
    if (!same)
    {
        std::string text;
        for (int64_t size : sizes)
        {
            text += (text.empty() ? "" : ", ") + std::to_string(size);
        }
        refuse(input, dims, std::string{names} + " = [" + text + "]");
    }
}

int32_t narrow(int64_t size)
{
    if (size < 0 || size > INT32_MAX)
    {
        throw std::invalid_argument("a dimension of " + std::to_string(size) + " does not fit 32 bits");
    }
    return static_cast<int32_t>(size);
}

/* Row-major [B, H, S, D]: strides of batch, head and sequence in elements. */
void setLinear(int64_t (&stride)[3], int64_t heads, int64_t seq, int64_t dim)
{
    stride[0] = heads * seq * dim;
    stride[1] = seq * dim;
    stride[2] = dim;
}

/* A dimension of size 1 is broadcast: stride 0. */
void setBroadcast(int64_t (&stride)[4], Dims const& dims)
{
    int64_t step = 1;
    for (int32_t i = 3; i >= 0; --i)
    {
        stride[i] = dims.d[i] == 1 ? 0 : step;
        step *= dims.d[i];
    }
}

int32_t kernelType(DataType type)
{
    switch (type)
    {
    case DataType::kHALF: return BSA_FLOAT16;
    case DataType::kBF16: return BSA_BFLOAT16;
    default:
        throw std::invalid_argument("input \"q\": the kernels compute in float16 or bfloat16; export the model with one "
                                    "of these types");
    }
}

Sizes readSizes(AttentionInputs const& inputs, PluginTensorDesc const* in)
{
    auto const dims = [&](Input input) -> Dims const& { return in[inputs.position(input)].dims; };
    for (Input input : {Input::kQ, Input::kK, Input::kV})
    {
        if (dims(input).nbDims != 4)
        {
            refuse(input, dims(input), "rank 4");
        }
    }
    Dims const& q = dims(Input::kQ);
    Dims const& k = dims(Input::kK);
    Dims const& v = dims(Input::kV);
    Sizes const s{q.d[0], q.d[1], k.d[1], q.d[2], k.d[2], q.d[3], v.d[3]};
    expect(Input::kK, k, {s.batch, s.headsK, s.seqK, s.dim}, "[B, Hk, Sk, D]");
    expect(Input::kV, v, {s.batch, s.headsK, s.seqK, s.dimV}, "[B, Hk, Sk, Dv]");
    if (s.headsK < 1 || s.headsQ % s.headsK != 0)
    {
        refuse(Input::kK, k, "a number of heads that divides the " + std::to_string(s.headsQ) + " heads of q");
    }
    return s;
}

void setBias(bsa_params& params, PluginTensorDesc const& bias, Sizes const& s)
{
    std::array<int64_t, 4> const full{s.batch, s.headsQ, s.seqQ, s.seqK};
    bool fits = bias.dims.nbDims == 4;
    for (size_t i = 0; fits && i < full.size(); ++i)
    {
        fits = bias.dims.d[i] == full[i] || bias.dims.d[i] == 1;
    }
    if (!fits)
    {
        refuse(Input::kBIAS, bias.dims, "rank 4, each dimension 1 or that of [B, Hq, Sq, Sk]");
    }
    params.bias_kind = bias.type == DataType::kBOOL ? BSA_BIAS_BOOL : BSA_BIAS_ADDITIVE;
    setBroadcast(params.bias_stride, bias.dims);
}

/* Support and workspace depend on which tensors a call has, not on where they are: an address that is never read. */
void markPresent(bsa_params& params, AttentionFields const& fields, AttentionInputs const& inputs)
{
    alignas(256) static char sNowhere[256];
    std::array<void const*, kINPUT_COUNT> present;
    present.fill(sNowhere);
    std::array<void*, 2> outputs{sNowhere, sNowhere};
    params.counts = fields.hasCounts() ? reinterpret_cast<int32_t*>(sNowhere) : nullptr;
    bindTensors(params, inputs, present.data(), outputs.data(), nullptr);
}

void setThreshold(bsa_params& params, AttentionFields const& fields)
{
    bool const isDecode = params.seq_q == 1;
    PhaseThreshold const& phase = isDecode ? fields.decode : fields.prefill;
    params.threshold = phase.threshold;
    params.threshold_factor = phase.factor();
    params.br = isDecode ? 1 : fields.br; // rule: a decode call decides per single row
    params.bc = fields.bc;
}

} // namespace

bsa_params describeCall(AttentionFields const& fields, AttentionInputs const& inputs, PluginTensorDesc const* in)
{
    Sizes const s = readSizes(inputs, in);
    bsa_params params;
    bsa_params_init(&params);
    params.batch = narrow(s.batch);
    params.heads_q = narrow(s.headsQ);
    params.heads_k = narrow(s.headsK);
    params.seq_q = narrow(s.seqQ);
    params.seq_k = narrow(s.seqK);
    params.head_dim = narrow(s.dim);
    params.head_dim_v = narrow(s.dimV);
    params.dtype = kernelType(in[inputs.position(Input::kQ)].type);
    setLinear(params.q_stride, s.headsQ, s.seqQ, s.dim);
    setLinear(params.k_stride, s.headsK, s.seqK, s.dim);
    setLinear(params.v_stride, s.headsK, s.seqK, s.dimV);
    setLinear(params.o_stride, s.headsQ, s.seqQ, s.dimV);
    for (int32_t i = inputs.position(Input::kV) + 1; i < inputs.count(); ++i)
    {
        Dims const& dims = in[i].dims;
        switch (Input const input = inputs.at(i))
        {
        case Input::kBIAS: setBias(params, in[i], s); break;
        case Input::kSINKS: expect(input, dims, {s.headsQ}, "[Hq]"); break;
        case Input::kTHRESHOLD_SCALE: expect(input, dims, {1}, "[1]"); break;
        default: expect(input, dims, {s.batch}, "[B]"); break;
        }
    }
    params.scale = fields.scale;
    params.softcap = fields.softcap;
    params.is_causal = fields.isCausal;
    params.window = fields.window;
    params.unit = fields.unit == "group" ? BSA_UNIT_GROUP : BSA_UNIT_HEAD;
    setThreshold(params, fields);
    markPresent(params, fields, inputs);
    return params;
}

void requireKernel(bsa_params const& params)
{
    std::array<char, 512> reason{};
    if (bsa_supported(&params, reason.data(), reason.size()) == 0)
    {
        throw std::invalid_argument(std::string{"no kernel for this call: "} + reason.data());
    }
}

void bindTensors(
    bsa_params& params, AttentionInputs const& inputs, void const* const* in, void* const* out, void* workspace)
{
    auto const given = [&](Input input) -> void const* {
        int32_t const position = inputs.position(input);
        return position < 0 ? nullptr : in[position];
    };
    params.q = given(Input::kQ);
    params.k = given(Input::kK);
    params.v = given(Input::kV);
    params.bias = given(Input::kBIAS);
    params.sinks = given(Input::kSINKS);
    params.kv_lengths = static_cast<int32_t const*>(given(Input::kKV_LENGTHS));
    params.q_start = static_cast<int32_t const*>(given(Input::kQ_START));
    params.q_lengths = static_cast<int32_t const*>(given(Input::kQ_LENGTHS));
    params.threshold_scale = static_cast<float const*>(given(Input::kTHRESHOLD_SCALE));
    params.o = out[0];
    params.counts = params.counts == nullptr ? nullptr : static_cast<int32_t*>(out[1]);
    params.workspace = workspace;
    params.workspace_bytes = bsa_workspace_size(&params);
}

std::vector<bsa_params> sampleCalls(
    AttentionFields const& fields, AttentionInputs const& inputs, DynamicPluginTensorDesc const* in)
{
    DynamicPluginTensorDesc const& q = in[inputs.position(Input::kQ)];
    DynamicPluginTensorDesc const& k = in[inputs.position(Input::kK)];
    auto const candidates = [](DynamicPluginTensorDesc const& tensor, int32_t axis, std::vector<int64_t> extra) {
        int64_t const low = std::max<int64_t>(tensor.min.d[axis], 1);
        int64_t const high = std::max<int64_t>(tensor.max.d[axis], low);
        extra.insert(extra.end(), {low, std::clamp(tensor.opt.d[axis], low, high), high});
        extra.erase(std::remove_if(extra.begin(), extra.end(), [&](int64_t n) { return n < low || n > high; }),
            extra.end());
        std::sort(extra.begin(), extra.end());
        extra.erase(std::unique(extra.begin(), extra.end()), extra.end());
        return extra;
    };
    std::vector<bsa_params> calls;
    for (int64_t batch : candidates(q, 0, {}))
    {
        // The scratch memory of a decode call is no monotone function of its rows: heads that share K and V fill the
        // lanes of an item as far as they divide them. So every number of rows that may be decoded is asked about.
        for (int64_t seqQ : candidates(q, 2, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 64, 128}))
        {
            for (int64_t seqK : candidates(k, 2, {}))
            {
                std::vector<PluginTensorDesc> tensors;
                for (int32_t i = 0; i < inputs.count(); ++i)
                {
                    tensors.push_back(in[i].desc);
                    Dims& dims = tensors.back().dims;
                    dims = in[i].max;
                    // Everything else of a tensor (heads, head size) is taken at its largest.
                    switch (inputs.at(i))
                    {
                    case Input::kQ: dims.d[0] = batch; dims.d[2] = seqQ; break;
                    case Input::kK:
                    case Input::kV: dims.d[0] = batch; dims.d[2] = seqK; break;
                    case Input::kBIAS:
                        dims.d[0] = dims.d[0] == 1 ? 1 : batch;
                        dims.d[2] = dims.d[2] == 1 ? 1 : seqQ;
                        dims.d[3] = dims.d[3] == 1 ? 1 : seqK;
                        break;
                    case Input::kKV_LENGTHS:
                    case Input::kQ_START:
                    case Input::kQ_LENGTHS: dims.d[0] = batch; break;
                    default: break;
                    }
                }
                calls.push_back(describeCall(fields, inputs, tensors.data()));
            }
        }
    }
    return calls;
}

} // namespace blockskip
