// The backbone of every step, the updates between and the decoder as one CUDA graph per shape: inputs of a request ->
// latents and pixels.
#pragma once

#include <memory>

#include "engine.h"
#include "trt_session.h"

namespace arcflow {

// Throws Error where the backbone's heads are not what the update kernel takes, or the kernel cannot be loaded.
std::unique_ptr<Denoiser> make_trt_denoiser(std::shared_ptr<const cuda::Device> device,
                                            std::shared_ptr<TrtSession> backbone, std::shared_ptr<TrtSession> decoder,
                                            const Manifest &manifest);

}  // namespace arcflow
