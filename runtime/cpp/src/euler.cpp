// A straight student's step, and guidance of its velocity by a negative prompt.
#include <cmath>
#include <cstddef>

#include "error.h"
#include "maths.h"

namespace arcflow {
namespace {

void check_same(const Tensor &one, const Tensor &other) {
    if (one.dtype != DType::float32 || other.dtype != DType::float32 || one.shape != other.shape) {
        throw Error(ARCFLOW_INTERNAL_ERROR,
                    "a step takes float32 tensors of one shape, got " + one.describe() + " and " + other.describe());
    }
}

}  // namespace

void euler(Tensor &latents, const Tensor &velocity, double step) {
    check_same(latents, velocity);
    const auto factor = static_cast<float>(step);
    const auto count = static_cast<size_t>(latents.count());
    float *x = latents.as<float>();
    const float *v = velocity.as<float>();
    for (size_t i = 0; i < count; ++i) x[i] -= v[i] * factor;
}

void guide(Tensor &velocity, const Tensor &negative, double scale) {
    check_same(velocity, negative);
    const auto factor = static_cast<float>(scale);
    const auto channels = static_cast<size_t>(velocity.shape.back());
    const size_t tokens = channels == 0 ? 0 : static_cast<size_t>(velocity.count()) / channels;
    for (size_t token = 0; token < tokens; ++token) {
        float *v = velocity.as<float>() + token * channels;
        const float *n = negative.as<float>() + token * channels;
        // In float64, which a square of a float32 number cannot overflow.
        double norm = 0, guided_norm = 0;
        for (size_t c = 0; c < channels; ++c) {
            norm += static_cast<double>(v[c]) * static_cast<double>(v[c]);
            v[c] = n[c] + factor * (v[c] - n[c]);
            guided_norm += static_cast<double>(v[c]) * static_cast<double>(v[c]);
        }
        if (guided_norm == 0) continue;
        const auto ratio = static_cast<float>(std::sqrt(norm) / std::sqrt(guided_norm));
        for (size_t c = 0; c < channels; ++c) v[c] *= ratio;
    }
}

}  // namespace arcflow
