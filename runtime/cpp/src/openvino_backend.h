// OpenVINO on a CPU: a part's ONNX graph and its safetensors weights -> an engine.
#pragma once

#include <memory>

#include "engine.h"

namespace arcflow {

// `threads` CPU threads per engine; 0: one per core. Throws Error on a negative number.
std::unique_ptr<Backend> make_openvino_backend(int threads);

}  // namespace arcflow
