// RAII wrappers of the CUDA driver. The driver is opened at run time, so the library also loads on machines without
// one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace arcflow::cuda {

// The types of cuda.h, which is not needed to build this library.
using Address = unsigned long long;
using Handle = void *;  // CUcontext, CUstream, CUgraph, ...

// `name`: product name. `target`: compute capability, such as "sm89". `driver`: CUDA version of the driver, such as
// "13.0".
struct Gpu {
    std::string name, target, driver;
};

// The first GPU that CUDA_VISIBLE_DEVICES allows, or nothing if there is no driver or no GPU. Never throws.
std::optional<Gpu> find_gpu();

// The first GPU with its primary context, which TensorRT uses too. Throws Error if there is no GPU.
class Device {
public:
    Device();
    ~Device();
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;

    const Gpu gpu;

private:
    friend class Current;
    int device_;
    Handle context_;
};

// Makes the device's context current in this thread for the object's lifetime. All classes below need a current
// context.
class Current {
public:
    explicit Current(const Device &device);
    ~Current();
    Current(const Current &) = delete;
    Current &operator=(const Current &) = delete;
};

// Bytes of device memory that are free, or 0 if the driver does not tell.
size_t free_bytes();

// Device memory; `address` is a multiple of 256. Throws Error(ARCFLOW_OUT_OF_MEMORY).
class Memory {
public:
    explicit Memory(size_t bytes);
    ~Memory();
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    const size_t bytes;
    Address address = 0;
};

// Page-locked host memory, which copies need to be asynchronous. Throws Error(ARCFLOW_OUT_OF_MEMORY).
class Pinned {
public:
    explicit Pinned(size_t bytes);
    ~Pinned();
    Pinned(const Pinned &) = delete;
    Pinned &operator=(const Pinned &) = delete;

    Address address() const { return reinterpret_cast<Address>(data); }

    std::byte *data = nullptr;
};

// A CUDA graph: captured work that one call launches.
class Graph {
public:
    explicit Graph(Handle captured);  // takes ownership of a CUgraph
    ~Graph();
    Graph(const Graph &) = delete;
    Graph &operator=(const Graph &) = delete;

    void launch(Handle stream);

private:
    Handle executable_ = nullptr;
};

// A point in a stream or captured graph. Its time is known when all work before it is done.
class Event {
public:
    Event();
    ~Event();
    Event(const Event &) = delete;
    Event &operator=(const Event &) = delete;

    // Wait until the work before the event is done, and throw the error of that work. The thread sleeps meanwhile.
    void wait();

    // Milliseconds on the GPU since `earlier`. Both events must be recorded, and the caller has waited for them.
    double ms_since(const Event &earlier) const;

private:
    friend class Stream;
    Handle event_ = nullptr;
};

// A CUDA stream. Whoever waits gets the errors of the enqueued work.
class Stream {
public:
    Stream();
    ~Stream();
    Stream(const Stream &) = delete;
    Stream &operator=(const Stream &) = delete;

    // Each is an address of device memory or of pinned memory.
    void copy(Address target, Address source, size_t bytes);

    // Enqueue a kernel. `arguments` points to each argument in order.
    void launch(Handle function, unsigned grid, unsigned block, unsigned shared_bytes, void **arguments);

    void wait();

    // Record the event at this point; in a capture, at this point of each launch.
    void record(Event &event);

    // Turn the work that is enqueued between these two calls into a graph instead of running it. Other threads may
    // allocate memory meanwhile; if the work itself does, the capture fails. Throws Error if the driver refuses; the
    // stream then works as before.
    void begin_capture();
    std::unique_ptr<Graph> end_capture();

    // End a capture and forget what was captured.
    void abort_capture() noexcept;

    Handle handle = nullptr;

private:
    void check(int result, const std::string &what) const;

    bool capturing_ = false;
};

// GPU code: a cubin, fatbin or PTX. Throws Error if the driver cannot load it.
class Module {
public:
    explicit Module(const void *image);
    ~Module();
    Module(const Module &) = delete;
    Module &operator=(const Module &) = delete;

    Handle function(const char *name) const;

private:
    Handle module_ = nullptr;
};

}  // namespace arcflow::cuda
