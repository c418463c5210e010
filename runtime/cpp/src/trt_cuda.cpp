// Calls the CUDA driver through functions that are looked up when the library first needs them.
#include "trt_cuda.h"

#include <dlfcn.h>

#include <algorithm>
#include <iterator>

#include "error.h"

namespace arcflow::cuda {
namespace {

constexpr int success = 0, out_of_memory = 2;
constexpr int compute_capability_major = 75, compute_capability_minor = 76;
constexpr unsigned stream_non_blocking = 1;
constexpr int capture_thread_local = 1;
constexpr unsigned event_blocking_sync = 1, record_default = 0, record_external = 1;
constexpr int name_bytes = 256;

// After these, every call of this process fails (cuda.h: "the process must be terminated and relaunched"): illegal
// address, launch timeout, assert, hardware stack error, illegal instruction, misaligned address, invalid address
// space, invalid program counter, launch failed, tensor memory leak, contained.
constexpr int lost[] = {700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 226};

// The driver's functions by their exported names, whose suffixes are ABI versions.
struct Api {
    int (*cuInit)(unsigned);
    int (*cuDriverGetVersion)(int *);
    int (*cuDeviceGet)(int *, int);
    int (*cuDeviceGetName)(char *, int, int);
    int (*cuDeviceGetAttribute)(int *, int, int);
    int (*cuDevicePrimaryCtxRetain)(Handle *, int);
    int (*cuDevicePrimaryCtxRelease_v2)(int);
    int (*cuCtxPushCurrent_v2)(Handle);
    int (*cuCtxPopCurrent_v2)(Handle *);
    int (*cuGetErrorName)(int, const char **);
    int (*cuGetErrorString)(int, const char **);
    int (*cuMemAlloc_v2)(Address *, size_t);
    int (*cuMemFree_v2)(Address);
    int (*cuMemHostAlloc)(void **, size_t, unsigned);
    int (*cuMemFreeHost)(void *);
    int (*cuMemGetInfo_v2)(size_t *, size_t *);
    int (*cuMemcpyAsync)(Address, Address, size_t, Handle);
    int (*cuStreamCreate)(Handle *, unsigned);
    int (*cuStreamDestroy_v2)(Handle);
    int (*cuStreamSynchronize)(Handle);
    int (*cuStreamBeginCapture_v2)(Handle, int);
    int (*cuStreamEndCapture)(Handle, Handle *);
    int (*cuGraphInstantiateWithFlags)(Handle *, Handle, unsigned long long);
    int (*cuGraphLaunch)(Handle, Handle);
    int (*cuGraphDestroy)(Handle);
    int (*cuGraphExecDestroy)(Handle);
    int (*cuEventCreate)(Handle *, unsigned);
    int (*cuEventDestroy_v2)(Handle);
    int (*cuEventRecordWithFlags)(Handle, Handle, unsigned);
    int (*cuEventSynchronize)(Handle);
    int (*cuEventElapsedTime)(float *, Handle, Handle);
    int (*cuModuleLoadData)(Handle *, const void *);
    int (*cuModuleUnload)(Handle);
    int (*cuModuleGetFunction)(Handle *, Handle, const char *);
    int (*cuLaunchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void **,
                          void **);
};

// Opens the driver's library and never closes it, since unloading would break state that it keeps in the process.
struct Driver {
    Api api{};
    std::string missing;  // why the driver cannot be used; "" if it can

    Driver() {
        void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            missing = "libcuda.so.1 is not installed";
            return;
        }
        const auto find = [&](auto &function, const char *name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (function == nullptr && missing.empty())
                missing = std::string("the CUDA driver has no ") + name + "; update it";
        };
#define ARCFLOW_FIND(name) find(api.name, #name)
        ARCFLOW_FIND(cuInit);
        ARCFLOW_FIND(cuDriverGetVersion);
        ARCFLOW_FIND(cuDeviceGet);
        ARCFLOW_FIND(cuDeviceGetName);
        ARCFLOW_FIND(cuDeviceGetAttribute);
        ARCFLOW_FIND(cuDevicePrimaryCtxRetain);
        ARCFLOW_FIND(cuDevicePrimaryCtxRelease_v2);
        ARCFLOW_FIND(cuCtxPushCurrent_v2);
        ARCFLOW_FIND(cuCtxPopCurrent_v2);
        ARCFLOW_FIND(cuGetErrorName);
        ARCFLOW_FIND(cuGetErrorString);
        ARCFLOW_FIND(cuMemAlloc_v2);
        ARCFLOW_FIND(cuMemFree_v2);
        ARCFLOW_FIND(cuMemHostAlloc);
        ARCFLOW_FIND(cuMemFreeHost);
        ARCFLOW_FIND(cuMemGetInfo_v2);
        ARCFLOW_FIND(cuMemcpyAsync);
        ARCFLOW_FIND(cuStreamCreate);
        ARCFLOW_FIND(cuStreamDestroy_v2);
        ARCFLOW_FIND(cuStreamSynchronize);
        ARCFLOW_FIND(cuStreamBeginCapture_v2);
        ARCFLOW_FIND(cuStreamEndCapture);
        ARCFLOW_FIND(cuGraphInstantiateWithFlags);
        ARCFLOW_FIND(cuGraphLaunch);
        ARCFLOW_FIND(cuGraphDestroy);
        ARCFLOW_FIND(cuGraphExecDestroy);
        ARCFLOW_FIND(cuEventCreate);
        ARCFLOW_FIND(cuEventDestroy_v2);
        ARCFLOW_FIND(cuEventRecordWithFlags);
        ARCFLOW_FIND(cuEventSynchronize);
        ARCFLOW_FIND(cuEventElapsedTime);
        ARCFLOW_FIND(cuModuleLoadData);
        ARCFLOW_FIND(cuModuleUnload);
        ARCFLOW_FIND(cuModuleGetFunction);
        ARCFLOW_FIND(cuLaunchKernel);
#undef ARCFLOW_FIND
    }
};

const Driver &driver() {
    static const Driver opened;
    return opened;
}

// For code that has a Device, which exists only if the driver can be used.
const Api &api() { return driver().api; }

std::string describe(int error) {
    const char *name = nullptr, *text = nullptr;
    api().cuGetErrorName(error, &name);
    api().cuGetErrorString(error, &text);
    return std::string(name ? name : "error " + std::to_string(error)) + (text ? std::string(" (") + text + ")" : "");
}

void check(int result, const std::string &what) {
    if (result == success) return;
    const std::string text = "CUDA cannot " + what + ": " + describe(result);
    if (result == out_of_memory) throw Error(ARCFLOW_OUT_OF_MEMORY, text + "; " + save_memory);
    const bool ends_process = std::find(std::begin(lost), std::end(lost), result) != std::end(lost);
    throw engine_error(text + (ends_process ? "; start this process again" : "; open the bundle again"));
}

// As `check`, for a capture: the error is the reason why there is no graph, and nothing has to be done about it.
void check_capture(int result, const std::string &what) {
    if (result != success) throw engine_error("CUDA cannot " + what + ": " + describe(result));
}

// The first GPU and its device number, or why there is none.
struct Found {
    std::optional<Gpu> gpu;
    int device = 0;
    std::string why;
};

Found find_first() {
    Found found;
    found.why = driver().missing;
    if (!found.why.empty()) return found;
    int result = api().cuInit(0);
    if (result == success) result = api().cuDeviceGet(&found.device, 0);
    char name[name_bytes] = "";
    if (result == success) result = api().cuDeviceGetName(name, name_bytes, found.device);
    int major = 0, minor = 0, version = 0;
    if (result == success) result = api().cuDeviceGetAttribute(&major, compute_capability_major, found.device);
    if (result == success) result = api().cuDeviceGetAttribute(&minor, compute_capability_minor, found.device);
    if (result == success) result = api().cuDriverGetVersion(&version);
    if (result != success) {
        found.why = describe(result);
        return found;
    }
    // The driver gives 13.0 as 13000.
    found.gpu = Gpu{name, "sm" + std::to_string(major) + std::to_string(minor),
                    std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10)};
    return found;
}

Gpu first_gpu() {
    const Found found = find_first();
    if (!found.gpu) throw engine_error("the CUDA driver finds no NVIDIA GPU here: " + found.why);
    return *found.gpu;
}

}  // namespace

std::optional<Gpu> find_gpu() { return find_first().gpu; }

Device::Device() : gpu(first_gpu()), device_(find_first().device), context_(nullptr) {
    check(api().cuDevicePrimaryCtxRetain(&context_, device_), "use " + gpu.name);
}

Device::~Device() { api().cuDevicePrimaryCtxRelease_v2(device_); }

Current::Current(const Device &device) { check(api().cuCtxPushCurrent_v2(device.context_), "use " + device.gpu.name); }

Current::~Current() {
    Handle context;
    api().cuCtxPopCurrent_v2(&context);
}

size_t free_bytes() {
    size_t available = 0, total = 0;
    return api().cuMemGetInfo_v2(&available, &total) == success ? available : 0;
}

Memory::Memory(size_t size) : bytes(size) {
    if (bytes) check(api().cuMemAlloc_v2(&address, bytes), "allocate " + std::to_string(bytes) + " bytes on the GPU");
}

Memory::~Memory() {
    if (address) api().cuMemFree_v2(address);
}

Pinned::Pinned(size_t bytes) {
    void *memory = nullptr;
    check(api().cuMemHostAlloc(&memory, bytes ? bytes : 1, 0), "page-lock " + std::to_string(bytes) + " bytes");
    data = static_cast<std::byte *>(memory);
}

Pinned::~Pinned() { api().cuMemFreeHost(data); }

Graph::Graph(Handle captured) {
    const int result = api().cuGraphInstantiateWithFlags(&executable_, captured, 0);
    api().cuGraphDestroy(captured);
    check_capture(result, "make a graph of the captured work");
}

Graph::~Graph() { api().cuGraphExecDestroy(executable_); }

void Graph::launch(Handle stream) { check(api().cuGraphLaunch(executable_, stream), "launch a graph"); }

Event::Event() { check(api().cuEventCreate(&event_, event_blocking_sync), "make an event"); }

Event::~Event() { api().cuEventDestroy_v2(event_); }

void Event::wait() { check(api().cuEventSynchronize(event_), "finish the enqueued work"); }

double Event::ms_since(const Event &earlier) const {
    float ms = 0;
    check(api().cuEventElapsedTime(&ms, earlier.event_, event_), "tell the time between events");
    return static_cast<double>(ms);
}

Stream::Stream() { cuda::check(api().cuStreamCreate(&handle, stream_non_blocking), "make a stream"); }

Stream::~Stream() { api().cuStreamDestroy_v2(handle); }

void Stream::check(int result, const std::string &what) const {
    if (capturing_) check_capture(result, what);
    else cuda::check(result, what);
}

void Stream::copy(Address target, Address source, size_t bytes) {
    if (bytes) check(api().cuMemcpyAsync(target, source, bytes, handle), "enqueue a copy");
}

void Stream::launch(Handle function, unsigned grid, unsigned block, unsigned shared_bytes, void **arguments) {
    check(api().cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared_bytes, handle, arguments, nullptr),
          "launch a kernel");
}

void Stream::wait() { check(api().cuStreamSynchronize(handle), "finish the enqueued work"); }

void Stream::record(Event &event) {
    // In a capture, only an event that is recorded as external has a time.
    check(api().cuEventRecordWithFlags(event.event_, handle, capturing_ ? record_external : record_default),
          "record an event");
}

void Stream::begin_capture() {
    check_capture(api().cuStreamBeginCapture_v2(handle, capture_thread_local), "begin a capture");
    capturing_ = true;
}

std::unique_ptr<Graph> Stream::end_capture() {
    Handle captured = nullptr;
    capturing_ = false;
    check_capture(api().cuStreamEndCapture(handle, &captured), "end a capture");
    return std::make_unique<Graph>(captured);
}

void Stream::abort_capture() noexcept {
    Handle captured = nullptr;
    capturing_ = false;
    if (api().cuStreamEndCapture(handle, &captured) == success) api().cuGraphDestroy(captured);
}

Module::Module(const void *image) { check(api().cuModuleLoadData(&module_, image), "load the kernels"); }

Module::~Module() { api().cuModuleUnload(module_); }

Handle Module::function(const char *name) const {
    Handle function = nullptr;
    check(api().cuModuleGetFunction(&function, module_, name), std::string("find the kernel ") + name);
    return function;
}

}  // namespace arcflow::cuda
