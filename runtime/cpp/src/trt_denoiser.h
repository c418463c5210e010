// The Denoiser on a GPU: a job -> latents and images, with one launch of a CUDA graph per job.
#pragma once

#include <cstddef>
#include <memory>

#include "engine.h"
#include "trt_lane.h"
#include "trt_plan.h"

namespace arcflow {

// Number of plans kept; the buffers of one for a 1024 px FLUX image take about 40 MB.
constexpr size_t default_max_plans = 8;

// `conditioner`: the conditioner on host tensors, which runs if its dtype differs from the backbone's; null if the
// bundle has a table. Throws Error if the update kernel cannot take the backbone's heads, or the kernels cannot be
// loaded.
std::unique_ptr<Denoiser> make_trt_denoiser(std::shared_ptr<Lane> lane, Sessions sessions,
                                            std::unique_ptr<Engine> conditioner, const Manifest &manifest,
                                            size_t max_plans = default_max_plans);

}  // namespace arcflow
