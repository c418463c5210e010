// The start of every driver call (lock, counters, injected failures), and the functions of host_cuda.h.
#include <cstdlib>

#include "driver.h"

namespace host_cuda {
namespace {

constexpr size_t most_log = 100'000;

// "cuMemAlloc" of "cuMemAlloc_v2".
std::string unversioned(const std::string &name) {
    const size_t end = name.size();
    if (end > 3 && name[end - 3] == '_' && name[end - 2] == 'v') return name.substr(0, end - 3);
    return name;
}

bool gives_back(const std::string &name) {
    for (const char *part : {"Free", "Destroy", "Unload", "Release"})
        if (name.find(part) != std::string::npos) return true;
    return false;
}

bool matches(const Failure &failure, const std::string &name, bool is_work) {
    if (failure.function == name) return true;
    return is_work ? failure.function == "run" : failure.function == "*" && !gives_back(name);
}

// Frees everything. Work and graphs are destroyed without the lock, because they may own objects of the program.
void forget_everything(Lock &lock) {
    State &all = state();
    const auto streams = std::move(all.streams);
    const auto graphs = std::move(all.graphs);
    const auto executables = std::move(all.executables);
    const auto objects = std::move(all.objects);
    all.streams.clear();
    all.graphs.clear();
    all.executables.clear();
    all.objects.clear();
    all.events.clear();
    all.captures.clear();
    all.unnamed.clear();
    all.lost = CUDA_SUCCESS;
    forget_memory();
    lock.unlock();
    for (const auto &[handle, stream] : streams) stream->queue.clear();
    lock.lock();
}

}  // namespace

State &state() {
    // Never destroyed, because other libraries call the driver until the process ends.
    static State *const all = [] {
        auto *made = new State;
        made->legacy = std::make_shared<CUstream_st>();
        made->legacy->blocking = true;
        const char *devices = std::getenv("HOST_CUDA_DEVICES"), *bytes = std::getenv("HOST_CUDA_BYTES");
        made->present = devices == nullptr || std::string(devices) != "0";
        if (bytes != nullptr) set_memory(std::strtoull(bytes, nullptr, 10));
        return made;
    }();
    return *all;
}

thread_local bool in_host_function = false;

CUresult due(const std::string &name, bool is_work) {
    CUresult error = CUDA_SUCCESS;
    auto &failures = state().failures;
    for (auto f = failures.begin(); f != failures.end();) {
        const bool counts = matches(*f, name, is_work) && (!(f->when & HOST_CUDA_IN_CAPTURE) || captures_here());
        if (!counts || --f->left > 0) {
            ++f;
            continue;
        }
        error = f->error;
        if (f->when & HOST_CUDA_LOST || is_work) state().lost = error;
        if (f->when & HOST_CUDA_IN_CAPTURE) {
            for (const auto &capture : state().captures)
                if (capture->thread == std::this_thread::get_id()) invalidate(*capture);
        }
        f = failures.erase(f);
    }
    return error;
}

Call::Call(const char *function, Needs needs) : lock(state().mutex) {
    const std::string name = unversioned(function);
    State &all = state();
    ++all.calls[name];
    if (needs == Needs::context && all.log.size() < most_log) all.log += name + "\n";
    if (needs == Needs::nothing) return;
    if (in_host_function) {
        error = CUDA_ERROR_NOT_PERMITTED;
    } else if (!all.initialized && name != "cuInit") {
        error = CUDA_ERROR_NOT_INITIALIZED;
    } else if (needs == Needs::context && current_context() == nullptr) {
        error = CUDA_ERROR_INVALID_CONTEXT;
    } else if (needs == Needs::context && all.lost != CUDA_SUCCESS) {
        error = all.lost;
    } else if (needs == Needs::context) {
        error = due(name, false);
    } else {
        for (const Failure &failure : all.failures) {  // by name only: "*" stands for calls that need a context
            if (failure.function == name) {
                error = due(name, false);
                break;
            }
        }
    }
}

}  // namespace host_cuda

using namespace host_cuda;

extern "C" {

void host_cuda_reset() {
    Lock lock(state().mutex);
    if (state().lost != CUDA_SUCCESS) forget_everything(lock);
    state().fault.clear();
    state().calls.clear();
    state().log.clear();
    state().failures.clear();
}

void host_cuda_set_memory(size_t bytes) {
    const Lock lock(state().mutex);
    set_memory(bytes);
}

void host_cuda_fail(const char *function, long nth, CUresult error, int when) {
    const Lock lock(state().mutex);
    state().failures.push_back({function, nth, error, when});
}

int host_cuda_failures_pending() {
    const Lock lock(state().mutex);
    return static_cast<int>(state().failures.size());
}

long host_cuda_calls(const char *function) {
    const Lock lock(state().mutex);
    const auto found = state().calls.find(function);
    return found == state().calls.end() ? 0 : found->second;
}

const char *host_cuda_log() {
    static thread_local std::string copy;
    const Lock lock(state().mutex);
    copy = state().log;
    return copy.c_str();
}

const char *host_cuda_fault() {
    static thread_local std::string copy;
    const Lock lock(state().mutex);
    copy = state().fault;
    return copy.c_str();
}

size_t host_cuda_live(int kind) {
    const Lock lock(state().mutex);
    const State &all = state();
    size_t pending = all.legacy->submitted - all.legacy->done;
    for (const auto &[handle, stream] : all.streams) pending += stream->submitted - stream->done;
    switch (kind) {
        case HOST_CUDA_DEVICE_BYTES:
            return live_device_bytes();
        case HOST_CUDA_PINNED_BYTES:
            return live_pinned_bytes();
        case HOST_CUDA_STREAMS:
            return all.streams.size();
        case HOST_CUDA_EVENTS:
            return all.events.size();
        case HOST_CUDA_GRAPHS:
            return all.graphs.size();
        case HOST_CUDA_EXECUTABLES:
            return all.executables.size();
        case HOST_CUDA_MODULES:
            return live_modules();
        case HOST_CUDA_PENDING:
            return pending;
        default:
            return 0;
    }
}

CUresult host_cuda_enqueue(CUstream stream, int (*work)(void *), void *user) {
    HOST_CUDA_CALL(context);
    return submit(stream, {"engine",
                           [=] {
                               in_host_function = true;
                               const int failed = work(user);
                               in_host_function = false;
                               return failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
                           },
                           {},
                           {}});
}
}
