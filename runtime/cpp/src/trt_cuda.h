// The CUDA driver, opened at run time: the library links to nothing of CUDA and loads where there is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace arcflow::cuda {

// Of cuda.h, which is not needed to build.
using Address = unsigned long long;
using Handle = void *;  // CUcontext, CUstream, CUgraph, ...

// A GPU's product name, its compute capability as a target such as "sm89", and its driver's version of CUDA, "13.0".
struct Gpu {
    std::string name, target, driver;
};

// The first GPU that CUDA_VISIBLE_DEVICES leaves; none where there is no driver or no GPU. Never throws.
std::optional<Gpu> find_gpu();

// That GPU with its primary context, the one that TensorRT works in. Throws Error where there is none.
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

// Makes a device's context the calling thread's for as long as it lives. Everything below needs one.
class Current {
public:
    explicit Current(const Device &device);
    ~Current();
    Current(const Current &) = delete;
    Current &operator=(const Current &) = delete;
};

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

// Page-locked memory of the host, of which copies are asynchronous.
class Pinned {
public:
    explicit Pinned(size_t bytes);
    ~Pinned();
    Pinned(const Pinned &) = delete;
    Pinned &operator=(const Pinned &) = delete;

    std::byte *data = nullptr;
};

// Captured work that is launched as one.
class Graph {
public:
    explicit Graph(Handle captured);  // takes a CUgraph and frees it
    ~Graph();
    Graph(const Graph &) = delete;
    Graph &operator=(const Graph &) = delete;

    void launch(Handle stream);

private:
    Handle executable_ = nullptr;
};

// A place in a stream, or in a graph that was captured with it, whose time is known once the work before it is done.
class Event {
public:
    Event();
    ~Event();
    Event(const Event &) = delete;
    Event &operator=(const Event &) = delete;

    // Milliseconds on the GPU since `earlier`; both were recorded, and the stream was waited for.
    double ms_since(const Event &earlier) const;

private:
    friend class Stream;
    Handle event_ = nullptr;
};

// A queue of work. Errors of the work itself come out of `wait`.
class Stream {
public:
    Stream();
    ~Stream();
    Stream(const Stream &) = delete;
    Stream &operator=(const Stream &) = delete;

    void to_device(Address target, const void *source, size_t bytes);
    void to_host(void *target, Address source, size_t bytes);
    void wait();

    // Has the event tell the time of this place; in a capture, that of each launch.
    void record(Event &event);

    // What other code enqueues between these two becomes a graph, and is not run. Null, with `why`, where it cannot be
    // captured; the stream can be used as before.
    void begin_capture();
    std::unique_ptr<Graph> end_capture(std::string &why);

    Handle handle = nullptr;

private:
    bool capturing_ = false;
};

// Code for the GPU: a cubin, fatbin or PTX. Throws Error where the driver cannot load it.
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

// Enqueue a kernel; `arguments` points to its arguments in order.
void launch(Handle function, unsigned grid, unsigned block, unsigned shared_bytes, Handle stream, void **arguments);

}  // namespace arcflow::cuda
