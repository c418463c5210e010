// The backend for engines of TensorRT or TensorRT-RTX that `arcflow build` made.
#pragma once

#include <memory>

#include "engine.h"

namespace arcflow {

// Throws Error if this library was compiled with the headers of the other of the two.
std::unique_ptr<Backend> make_trt_backend(bool rtx);

}  // namespace arcflow
