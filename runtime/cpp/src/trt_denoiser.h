// The Denoiser on a GPU: a job -> latents and images, with one launch of a CUDA graph per job.
//
// The conditioner is in the graph if it stays loaded. If it does not (balanced), the modulation comes from the host,
// where it is cached. If backbone and decoder do not stay loaded either (low), each is loaded for its stage and freed
// after it, without a graph; only the buffers stay.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "engine.h"
#include "trt_lane.h"
#include "trt_plan.h"

namespace arcflow {

// Number of plans kept; the buffers of one for a 1024 px FLUX image take about 40 MB.
constexpr size_t default_max_plans = 8;

// (part, shapes of its inputs) -> "" if the part's engine takes them, else the reason why not.
using ShapeCheck = std::function<std::string(const std::string &part, const Shapes &)>;

// `parts` loads TrtEngines on this lane, and must outlive the denoiser. Throws Error if the update kernel cannot take
// the backbone's heads, or the kernels cannot be loaded.
std::unique_ptr<Denoiser> make_trt_denoiser(std::shared_ptr<Lane> lane, PartSource &parts, ShapeCheck check_shapes,
                                            const Manifest &manifest, size_t max_plans = default_max_plans);

}  // namespace arcflow
