// Engines of TensorRT and TensorRT-RTX that `arcflow build` made.
#pragma once

#include <memory>

#include "engine.h"

namespace arcflow {

// Throws Error where this library was compiled with the other one's headers.
std::unique_ptr<Backend> make_trt_backend(bool rtx);

}  // namespace arcflow
