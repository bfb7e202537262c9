#include "walk_run.h"

#include "tensorrt_side.h"
#include "walk_build.h"

#include <array>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <thread>

namespace host
{

using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;

namespace
{

constexpr unsigned char kPOISON = 0xFF; // a NaN in every floating-point type, -1 in counts
constexpr int32_t kREPLAYS = 20;

void require(bool condition, std::string const& what)
{
    if (!condition)
    {
        throw std::runtime_error(what);
    }
}

std::vector<char> readFile(std::string const& path)
{
    std::ifstream file{path, std::ios::binary};
    require(static_cast<bool>(file), "cannot read " + path);
    return {std::istreambuf_iterator<char>{file}, {}};
}

void writeFile(std::string const& path, std::vector<char> const& bytes)
{
    std::ofstream file{path, std::ios::binary};
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    require(static_cast<bool>(file), "cannot write " + path);
}

Plugin attach(nvinfer1::IPluginV3& plugin, Context& context)
{
    Plugin attached{runtimeOf(plugin).attachToContext(&context)};
    require(attached != nullptr, "attachToContext failed");
    require(attached.get() != &plugin, "attachToContext returned the plugin itself, not a clone");
    return attached;
}

void changeShape(nvinfer1::IPluginV3& plugin, Profile const& profile, Dims Tensor::*shape)
{
    std::vector<PluginTensorDesc> const in = describe(profile.inputs, shape);
    std::vector<PluginTensorDesc> const out = describe(profile.outputs, shape);
    require(runtimeOf(plugin).onShapeChange(in.data(), static_cast<int32_t>(in.size()), out.data(),
                static_cast<int32_t>(out.size()))
            == 0,
        "onShapeChange failed");
}

/* One execution context: a plugin of its own, outputs and workspace of its own, inputs shared. */
class Execution
{
public:
    Execution(nvinfer1::IPluginV3& plugin, Profile const& profile, std::vector<Buffer> const& inputs, size_t workspace)
        : mPlugin(attach(plugin, mContext))
        , mIn(describe(profile.inputs, &Tensor::opt))
        , mOut(describe(profile.outputs, &Tensor::opt))
        , mWorkspace(workspace)
    {
        for (Buffer const& input : inputs)
        {
            mInputs.push_back(input.pointer());
        }
        for (Tensor const& output : profile.outputs)
        {
            mBuffers.emplace_back(output.bytes());
            mOutputs.push_back(mBuffers.back().pointer());
        }
        changeShape(*mPlugin, profile, &Tensor::opt);
        poison();
        if (workspace > 0)
        {
            mWorkspace.fill(kPOISON); // nothing may be assumed about it
        }
    }

    void poison()
    {
        for (Buffer& buffer : mBuffers)
        {
            buffer.fill(kPOISON);
        }
    }

    void enqueue()
    {
        require(runtimeOf(*mPlugin).enqueue(mIn.data(), mOut.data(), mInputs.data(), mOutputs.data(),
                    mWorkspace.pointer(), reinterpret_cast<cudaStream_t>(stream.handle()))
                == 0,
            "enqueue failed");
    }

    std::vector<std::vector<char>> results() const
    {
        std::vector<std::vector<char>> all;
        for (Buffer const& buffer : mBuffers)
        {
            all.push_back(buffer.download());
        }
        return all;
    }

    Stream stream;

private:
    Context mContext;
    Plugin mPlugin;
    std::vector<PluginTensorDesc> mIn, mOut;
    std::vector<void const*> mInputs;
    std::vector<Buffer> mBuffers;
    std::vector<void*> mOutputs;
    Buffer mWorkspace;
};

/* Both contexts at once; an exception of a thread is thrown here. */
void enqueueTogether(std::array<Execution*, 2> const& executions, Gpu const& gpu)
{
    std::array<std::exception_ptr, 2> failures;
    std::array<std::thread, 2> threads;
    for (size_t i = 0; i < threads.size(); ++i)
    {
        threads[i] = std::thread{[&, i] {
            try
            {
                gpu.makeCurrent();
                executions[i]->enqueue();
                executions[i]->stream.synchronize();
            }
            catch (...)
            {
                failures[i] = std::current_exception();
            }
        }};
    }
    for (std::thread& thread : threads)
    {
        thread.join();
    }
    for (std::exception_ptr const& failure : failures)
    {
        if (failure)
        {
            std::rethrow_exception(failure);
        }
    }
}

} // namespace

void walkShapes(nvinfer1::IPluginV3& plugin, Profile const& profile)
{
    Context context;
    Plugin const attached = attach(plugin, context);
    for (Dims Tensor::*shape : {&Tensor::min, &Tensor::opt, &Tensor::max})
    {
        changeShape(*attached, profile, shape);
    }
}

void enqueueOnce(nvinfer1::IPluginV3& plugin, Profile const& profile, void const* const* inputs, void* const* outputs,
    void* workspace, cudaStream_t stream)
{
    Context context;
    Plugin const attached = attach(plugin, context);
    changeShape(*attached, profile, &Tensor::opt);
    std::vector<PluginTensorDesc> const in = describe(profile.inputs, &Tensor::opt);
    std::vector<PluginTensorDesc> const out = describe(profile.outputs, &Tensor::opt);
    require(runtimeOf(*attached).enqueue(in.data(), out.data(), inputs, outputs, workspace, stream) == 0,
        "enqueue failed");
}

float walkGpu(nvinfer1::IPluginV3& plugin, Node const& node, Profile const& profile, size_t workspace, Gpu& gpu,
    std::string const& directory)
{
    std::vector<Buffer> inputs;
    for (Tensor const& tensor : profile.inputs)
    {
        inputs.emplace_back(tensor.bytes());
        inputs.back().upload(readFile(tensor.data));
    }
    Execution first{plugin, profile, inputs, workspace};
    Execution second{plugin, profile, inputs, workspace};
    gpu.synchronize();
    enqueueTogether({&first, &second}, gpu);
    std::vector<std::vector<char>> const eager = first.results();
    require(eager == second.results(), "two contexts on two streams gave different bits");

    first.poison();
    gpu.synchronize();
    first.stream.beginCapture();
    first.enqueue();
    CUgraphExec const graph = first.stream.endCapture();
    first.stream.launch(graph);
    first.stream.synchronize();
    require(first.results() == eager, "the replayed graph gave different bits");

    first.stream.mark(0);
    for (int32_t i = 0; i < kREPLAYS; ++i)
    {
        first.stream.launch(graph);
    }
    first.stream.mark(1);
    float const milliseconds = first.stream.elapsed() / static_cast<float>(kREPLAYS);
    destroyGraph(graph);
    for (size_t i = 0; i < eager.size(); ++i)
    {
        writeFile(directory + "/" + node.name + "." + profile.name + "." + profile.outputs[i].name + ".bin", eager[i]);
    }
    return milliseconds;
}

} // namespace host
