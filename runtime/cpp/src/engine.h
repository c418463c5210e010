// The interface between the pipeline and what runs a graph: named tensors in, named tensors out.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "manifest.h"
#include "tensor.h"

namespace arcflow {

using Tensors = std::map<std::string, Tensor>;

// One loaded part of a bundle. `run` may be called from several threads at once.
class Engine {
public:
    virtual ~Engine() = default;

    // One tensor per input of the part, of the manifest's dtype; gives one per output. Throws Error that names the part.
    virtual Tensors run(const Tensors &inputs) = 0;
};

// Opens the parts of bundles.
class Backend {
public:
    virtual ~Backend() = default;

    // Throws Error if this backend cannot run the bundle, before anything is loaded.
    virtual void check(const Bundle &bundle) = 0;
    virtual std::unique_ptr<Engine> open(const Bundle &bundle, const std::string &part) = 0;
};

// The backend of a name, "" for the default. Throws Error that lists those this library was built with.
std::unique_ptr<Backend> make_backend(const std::string &name, int threads);

// The names, separated by commas.
const char *backend_names();

}  // namespace arcflow
