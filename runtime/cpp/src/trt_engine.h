// A part's engine on host tensors, for the parts that run by themselves: text encoders and conditioner, and any part of
// a request with a step callback.
#pragma once

#include <memory>
#include <string>

#include "engine.h"
#include "trt_session.h"

namespace arcflow {

// The session and device must stay while the engine does; they are shared.
std::unique_ptr<Engine> make_trt_engine(std::shared_ptr<const cuda::Device> device, std::shared_ptr<TrtSession> session,
                                        std::string name, Part part);

// The sizes of `tensors`, by name.
Shapes shapes_of(const Tensors &tensors);

// Of a part's input or output. Throws Error where it has none of this name.
const TensorSpec &spec_of(const std::vector<TensorSpec> &specs, const std::string &name, const std::string &part);

// `shape` as a tensor of `dtype` takes; throws Error where a size is still unknown.
size_t bytes_of(const std::vector<int64_t> &shape, DType dtype, const std::string &what);

// Rounded up, so that the next tensor lies where TensorRT wants every tensor.
size_t aligned(size_t bytes);

}  // namespace arcflow
