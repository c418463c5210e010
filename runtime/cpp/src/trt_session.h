// TensorRT's interface behind one of ours, so that its headers are needed in few files: an engine's file -> contexts
// that run it on device memory.
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

// An engine bound to one stream and one set of input shapes; used by one thread at a time.
class TrtContext {
public:
    virtual ~TrtContext() = default;

    // Bytes of scratch memory for the current shapes, which `use_scratch` has to give before the first run.
    virtual size_t scratch_bytes() = 0;
    virtual void use_scratch(cuda::Address address, size_t bytes) = 0;

    virtual std::vector<int64_t> shape(const std::string &tensor) = 0;

    // Where an input or output lies, a multiple of 256.
    virtual void bind(const std::string &tensor, cuda::Address address) = 0;

    // Whether `enqueue` may be captured into a graph.
    virtual bool capturable() = 0;

    // Throws Error that names the part.
    virtual void enqueue() = 0;
};

// One engine in memory; safe to use from several threads. Must not outlive its TrtRuntime.
class TrtSession {
public:
    virtual ~TrtSession() = default;

    // A context with the first of the engine's profiles that takes these shapes. Throws Error where none does.
    virtual std::unique_ptr<TrtContext> context(const Shapes &inputs, cuda::Stream &stream) = 0;

    // The largest size of an input's axis over all profiles.
    virtual int64_t largest(const std::string &input, size_t axis) = 0;
};

class TrtRuntime {
public:
    virtual ~TrtRuntime() = default;

    // Load an engine of the bundle whose file was checked, and fill in its weights if it has none (E6). Throws Error
    // where it cannot be loaded, its inputs and outputs are not the manifest's, or the bundle's weights do not fit.
    virtual std::unique_ptr<TrtSession> load(const BuiltEngine &engine, const Bundle &bundle) = 0;
};

// What the headers were.
TrtFlavour trt_headers_flavour();
TrtVersion trt_headers_version();

// There must be a GPU: without one TensorRT's lean library gives a pointer that cannot be used. `gpu` is the
// one whose device is current when engines are loaded. Throws Error.
std::unique_ptr<TrtRuntime> make_trt_runtime(const TrtLibrary &library, const cuda::Gpu &gpu);

}  // namespace arcflow
