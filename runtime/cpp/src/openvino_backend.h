// The OpenVINO backend: a part's ONNX graph and weights -> an engine on the CPU.
#pragma once

#include <memory>

#include "engine.h"

namespace arcflow {

// `threads`: CPU threads per engine; 0: one per core. Throws Error if it is negative.
std::unique_ptr<Backend> make_openvino_backend(int threads);

}  // namespace arcflow
