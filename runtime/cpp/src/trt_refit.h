// Fills in the weights of an engine that was built without them (E6), from the bundle's graph and weights file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "manifest.h"
#include "trt_library.h"

namespace arcflow {

// The weight that an engine expects: `count` elements of a TensorProto.DataType; type 0 for types that ONNX does not
// have.
struct WeightSpec {
    int64_t type, count;
};

// The interface of TensorRT's IRefitter that this library needs.
class TrtRefitter {
public:
    virtual ~TrtRefitter() = default;

    // The names of all weights, which are the names of the ONNX graph's initializers.
    virtual std::vector<std::string> weights() = 0;
    virtual WeightSpec spec(const std::string &name) = 0;

    // Set a weight; `refit` reads the data later. False if the engine refuses it.
    virtual bool set(const std::string &name, const WeightSpec &spec, const void *data) = 0;

    // The names of weights that are not set yet.
    virtual std::vector<std::string> missing() = 0;

    // Fill in the weights that were set. False if it fails.
    virtual bool refit() = 0;

    // Return ": <text>" of the library's last message and forget it; "" if there is none.
    virtual std::string said() = 0;
};

// Throws Error if the library cannot fill in weights; the lean library cannot.
void check_can_refit(const TrtLibrary &library, TrtFlavour flavour, const std::string &part);

// Fill in every weight of an engine of `part` from the bundle, whose files were checked when it was opened. Maps the
// weights file, and copies only weights that are not aligned. Throws Error that names the part and the weight.
void refit(TrtRefitter &refitter, const Bundle &bundle, const std::string &part);

}  // namespace arcflow
