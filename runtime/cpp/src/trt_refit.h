// Engines without weights (E6): the bundle's graph and weights files -> the weights that an engine names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "manifest.h"
#include "trt_library.h"

namespace arcflow {

// What an engine wants for a name: `count` elements of a `type` of onnx.proto's TensorProto.DataType, 0 for others.
struct WeightSpec {
    int64_t type, count;
};

// TensorRT's IRefitter behind an interface of ours.
class TrtRefitter {
public:
    virtual ~TrtRefitter() = default;

    // Names of all weights; those of the ONNX graph's initializers.
    virtual std::vector<std::string> weights() = 0;
    virtual WeightSpec spec(const std::string &name) = 0;

    // Give a weight, which is read by `refit`. False where it is refused.
    virtual bool set(const std::string &name, const WeightSpec &spec, const void *data) = 0;

    // Names of weights that must still be set.
    virtual std::vector<std::string> missing() = 0;

    // Fill in what was set. False where it fails.
    virtual bool refit() = 0;

    // ": <text>" of what the library said last, and forget it; "" if nothing.
    virtual std::string said() = 0;
};

// Throws Error where the library cannot fill in weights, as the lean one.
void check_can_refit(const TrtLibrary &library, TrtFlavour flavour, const std::string &part);

// Fill in every weight of an engine of `part` from the bundle, whose files were checked when it was opened. The weights
// file is mapped; only what lies unaligned is copied. Throws Error that names the part and the weight.
void refit(TrtRefitter &refitter, const Bundle &bundle, const std::string &part);

}  // namespace arcflow
