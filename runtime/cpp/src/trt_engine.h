// An Engine for TensorRT with host tensors: for text encoders, and for a conditioner that is not in the graph, because
// its dtype differs from the backbone's or it does not stay loaded.
#pragma once

#include <memory>
#include <string>

#include "engine.h"
#include "trt_lane.h"
#include "trt_session.h"

namespace arcflow {

// An Engine whose session the denoiser makes contexts of.
class TrtEngine : public Engine {
public:
    virtual TrtSession &session() = 0;
};

// The engine shares ownership of lane and session.
std::unique_ptr<TrtEngine> make_trt_engine(std::shared_ptr<Lane> lane, std::shared_ptr<TrtSession> session,
                                           std::string name, Part part);

// The shapes of `tensors`, by name.
Shapes shapes_of(const Tensors &tensors);

}  // namespace arcflow
