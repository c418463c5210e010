// Interfaces to TensorRT that do not need its headers: an engine's file -> contexts that run it on device memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "manifest.h"
#include "trt_cuda.h"
#include "trt_library.h"
#include "trt_record.h"

namespace arcflow {

using Shapes = std::map<std::string, std::vector<int64_t>>;

// An engine prepared for one stream and one set of input shapes. Used by one thread at a time, which holds the lane of
// that stream.
class TrtContext {
public:
    virtual ~TrtContext() = default;

    // Bytes of memory that activations need. Give it with `use_workspace` before the first run; contexts that never run
    // at the same time may share it.
    virtual size_t workspace_bytes() = 0;
    virtual void use_workspace(cuda::Address address, size_t bytes) = 0;

    virtual std::vector<int64_t> shape(const std::string &tensor) = 0;

    // Set the device address of an input or output, a multiple of 256.
    virtual void bind(const std::string &tensor, cuda::Address address) = 0;

    // Why `enqueue` cannot be captured into a graph, or "".
    virtual std::string obstacle() = 0;

    // Enqueue one run. Throws Error that names the part.
    virtual void enqueue() = 0;
};

// An engine in memory. Used by a thread that holds the lane. Must not outlive its TrtRuntime.
class TrtSession {
public:
    virtual ~TrtSession() = default;

    // A context with the engine's first profile that takes these shapes. Throws Error if none does, or memory ran out.
    virtual std::unique_ptr<TrtContext> context(const Shapes &inputs, cuda::Stream &stream) = 0;

    // Why the engine does not take these shapes, or "". Any thread may ask.
    virtual std::string misfit(const Shapes &inputs) = 0;
};

class TrtRuntime {
public:
    virtual ~TrtRuntime() = default;

    // Load an engine whose file was checked, and fill in its weights if it has none (E6). Throws Error if it cannot be
    // loaded, its inputs and outputs are not those of the manifest, or the bundle's weights do not fit.
    virtual std::unique_ptr<TrtSession> load(const BuiltEngine &engine, const Bundle &bundle) = 0;
};

// Flavour and version of the headers that this library was compiled with.
TrtFlavour trt_headers_flavour();
TrtVersion trt_headers_version();

// Make the runtime. Call it only if there is a GPU, because the lean library returns an unusable pointer without one.
// `gpu`: the device that will be current when engines are loaded. Throws Error.
std::unique_ptr<TrtRuntime> make_trt_runtime(const TrtLibrary &library, const cuda::Gpu &gpu);

}  // namespace arcflow
