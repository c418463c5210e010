// Checks the external data of an ONNX graph before any engine opens the graph.
#pragma once

#include <string>

#include "manifest.h"

namespace arcflow {

// Check that all external data of the part's graph lies within the part's own weights file (B8). Engines open whatever
// file `location` names, and ONNX Runtime even accepts a memory address there, so the check must come first. Throws
// Error that names the graph and the tensor.
void check_external_data(const Bundle &bundle, const std::string &part);

}  // namespace arcflow
