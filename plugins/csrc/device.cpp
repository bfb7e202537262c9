#include "device.h"

#include <unordered_map>

namespace bsa {
namespace {

std::string words(Driver const& driver, char const* what, CudaResult code)
{
    char const* text = nullptr;
    driver.cuGetErrorString(code, &text);
    return std::string(what) + ": " + (text != nullptr ? text : "unknown error");
}

} // namespace

Device* Device::current(Driver const& driver, std::string& reason)
{
    CudaContext context = nullptr;
    if (driver.cuCtxGetCurrent(&context) != kCUDA_SUCCESS || context == nullptr)
    {
        reason = "no CUDA context is current in this thread: set a device first (cudaSetDevice, torch.cuda)";
        return nullptr;
    }
    // The context seen last, so that a call after the first takes no lock.
    thread_local CudaContext lastContext = nullptr;
    thread_local Device* lastDevice = nullptr;
    if (context == lastContext)
    {
        return lastDevice;
    }
    static std::mutex mutex;
    static std::unordered_map<CudaContext, std::unique_ptr<Device>> devices;
    std::lock_guard<std::mutex> const lock(mutex);
    std::unique_ptr<Device>& slot = devices[context];
    if (slot == nullptr)
    {
        auto device = std::make_unique<Device>();
        int id = 0;
        CudaResult code = driver.cuCtxGetDevice(&id);
        for (auto const& [attribute, value] : {std::pair{kDEVICE_CAPABILITY_MAJOR, &device->mMajor},
                 std::pair{kDEVICE_CAPABILITY_MINOR, &device->mMinor},
                 std::pair{kDEVICE_MULTIPROCESSORS, &device->mMultiprocessors}})
        {
            code = code == kCUDA_SUCCESS ? driver.cuDeviceGetAttribute(value, attribute, id) : code;
        }
        if (code != kCUDA_SUCCESS)
        {
            reason = words(driver, "reading the device's attributes", code);
            devices.erase(context);
            return nullptr;
        }
        device->mFunctions = std::make_unique<std::atomic<CudaFunction>[]>(kKERNEL_COUNT);
        slot = std::move(device);
    }
    lastContext = context;
    lastDevice = slot.get();
    return lastDevice;
}

bool Device::function(Driver const& driver, Kernel const& kernel, CudaFunction& result, std::string& reason)
{
    std::atomic<CudaFunction>& slot = mFunctions[static_cast<std::size_t>(&kernel - kKERNELS)];
    result = slot.load(std::memory_order_acquire);
    if (result != nullptr)
    {
        return true;
    }
    std::lock_guard<std::mutex> const lock(mLoading);
    result = slot.load(std::memory_order_acquire);
    if (result != nullptr)
    {
        return true;
    }
    CudaModule module = nullptr;
    CudaFunction function = nullptr;
    CudaResult code = driver.cuModuleLoadData(&module, kernel.image);
    if (code == kCUDA_SUCCESS)
    {
        code = driver.cuModuleGetFunction(&function, module, kernel.entry);
    }
    if (code == kCUDA_SUCCESS)
    {
        code = driver.cuFuncSetAttribute(function, kFUNCTION_MAX_DYNAMIC_SHARED_BYTES, kernel.sharedBytes);
    }
    if (code != kCUDA_SUCCESS)
    {
        reason = words(driver, kernel.name, code);
        return false;
    }
    slot.store(function, std::memory_order_release);
    result = function;
    return true;
}

} // namespace bsa
