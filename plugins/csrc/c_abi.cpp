// The C ABI: checks a call, chooses its kernels, and enqueues them.

#include "device.h"
#include "driver.h"
#include "enqueue.h"
#include "failure.h"
#include "find.h"
#include "launch.h"
#include "select.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace {

using bsa::Choice;
using bsa::Driver;
using bsa::fail;
using bsa::Kernel;

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

// The device of the calling thread, or null with the reason in `status` and `words`.
bsa::Device* currentDevice(Driver const*& driver, bsa_status& status, std::string& words)
{
    char const* why = "";
    driver = Driver::get(&why);
    if (driver == nullptr)
    {
        status = BSA_ERROR_NO_DRIVER;
        words = why;
        return nullptr;
    }
    bsa::Device* device = bsa::Device::current(*driver, words);
    status = device == nullptr ? BSA_ERROR_NO_DEVICE : BSA_OK;
    return device;
}

// The kernels of a call and the device it runs on. That no kernel exists anywhere is said before that no device is there.
bsa_status resolve(bsa_params const& params, Choice& choice, Driver const*& driver, bsa::Device*& device)
{
    bsa_status status = BSA_OK;
    std::string noDevice;
    device = currentDevice(driver, status, noDevice);
    std::string reason;
    if (!bsa::choose(params, device != nullptr ? device->capability() : bsa::kANY_CAPABILITY, choice, reason))
    {
        return fail(BSA_ERROR_UNSUPPORTED, reason);
    }
    return device != nullptr ? BSA_OK : fail(status, noDevice);
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
    if (params.batch == 0 || params.seq_q == 0)
    {
        return bsa::clearCounts(*driver, params, stream);
    }
    std::size_t const needed = bsa::workspaceSize(choice, params);
    if (needed > 0 && (params.workspace == nullptr || params.workspace_bytes < needed))
    {
        return fail(BSA_ERROR_WORKSPACE, "workspace has " + std::to_string(params.workspace_bytes) + " bytes, "
                + std::to_string(needed) + " are needed");
    }
    return bsa::launchChoice(*driver, *device, choice, params, stream);
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

// What a call needs on a device of this capability; with kANY_CAPABILITY the most it needs on any.
std::size_t workspaceOn(int capability, bsa_params const* params)
{
    std::size_t bytes = 0;
    guarded([&] {
        if (bsa_status const status = check(params); status != BSA_OK)
        {
            return status;
        }
        auto const capabilities
            = capability == bsa::kANY_CAPABILITY ? bsa::capabilitiesCompiled() : std::vector<int>{capability};
        for (int const one : capabilities)
        {
            Choice choice;
            std::string words;
            if (bsa::choose(*params, one, choice, words))
            {
                bytes = std::max(bytes, bsa::workspaceSize(choice, *params));
            }
        }
        return BSA_OK;
    });
    return bytes;
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
        for (Kernel const* kernel : choice.kernels)
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
    int capability = bsa::kANY_CAPABILITY; // without a device enough for every one
    guarded([&] {
        Driver const* driver = nullptr;
        bsa_status status = BSA_OK;
        std::string words;
        if (bsa::Device const* device = currentDevice(driver, status, words); device != nullptr)
        {
            capability = device->capability();
        }
        return status;
    });
    return workspaceOn(capability, params);
}

size_t bsa_workspace_size_any_device(bsa_params const* params)
{
    return workspaceOn(bsa::kANY_CAPABILITY, params);
}

int32_t bsa_supported(bsa_params const* params, char* reason, size_t reasonSize)
{
    std::string words;
    bsa_status const status = guarded([&] {
        bsa_status result = check(params);
        if (result != BSA_OK)
        {
            words = bsa::lastFailure();
            return result;
        }
        Driver const* driver = nullptr;
        std::string none;
        bsa::Device const* device = currentDevice(driver, result, none);
        Choice choice;
        bool const found
            = bsa::choose(*params, device != nullptr ? device->capability() : bsa::kANY_CAPABILITY, choice, words);
        result = found ? BSA_OK : BSA_ERROR_UNSUPPORTED;
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
    static std::string const version = "{\"version\": \"1.0.0\", \"abi\": " + std::to_string(BSA_ABI_VERSION)
        + ", \"architectures\": " + bsa::architectureList() + "}";
    return version.c_str();
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
