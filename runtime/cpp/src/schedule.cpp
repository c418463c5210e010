// Computes the schedule of sigmas and what the student's embeddings take.
#include <cassert>
#include <cmath>

#include "constants.h"
#include "error.h"
#include "maths.h"

namespace arcflow {

// t_i = 1 - i / (S - 1 + r) and sigma(t) = shift * t / (1 + (shift - 1) * t), where r is the timestep ratio (ArcFlow,
// arXiv 2602.09014). Two steps with shift 3.2 and r 1 give 1, 0.7619, 0. A straight student's schedule may have its own
// t_i, a shift that depends on the number of image tokens, and a terminal sigma (B16), as diffusers'
// FlowMatchEulerDiscreteScheduler has.
std::vector<double> sigmas(int64_t steps, const Schedule &schedule, int64_t image_tokens) {
    if (steps < 1) {
        throw request_error("request.num_inference_steps must be at least 1, got " + std::to_string(steps) +
                            "; the default is " + std::to_string(schedule.num_inference_steps));
    }
    assert(!schedule.sigmas || schedule.sigmas->size() == static_cast<size_t>(steps));  // check_request checks it
    double shift = schedule.shift;
    if (schedule.dynamic_shift) {
        const double mu = schedule.dynamic_shift->mu(image_tokens);
        shift = schedule.dynamic_shift->exponential ? std::exp(mu) : mu;
    }
    std::vector<double> sigmas;
    for (int64_t i = 0; i < steps; ++i) {
        const double t = schedule.sigmas
                             ? (*schedule.sigmas)[static_cast<size_t>(i)]
                             : 1 - static_cast<double>(i) / (static_cast<double>(steps - 1) + schedule.timestep_ratio);
        sigmas.push_back(shift * t / (1 + (shift - 1) * t));
    }
    // With one step the only sigma is 1, which stretching would not change; diffusers divides 0 by 0 there.
    if (schedule.terminal && sigmas.back() < 1) {
        const double stretch = (1 - *schedule.terminal) / (1 - sigmas.back());
        for (double &sigma : sigmas) sigma = 1 - (1 - sigma) * stretch;
    }
    sigmas.push_back(0);
    return sigmas;
}

// The students were trained in `reference`, so its rounding is part of their input. FLUX rounds sigma, multiplies by
// 1000 and rounds again: sigma 0.7619 gives 760 in bfloat16. Qwen-Image rounds sigma only: 761.71875. diffusers'
// pipelines, which a straight student reproduces, first round 1000 sigma, and a thousandth of that is the sigma here.
std::vector<float> conditioning_timesteps(const std::vector<double> &sigmas, Family family, DType reference,
                                          Sampler sampler) {
    std::vector<float> timesteps;
    for (size_t i = 0; i + 1 < sigmas.size(); ++i) {
        auto sigma = static_cast<float>(sigmas[i]);
        if (sampler == Sampler::linear) sigma = round_to(sigma * timestep_scale, reference) / timestep_scale;
        const float timestep = round_to(sigma, reference) * timestep_scale;
        timesteps.push_back(family == Family::flux ? round_to(timestep, reference) : timestep);
    }
    return timesteps;
}

float conditioning_guidance(float scale, DType reference) {
    return round_to(round_to(scale, reference) * timestep_scale, reference);
}

}  // namespace arcflow
