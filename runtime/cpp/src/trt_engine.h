// An Engine for TensorRT with host tensors: for text encoders and conditioner, and for all parts if a request has a
// step callback.
#pragma once

#include <memory>
#include <string>

#include "engine.h"
#include "trt_session.h"

namespace arcflow {

// The engine shares ownership of device and session.
std::unique_ptr<Engine> make_trt_engine(std::shared_ptr<const cuda::Device> device, std::shared_ptr<TrtSession> session,
                                        std::string name, Part part);

// The shapes of `tensors`, by name.
Shapes shapes_of(const Tensors &tensors);

// The entry `name` of a part's inputs or outputs. Throws Error if there is none.
const TensorSpec &spec_of(const std::vector<TensorSpec> &specs, const std::string &name, const std::string &part);

// Bytes of a tensor. Throws Error, which `what` names, if a size is unknown (negative).
size_t bytes_of(const std::vector<int64_t> &shape, DType dtype, const std::string &what);

// `bytes` rounded up to TensorRT's alignment, so that the next tensor starts aligned.
size_t aligned(size_t bytes);

}  // namespace arcflow
