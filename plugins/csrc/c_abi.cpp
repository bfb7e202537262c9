// The C ABI: checks a call, chooses its kernels, and enqueues one or two of them.

#include "device.h"
#include "driver.h"
#include "failure.h"
#include "launch.h"
#include "select.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

namespace {

using bsa::Choice;
using bsa::Driver;
using bsa::fail;
using bsa::failCuda;
using bsa::Kernel;
using bsa::Share;

constexpr char const* kVERSION = "{\"version\": \"1.0.0\", \"abi\": 1, \"architectures\": [\"sm_90a\"]}";
constexpr std::size_t kWORKSPACE_BYTES = 256; // the work counter of each of at most two launches

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
        status = bsa::launchKernel(
            *driver, *device, *choice.sparse, params, both ? Share::kSPARSE : Share::kALL, counters, stream);
    }
    if (status == BSA_OK && choice.dense != nullptr)
    {
        status = bsa::launchKernel(
            *driver, *device, *choice.dense, params, both ? Share::kDENSE : Share::kALL, counters + 32, stream);
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
            words = bsa::lastFailure();
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
    return bsa::lastFailure().c_str();
}

} // extern "C"
