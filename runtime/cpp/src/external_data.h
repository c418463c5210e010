// What an ONNX graph says about tensors that lie outside it, checked before a library opens the graph and follows it.
#pragma once

#include <string>

#include "manifest.h"

namespace arcflow {

// External data of the part's graph must lie in the part's own weights file (B8), within its size. A library that is
// given the graph opens whatever `location` it finds there, and ONNX Runtime's convention even lets one be a memory
// address, so this reads the graph's protobuf by itself. Throws Error that names the graph and the tensor.
void check_external_data(const Bundle &bundle, const std::string &part);

}  // namespace arcflow
