// The C ABI: checks a call, encodes its tensor maps, and enqueues one or two kernels.

#include "device.h"
#include "driver.h"
#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

namespace {

using bsa::Choice;
using bsa::Driver;
using bsa::Kernel;
using bsa::TensorMap;

constexpr char const* kVERSION = "{\"version\": \"1.0.0\", \"abi\": 1, \"architectures\": [\"sm_90a\"]}";
constexpr std::size_t kWORKSPACE_BYTES = 256; // the work counter of each of at most two launches
constexpr double kLOG2_E = 1.4426950408889634;
constexpr std::int64_t kL2_BYTES = 24'000'000; // K and V of the heads worked on together; half of an H100's L2
constexpr std::int64_t kCAUSAL_HEADS = 4;      // and at most so many, see README.md

thread_local std::string gLastError;

bsa_status fail(bsa_status status, std::string words)
{
    gLastError = std::move(words);
    return status;
}

bsa_status failCuda(Driver const& driver, char const* what, bsa::CudaResult code)
{
    char const* words = nullptr;
    driver.cuGetErrorString(code, &words);
    return fail(BSA_ERROR_CUDA, std::string(what) + ": " + (words != nullptr ? words : "unknown error"));
}

// Bits of the kernels' argument `given`; hopper_common.py has the same list.
enum Given : std::int32_t
{
    kKV_LENGTHS = 1,
    kQ_START = 2,
    kQ_LENGTHS = 4,
    kTHRESHOLD_SCALE = 8,
    kSINKS = 16,
    kCOUNTS = 32,
    kLSE = 64,
    kCOUNTER = 128,
    kADDITIVE_BIAS = 256,
    kBOOL_BIAS = 512,
    kRUN_WHERE_DENSE = 1024,
    kRUN_WHERE_SPARSE = 2048,
    kIS_CAUSAL = 4096,
    kCOUNTS_128_ROWS = 8192,
};

bool encode(Driver const& driver, TensorMap& map, void const* address, int dtype, std::int64_t const stride[3],
    int batch, int heads, int sequence, int columns, int boxRows, int boxColumns, bsa::CudaResult& code)
{
    std::uint64_t const sizes[4] = {static_cast<std::uint64_t>(columns), static_cast<std::uint64_t>(sequence),
        static_cast<std::uint64_t>(heads), static_cast<std::uint64_t>(batch)};
    // A dimension of one element may come with any stride, also one the encoder refuses.
    std::int64_t const packed = (columns + 7) / 8 * 16;
    auto bytes = [packed](std::int64_t elements, int size) {
        return static_cast<std::uint64_t>(size <= 1 ? packed : elements * 2);
    };
    std::uint64_t const strides[3] = {bytes(stride[2], sequence), bytes(stride[1], heads), bytes(stride[0], batch)};
    std::uint32_t const box[4] = {static_cast<std::uint32_t>(boxColumns), static_cast<std::uint32_t>(boxRows), 1, 1};
    std::uint32_t const ones[4] = {1, 1, 1, 1};
    int const type = dtype == BSA_FLOAT16 ? bsa::kTENSOR_MAP_FLOAT16 : bsa::kTENSOR_MAP_BFLOAT16;
    code = driver.cuTensorMapEncodeTiled(&map, type, 4, const_cast<void*>(address), sizes, strides, box, ones, 0,
        bsa::kTENSOR_MAP_SWIZZLE_128B, bsa::kTENSOR_MAP_L2_PROMOTION_256B, 0);
    return code == bsa::kCUDA_SUCCESS;
}

// The kernels' arguments in their order: four tensor maps, each followed by sizes and strides the kernels do not read,
// then POINTERS and SCALARS of build_kernels.py, then two pointers of Triton's own that stay null.
class Arguments {
public:
    template <typename T>
    void add(T& value)
    {
        mPointers[mCount++] = &value;
    }

    void addMap(TensorMap& map)
    {
        add(map);
        for (int i = 0; i < 4; ++i)
        {
            add(mZero32);
        }
        for (int i = 0; i < 4; ++i)
        {
            add(mZero64);
        }
    }

    void addScratch()
    {
        add(mZero64);
        add(mZero64);
    }

    void** data()
    {
        return mPointers;
    }

private:
    void* mPointers[80]{};
    int mCount{0};
    std::int32_t mZero32{0};
    std::int64_t mZero64{0};
};

bsa_status launchOne(Driver const& driver, bsa::Device& device, Kernel const& kernel, bsa_params const& p, int extra,
    std::uint32_t* counter, void* stream)
{
    bsa::CudaFunction function = nullptr;
    std::string why;
    if (!device.function(driver, kernel, function, why))
    {
        return fail(BSA_ERROR_CUDA, why);
    }

    TensorMap maps[4];
    bsa::CudaResult code = bsa::kCUDA_SUCCESS;
    // No keys at all: the maps still need an address. What is read through them is masked.
    int const keys = std::max(p.seq_k, 1);
    void const* const k = p.seq_k > 0 ? p.k : p.o;
    void const* const v = p.seq_k > 0 ? p.v : p.o;
    bool const encoded = encode(driver, maps[0], p.q, p.dtype, p.q_stride, p.batch, p.heads_q, p.seq_q, p.head_dim,
                             kernel.boxRows[0], kernel.boxColumns[0], code)
        && encode(driver, maps[1], k, p.dtype, p.k_stride, p.batch, p.heads_k, keys, p.head_dim, kernel.boxRows[1],
            kernel.boxColumns[1], code)
        && encode(driver, maps[2], v, p.dtype, p.v_stride, p.batch, p.heads_k, keys, p.head_dim_v, kernel.boxRows[2],
            kernel.boxColumns[2], code)
        && encode(driver, maps[3], p.o, p.dtype, p.o_stride, p.batch, p.heads_q, p.seq_q, p.head_dim_v,
            kernel.boxRows[3], kernel.boxColumns[3], code);
    if (!encoded)
    {
        return failCuda(driver, "cuTensorMapEncodeTiled", code);
    }

    std::int32_t group = p.heads_q / p.heads_k;
    std::int32_t headsQ = p.heads_q;
    std::int32_t seqQ = p.seq_q;
    std::int32_t seqK = p.seq_k;
    std::int32_t rowBlocks = (p.seq_q + kernel.rows - 1) / kernel.rows;
    std::int32_t heads = p.batch * p.heads_q;
    std::int64_t const bytesPerHead = std::max<std::int64_t>(4LL * p.seq_k * kernel.head, 1);
    std::int32_t section = static_cast<std::int32_t>(std::clamp<std::int64_t>(kL2_BYTES / bytesPerHead, 1, heads));
    if (p.seq_k > 4096)
    {
        section = static_cast<std::int32_t>(std::min<std::int64_t>(section, kCAUSAL_HEADS));
    }
    std::int64_t const items = static_cast<std::int64_t>(rowBlocks) * heads;
    if (items > 0x7fffffff)
    {
        return fail(BSA_ERROR_UNSUPPORTED, "more than 2^31 blocks of query rows");
    }

    std::int32_t given = extra;
    given |= p.kv_lengths != nullptr ? kKV_LENGTHS : 0;
    given |= p.q_start != nullptr ? kQ_START : 0;
    given |= p.q_lengths != nullptr ? kQ_LENGTHS : 0;
    given |= p.threshold_scale != nullptr ? kTHRESHOLD_SCALE : 0;
    given |= p.sinks != nullptr ? kSINKS : 0;
    given |= p.counts != nullptr ? kCOUNTS : 0;
    given |= p.lse != nullptr ? kLSE : 0;
    given |= p.is_causal != 0 ? kIS_CAUSAL : 0;
    given |= p.br == 128 ? kCOUNTS_128_ROWS : 0;
    given |= p.bias_kind == BSA_BIAS_ADDITIVE ? kADDITIVE_BIAS : 0;
    given |= p.bias_kind == BSA_BIAS_BOOL ? kBOOL_BIAS : 0;

    unsigned const grid = static_cast<unsigned>(std::min<std::int64_t>(items, device.multiprocessors()));
    if (items > grid && (kernel.role != 'd' || kernel.causal))
    {
        // uneven work: the CTAs take items from a counter; even work is dealt out in turn and needs none
        given |= kCOUNTER;
        code = driver.cuMemsetD32Async(reinterpret_cast<std::uint64_t>(counter), 0, 1, stream);
        if (code != bsa::kCUDA_SUCCESS)
        {
            return failCuda(driver, "cuMemsetD32Async", code);
        }
    }

    float scaleLog2 = static_cast<float>(p.scale * kLOG2_E);
    float threshold = p.threshold;
    float thresholdFactor = p.threshold_factor;
    std::int32_t window = p.window;
    float softcapLog2 = static_cast<float>(p.softcap * kLOG2_E);
    float softcapRate = p.softcap > 0.0F ? static_cast<float>(2.0 * kLOG2_E * p.scale / p.softcap) : 0.0F;
    bsa_params pointers = p;
    std::int64_t biasStride[4] = {p.bias_stride[0], p.bias_stride[1], p.bias_stride[2], p.bias_stride[3]};

    Arguments arguments;
    for (TensorMap& map : maps)
    {
        arguments.addMap(map);
    }
    arguments.add(pointers.kv_lengths);
    arguments.add(pointers.q_start);
    arguments.add(pointers.q_lengths);
    arguments.add(pointers.threshold_scale);
    arguments.add(pointers.sinks);
    arguments.add(pointers.counts);
    arguments.add(pointers.lse);
    arguments.add(counter);
    arguments.add(given);
    arguments.add(headsQ);
    arguments.add(group);
    arguments.add(seqQ);
    arguments.add(seqK);
    arguments.add(rowBlocks);
    arguments.add(heads);
    arguments.add(section);
    arguments.add(scaleLog2);
    arguments.add(threshold);
    arguments.add(thresholdFactor);
    arguments.add(window);
    arguments.add(softcapLog2);
    arguments.add(softcapRate);
    arguments.add(pointers.bias);
    arguments.add(pointers.bias);
    for (std::int64_t& stride : biasStride)
    {
        arguments.add(stride);
    }
    arguments.addScratch();

    code = driver.cuLaunchKernel(function, grid, 1, 1, static_cast<unsigned>(kernel.threads), 1, 1,
        static_cast<unsigned>(kernel.sharedBytes), stream, arguments.data(), nullptr);
    return code == bsa::kCUDA_SUCCESS ? BSA_OK : failCuda(driver, kernel.name, code);
}

bsa_status check(bsa_params const* params)
{
    if (params == nullptr)
    {
        return fail(BSA_ERROR_INVALID_ARGUMENT, "params is null");
    }
    if (params->struct_size != sizeof(bsa_params) || params->abi_version != BSA_ABI_VERSION)
    {
        return fail(BSA_ERROR_INVALID_ARGUMENT,
            "params was not made for this library: struct_size " + std::to_string(params->struct_size) + ", abi_version "
                + std::to_string(params->abi_version) + "; here they are " + std::to_string(sizeof(bsa_params)) + " and "
                + std::to_string(BSA_ABI_VERSION));
    }
    std::string reason;
    return bsa::validate(*params, reason) ? BSA_OK : fail(BSA_ERROR_INVALID_ARGUMENT, reason);
}

// The kernels of a call and the device it runs on.
bsa_status resolve(bsa_params const& params, Choice& choice, Driver const*& driver, bsa::Device*& device)
{
    std::string reason;
    if (!bsa::choose(params, choice, reason))
    {
        return fail(BSA_ERROR_UNSUPPORTED, reason);
    }
    char const* why = "";
    driver = Driver::get(&why);
    if (driver == nullptr)
    {
        return fail(BSA_ERROR_NO_DRIVER, why);
    }
    device = bsa::Device::current(*driver, reason);
    if (device == nullptr)
    {
        return fail(BSA_ERROR_NO_DEVICE, reason);
    }
    if (!device->isHopper())
    {
        return fail(BSA_ERROR_UNSUPPORTED, "the current device has compute capability " + device->capability()
                + "; this library was built for 9.0 (H100, H200)");
    }
    return BSA_OK;
}

bsa_status launch(bsa_params const& params, void* stream)
{
    Choice choice;
    Driver const* driver = nullptr;
    bsa::Device* device = nullptr;
    if (bsa_status const status = resolve(params, choice, driver, device); status != BSA_OK)
    {
        return status;
    }
    if (params.counts != nullptr)
    {
        auto const code = driver->cuMemsetD32Async(
            reinterpret_cast<std::uint64_t>(params.counts), 0, 2 * static_cast<std::size_t>(params.heads_q), stream);
        if (code != bsa::kCUDA_SUCCESS)
        {
            return failCuda(*driver, "cuMemsetD32Async", code);
        }
    }
    if (params.batch == 0 || params.seq_q == 0)
    {
        return BSA_OK;
    }
    if (params.workspace == nullptr || params.workspace_bytes < bsa_workspace_size(&params))
    {
        return fail(BSA_ERROR_WORKSPACE, "workspace has " + std::to_string(params.workspace_bytes) + " bytes, "
                + std::to_string(bsa_workspace_size(&params)) + " are needed");
    }
    auto* counters = static_cast<std::uint32_t*>(params.workspace);
    bool const both = choice.sparse != nullptr && choice.dense != nullptr;
    bsa_status status = BSA_OK;
    if (choice.sparse != nullptr)
    {
        status = launchOne(*driver, *device, *choice.sparse, params, both ? kRUN_WHERE_SPARSE : 0, counters, stream);
    }
    if (status == BSA_OK && choice.dense != nullptr)
    {
        status = launchOne(*driver, *device, *choice.dense, params, both ? kRUN_WHERE_DENSE : 0, counters + 32, stream);
    }
    return status;
}

template <typename Body>
bsa_status guarded(Body const& body) noexcept
{
    try
    {
        return body();
    }
    catch (std::exception const& error)
    {
        return fail(BSA_ERROR_INTERNAL, error.what());
    }
    catch (...)
    {
        return BSA_ERROR_INTERNAL;
    }
}

} // namespace

extern "C" {

void bsa_params_init(bsa_params* params)
{
    if (params == nullptr)
    {
        return;
    }
    std::memset(params, 0, sizeof(*params));
    params->struct_size = sizeof(*params);
    params->abi_version = BSA_ABI_VERSION;
    params->dtype = BSA_BFLOAT16;
    params->br = 128;
    params->bc = 128;
    params->scale = 1.0F;
}

bsa_status bsa_launch(bsa_params const* params, void* stream)
{
    return guarded([&] {
        bsa_status const status = check(params);
        return status == BSA_OK ? launch(*params, stream) : status;
    });
}

bsa_status bsa_prepare(bsa_params const* params)
{
    return guarded([&]() -> bsa_status {
        if (bsa_status const status = check(params); status != BSA_OK)
        {
            return status;
        }
        Choice choice;
        Driver const* driver = nullptr;
        bsa::Device* device = nullptr;
        if (bsa_status const status = resolve(*params, choice, driver, device); status != BSA_OK)
        {
            return status;
        }
        for (Kernel const* kernel : {choice.sparse, choice.dense})
        {
            bsa::CudaFunction function = nullptr;
            std::string why;
            if (kernel != nullptr && !device->function(*driver, *kernel, function, why))
            {
                return fail(BSA_ERROR_CUDA, why);
            }
        }
        return BSA_OK;
    });
}

size_t bsa_workspace_size(bsa_params const* params)
{
    (void) params; // one size for every call, but a caller must not rely on it
    return kWORKSPACE_BYTES;
}

int32_t bsa_supported(bsa_params const* params, char* reason, size_t reasonSize)
{
    std::string words;
    bsa_status const status = guarded([&] {
        bsa_status result = check(params);
        Choice choice;
        if (result != BSA_OK)
        {
            words = gLastError;
        }
        else if (!bsa::choose(*params, choice, words))
        {
            result = BSA_ERROR_UNSUPPORTED;
        }
        else
        {
            char const* why = "";
            std::string none;
            Driver const* driver = Driver::get(&why);
            bsa::Device const* device = driver != nullptr ? bsa::Device::current(*driver, none) : nullptr;
            if (device != nullptr && !device->isHopper())
            {
                words = "the current device has compute capability " + device->capability()
                    + "; this library was built for 9.0 (H100, H200)";
                result = BSA_ERROR_UNSUPPORTED;
            }
        }
        return result;
    });
    if (reason != nullptr && reasonSize > 0)
    {
        std::snprintf(reason, reasonSize, "%s", words.c_str());
    }
    return status == BSA_OK ? 1 : 0;
}

char const* bsa_version(void)
{
    return kVERSION;
}

char const* bsa_status_string(bsa_status status)
{
    switch (status)
    {
    case BSA_OK: return "ok";
    case BSA_ERROR_INVALID_ARGUMENT: return "invalid argument";
    case BSA_ERROR_UNSUPPORTED: return "unsupported";
    case BSA_ERROR_NO_DRIVER: return "no CUDA driver";
    case BSA_ERROR_NO_DEVICE: return "no CUDA device";
    case BSA_ERROR_WORKSPACE: return "workspace too small";
    case BSA_ERROR_CUDA: return "CUDA error";
    case BSA_ERROR_INTERNAL: return "internal error";
    }
    return "unknown status";
}

char const* bsa_last_error(void)
{
    return gLastError.c_str();
}

} // extern "C"
