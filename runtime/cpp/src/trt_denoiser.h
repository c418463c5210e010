// The Denoiser for TensorRT: runs noise, all backbone calls, updates and decoder as one CUDA graph per request shape.
#pragma once

#include <memory>

#include "engine.h"
#include "trt_session.h"

namespace arcflow {

// Throws Error if the update kernel cannot take the backbone's heads, or the kernels cannot be loaded.
std::unique_ptr<Denoiser> make_trt_denoiser(std::shared_ptr<const cuda::Device> device,
                                            std::shared_ptr<TrtSession> backbone, std::shared_ptr<TrtSession> decoder,
                                            const Manifest &manifest);

}  // namespace arcflow
