// Computes the schedule of sigmas and what the student's embeddings take.
#include "constants.h"
#include "error.h"
#include "maths.h"

namespace arcflow {

// t_i = 1 - i / (S - 1 + r) and sigma(t) = shift * t / (1 + (shift - 1) * t), where r is the timestep ratio (ArcFlow,
// arXiv 2602.09014). Two steps with shift 3.2 and r 1 give 1, 0.7619, 0.
std::vector<double> sigmas(int64_t steps, const Schedule &schedule) {
    if (steps < 1) {
        throw request_error("request.num_inference_steps must be at least 1, got " + std::to_string(steps) +
                            "; the default is " + std::to_string(schedule.num_inference_steps));
    }
    std::vector<double> sigmas;
    for (int64_t i = 0; i < steps; ++i) {
        const double t = 1 - static_cast<double>(i) / (static_cast<double>(steps - 1) + schedule.timestep_ratio);
        sigmas.push_back(schedule.shift * t / (1 + (schedule.shift - 1) * t));
    }
    sigmas.push_back(0);
    return sigmas;
}

// The students were trained in `reference`, so its rounding is part of their input. FLUX rounds sigma, multiplies by
// 1000 and rounds again: sigma 0.7619 gives 760 in bfloat16. Qwen-Image rounds sigma only: 761.71875.
std::vector<float> conditioning_timesteps(const std::vector<double> &sigmas, Family family, DType reference) {
    std::vector<float> timesteps;
    for (size_t i = 0; i + 1 < sigmas.size(); ++i) {
        const float timestep = round_to(static_cast<float>(sigmas[i]), reference) * timestep_scale;
        timesteps.push_back(family == Family::flux ? round_to(timestep, reference) : timestep);
    }
    return timesteps;
}

float conditioning_guidance(float scale, DType reference) {
    return round_to(round_to(scale, reference) * timestep_scale, reference);
}

}  // namespace arcflow
