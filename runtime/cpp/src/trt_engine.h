// An Engine for TensorRT with host tensors: for text encoders, for a conditioner whose dtype differs from the
// backbone's, and for all parts with low_memory.
#pragma once

#include <memory>
#include <string>

#include "engine.h"
#include "trt_lane.h"
#include "trt_session.h"

namespace arcflow {

// The engine shares ownership of lane and session.
std::unique_ptr<Engine> make_trt_engine(std::shared_ptr<Lane> lane, std::shared_ptr<TrtSession> session,
                                        std::string name, Part part);

// The shapes of `tensors`, by name.
Shapes shapes_of(const Tensors &tensors);

}  // namespace arcflow
