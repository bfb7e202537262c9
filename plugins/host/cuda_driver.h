/* The few driver calls the host needs, from libcuda opened at run time; every failure throws with the driver's words. */
#ifndef BLOCKSKIP_CUDA_DRIVER_H
#define BLOCKSKIP_CUDA_DRIVER_H

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace host
{

/* Opens the driver and makes the first GPU's primary context current in this thread. */
class Gpu
{
public:
    Gpu();
    Gpu(Gpu const&) = delete;
    Gpu& operator=(Gpu const&) = delete;

    /* For a further thread. */
    void makeCurrent() const;
    void synchronize() const;
    std::string name() const;

private:
    CUdevice mDevice{0};
    CUcontext mContext{nullptr};
};

/* Device memory; freed with the object. */
class Buffer
{
public:
    explicit Buffer(size_t bytes);
    Buffer(Buffer&& other) noexcept;
    Buffer(Buffer const&) = delete;
    ~Buffer();

    void* pointer() const
    {
        return reinterpret_cast<void*>(mAddress);
    }
    void upload(std::vector<char> const& bytes);
    std::vector<char> download() const;
    void fill(unsigned char value);

private:
    CUdeviceptr mAddress{0};
    size_t mBytes{0};
};

/* A non-blocking stream, with capture and timing. */
class Stream
{
public:
    Stream();
    Stream(Stream const&) = delete;
    ~Stream();

    CUstream handle() const
    {
        return mStream;
    }
    void synchronize() const;
    void beginCapture();
    CUgraphExec endCapture();
    void launch(CUgraphExec graph);

    /* Milliseconds on the GPU between the two calls of `mark`. */
    void mark(int32_t which);
    float elapsed();

private:
    CUstream mStream{nullptr};
    CUevent mEvents[2]{};
};

void destroyGraph(CUgraphExec graph);

} // namespace host

#endif
