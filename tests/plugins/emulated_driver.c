/* A stand-in for libcuda on machines without a GPU: memory is the host's, and a launch is handed to the test, which
 * executes the kernel's own source. A kernel's image is its name, and behind it the name of its entry. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct map {
    void* address;
    uint64_t sizes[4], strides[3];
    uint32_t box[4];
    int type, swizzle;
};
typedef int (*launched)(const char* name, const unsigned grid[3], unsigned block, unsigned shared, void** arguments);

static launched callback;
static int capability = 90, multiprocessors = 3;
void emulated_on_launch(launched function) { callback = function; }
void emulated_capability(int times_ten) { capability = times_ten; }
void emulated_multiprocessors(int count) { multiprocessors = count; }

int cuInit(unsigned flags) { return (int)flags; }
/* a device of another capability or size is another device */
int cuCtxGetCurrent(void** context)
{
    static char contexts[256][256];
    *context = &contexts[capability][multiprocessors];
    return 0;
}
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device)
{
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 16 ? multiprocessors : device;
    return 0;
}
int cuGetErrorString(int code, const char** words) { *words = code == 1 ? "refused by the emulation" : "no error"; return 0; }
int cuModuleLoadData(void** module, const void* image) { *module = (void*)image; return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name)
{
    *function = module;
    return strcmp(name, (const char*)module + strlen((const char*)module) + 1) != 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return function == NULL || attribute != 8 || value > 232448; }
int cuMemsetD32Async(uint64_t address, unsigned value, size_t count, void* stream)
{
    for (size_t i = 0; i < count; ++i) ((uint32_t*)address)[i] = value;
    return stream != NULL;
}
int cuTensorMapEncodeTiled(struct map* map, int type, unsigned rank, void* address, const uint64_t* sizes,
    const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill)
{
    /* what the driver's documentation demands */
    if (rank != 4 || address == NULL || (uintptr_t)address % 16 != 0 || (uintptr_t)map % 64 != 0) return 1;
    if (box[0] * 2 > 128 || swizzle != 3 || interleave != 0 || promotion != 3 || fill != 0) return 1;
    for (int i = 0; i < 4; ++i)
        if (sizes[i] == 0 || sizes[i] > (1ull << 32) || box[i] == 0 || box[i] > 256 || steps[i] != 1) return 1;
    for (int i = 0; i < 3; ++i)
        if (strides[i] % 16 != 0 || strides[i] >= (1ull << 40) || strides[i] < 16) return 1;
    map->address = address;
    memcpy(map->sizes, sizes, sizeof map->sizes);
    memcpy(map->strides, strides, sizeof map->strides);
    memcpy(map->box, box, sizeof map->box);
    map->type = type;
    map->swizzle = swizzle;
    return 0;
}
struct attribute { int id, padding; uint64_t value[8]; };
struct config { unsigned grid[3], block[3], shared; void* stream; struct attribute* attributes; unsigned count; };
int cuLaunchKernelEx(const struct config* c, void* function, void** arguments, void** extra)
{
    if (c->count > 1 || (c->count == 1 && (c->attributes->id != 6 || c->attributes->value[0] != 1))) return 1;
    if (c->grid[0] == 0 || c->grid[1] != 1 || c->grid[2] != 1 || c->block[1] != 1 || c->block[2] != 1) return 1;
    if (extra != NULL || c->stream != NULL) return 1;
    return callback == NULL ? 1 : callback((const char*)function, c->grid, c->block[0], c->shared, arguments);
}
