// The stream, lock and workspace that all engines of a pipeline share on one GPU; the engines never run at the same
// time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "error.h"
#include "trt_cuda.h"

namespace arcflow {

// A thread holds the lane while it enqueues, not while it waits. All engines, contexts, buffers and graphs of the lane
// are used and freed only by a thread that holds it.
class Lane {
public:
    // Throws Error if the stream cannot be made.
    explicit Lane(std::shared_ptr<const cuda::Device> device);
    ~Lane();
    Lane(const Lane &) = delete;
    Lane &operator=(const Lane &) = delete;

    // While it lives, the calling thread holds the lane and the device's context is current. A thread may hold the lane
    // several times.
    class Hold {
    public:
        explicit Hold(Lane &lane) : lock_(lane.mutex_), current_(*lane.device) {}

    private:
        std::unique_lock<std::recursive_mutex> lock_;
        cuda::Current current_;
    };

    const std::shared_ptr<const cuda::Device> device;

    // Everything below is for a thread that holds the lane.

    cuda::Stream &stream() { return *stream_; }

    // The memory for the engines' activations, as large as the largest context needs. If it has fewer than `bytes`, it
    // is replaced. `part` is the part that needs it, for the error. Throws Error(ARCFLOW_OUT_OF_MEMORY).
    const cuda::Memory &workspace(size_t bytes, const std::string &part);

    // Increases each time the workspace is replaced or freed; contexts must then be given the new one, and graphs that
    // use the old one are invalid.
    uint64_t generation() const { return generation_; }

    // Wait until the stream is idle, then free the workspace. False if there was none.
    bool release_workspace();

    // Wait until the stream is idle, so that memory can be freed. Errors are ignored: who waits for the failed work
    // gets them.
    void settle() noexcept;

    // Allocate memory; `what` it is for begins the error. Throws Error(ARCFLOW_OUT_OF_MEMORY).
    std::unique_ptr<cuda::Memory> allocate(size_t bytes, const std::string &what);
    std::unique_ptr<cuda::Pinned> allocate_pinned(size_t bytes, const std::string &part);

    // Count an engine that was loaded, or freed. With the last one the workspace is freed too.
    void add_engine() { ++engines_; }
    void remove_engine();

    // The rest is for a thread that does not hold the lane, since it takes the denoiser's lock.

    // Frees what can be made again, for work that found no memory; returns whether there was anything. Set by the
    // denoiser.
    std::function<bool()> make_room = [] { return false; };

    // Do `work`, and if memory runs out, once more after `make_room`.
    template <class Work> auto with_room(const Work &work) {
        try {
            return work();
        } catch (const Error &e) {
            if (e.status != ARCFLOW_OUT_OF_MEMORY || !make_room()) throw;
        }
        return work();
    }

private:
    std::recursive_mutex mutex_;
    std::unique_ptr<cuda::Stream> stream_;
    std::unique_ptr<cuda::Memory> workspace_;
    uint64_t generation_ = 0;
    int engines_ = 0;
};

}  // namespace arcflow
