#include "cuda_driver.h"

#include <dlfcn.h>
#include <stdexcept>

namespace host
{

namespace
{

void* driverSymbol(char const* name)
{
    static void* const sLibrary = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (sLibrary == nullptr)
    {
        throw std::runtime_error("libcuda.so.1 cannot be opened: there is no NVIDIA driver on this machine");
    }
    void* address = dlsym(sLibrary, name);
    if (address == nullptr)
    {
        throw std::runtime_error(std::string{"the driver does not have "} + name);
    }
    return address;
}

void check(CUresult result, char const* what)
{
    if (result != CUDA_SUCCESS)
    {
        char const* words = nullptr;
        reinterpret_cast<CUresult (*)(CUresult, char const**)>(driverSymbol("cuGetErrorString"))(result, &words);
        throw std::runtime_error(std::string{what} + ": " + (words == nullptr ? "unknown error" : words));
    }
}

/* cuda.h maps the plain names to the current entry points (cuMemAlloc to cuMemAlloc_v2), which NAME's expansion keeps. */
#define BLOCKSKIP_TEXT(name) #name
#define BLOCKSKIP_NAME(name) BLOCKSKIP_TEXT(name)
#define BLOCKSKIP_CALL(name, ...)                                                                                      \
    check(reinterpret_cast<decltype(&name)>(driverSymbol(BLOCKSKIP_NAME(name)))(__VA_ARGS__), #name)

} // namespace

Gpu::Gpu()
{
    BLOCKSKIP_CALL(cuInit, 0);
    BLOCKSKIP_CALL(cuDeviceGet, &mDevice, 0);
    BLOCKSKIP_CALL(cuDevicePrimaryCtxRetain, &mContext, mDevice);
    makeCurrent();
}

void Gpu::makeCurrent() const
{
    BLOCKSKIP_CALL(cuCtxSetCurrent, mContext);
}

void Gpu::synchronize() const
{
    BLOCKSKIP_CALL(cuCtxSynchronize);
}

std::string Gpu::name() const
{
    char text[128]{};
    BLOCKSKIP_CALL(cuDeviceGetName, text, sizeof text, mDevice);
    return text;
}

Buffer::Buffer(size_t bytes)
    : mBytes(bytes)
{
    if (bytes > 0)
    {
        BLOCKSKIP_CALL(cuMemAlloc, &mAddress, bytes);
    }
}

Buffer::Buffer(Buffer&& other) noexcept
    : mAddress(other.mAddress)
    , mBytes(other.mBytes)
{
    other.mAddress = 0;
}

Buffer::~Buffer()
{
    if (mAddress != 0)
    {
        reinterpret_cast<decltype(&cuMemFree)>(driverSymbol(BLOCKSKIP_NAME(cuMemFree)))(mAddress);
    }
}

void Buffer::upload(std::vector<char> const& bytes)
{
    if (bytes.size() != mBytes)
    {
        throw std::runtime_error(
            "found " + std::to_string(bytes.size()) + " bytes for a buffer of " + std::to_string(mBytes));
    }
    BLOCKSKIP_CALL(cuMemcpyHtoD, mAddress, bytes.data(), mBytes);
}

std::vector<char> Buffer::download() const
{
    std::vector<char> bytes(mBytes);
    BLOCKSKIP_CALL(cuMemcpyDtoH, bytes.data(), mAddress, mBytes);
    return bytes;
}

void Buffer::fill(unsigned char value)
{
    BLOCKSKIP_CALL(cuMemsetD8, mAddress, value, mBytes);
}

Stream::Stream()
{
    BLOCKSKIP_CALL(cuStreamCreate, &mStream, CU_STREAM_NON_BLOCKING);
    for (CUevent& event : mEvents)
    {
        BLOCKSKIP_CALL(cuEventCreate, &event, CU_EVENT_DEFAULT);
    }
}

Stream::~Stream()
{
    for (CUevent event : mEvents)
    {
        reinterpret_cast<decltype(&cuEventDestroy)>(driverSymbol(BLOCKSKIP_NAME(cuEventDestroy)))(event);
    }
    reinterpret_cast<decltype(&cuStreamDestroy)>(driverSymbol(BLOCKSKIP_NAME(cuStreamDestroy)))(mStream);
}

void Stream::synchronize() const
{
    BLOCKSKIP_CALL(cuStreamSynchronize, mStream);
}

void Stream::beginCapture()
{
    // Thread-local would hide a forbidden call made by another thread.
    BLOCKSKIP_CALL(cuStreamBeginCapture, mStream, CU_STREAM_CAPTURE_MODE_GLOBAL);
}

CUgraphExec Stream::endCapture()
{
    CUgraph graph = nullptr;
    CUgraphExec executable = nullptr;
    BLOCKSKIP_CALL(cuStreamEndCapture, mStream, &graph);
    BLOCKSKIP_CALL(cuGraphInstantiateWithFlags, &executable, graph, 0);
    BLOCKSKIP_CALL(cuGraphDestroy, graph);
    return executable;
}

void Stream::launch(CUgraphExec graph)
{
    BLOCKSKIP_CALL(cuGraphLaunch, graph, mStream);
}

void Stream::mark(int32_t which)
{
    BLOCKSKIP_CALL(cuEventRecord, mEvents[which], mStream);
}

float Stream::elapsed()
{
    float milliseconds = 0.0F;
    BLOCKSKIP_CALL(cuEventSynchronize, mEvents[1]);
    BLOCKSKIP_CALL(cuEventElapsedTime, &milliseconds, mEvents[0], mEvents[1]);
    return milliseconds;
}

void destroyGraph(CUgraphExec graph)
{
    BLOCKSKIP_CALL(cuGraphExecDestroy, graph);
}

} // namespace host
