// The closed-form ArcFlow step on tensors of any float dtype; runtime/kernels/update_host.h has the formula.
#include "update_host.h"

#include <string>
#include <vector>

#include "error.h"
#include "maths.h"

namespace arcflow {
namespace {

using arcflow_update::Sizes;

// `count` values from index `first` as float32: a pointer into the tensor, or into `scratch` after conversion.
const float *as_floats(const Tensor &tensor, size_t first, size_t count, float *scratch) {
    if (tensor.dtype == DType::float32) return tensor.as<float>() + first;
    const uint16_t *bits = tensor.as<uint16_t>() + first;
    if (tensor.dtype == DType::bfloat16)
        for (size_t i = 0; i < count; ++i) scratch[i] = from_bfloat16(bits[i]);
    else
        for (size_t i = 0; i < count; ++i) scratch[i] = from_half(bits[i]);
    return scratch;
}

void check(const Tensor &tensor, const char *name, const std::vector<int64_t> &shape) {
    if (is_float(tensor.dtype) && tensor.shape == shape) return;
    throw engine_error(std::string("backbone: ") + name + " must be " + Tensor(DType::float32, shape).describe() +
                       " in a float type, got " + tensor.describe() + "; export the bundle again");
}

Sizes check_heads(const Tensor &latents, const Tensor &means, const Tensor &logweights, const Tensor &loggammas) {
    const std::vector<int64_t> &x = latents.shape;
    if (latents.dtype != DType::float32 || x.size() != 3)
        throw Error(ARCFLOW_INTERNAL_ERROR, "latents must be float32 [B, N, C], got " + latents.describe());
    if (logweights.shape.size() != 4 || logweights.shape[2] < 1 || logweights.shape[3] < 1 ||
        x[2] % logweights.shape[3] != 0) {
        throw engine_error("backbone: logweights must be [B, N, K, P] with P a divisor of " + std::to_string(x[2]) +
                           " channels, got " + logweights.describe() + "; export the bundle again");
    }
    const int64_t modes = logweights.shape[2], sub_pixels = logweights.shape[3];
    check(logweights, "logweights", {x[0], x[1], modes, sub_pixels});
    check(means, "means", {x[0], x[1], modes, x[2]});
    check(loggammas, "loggammas", {x[0], x[1], modes - 1, sub_pixels});
    return {static_cast<size_t>(modes), static_cast<size_t>(x[2]), static_cast<size_t>(sub_pixels)};
}

}  // namespace

void update(Tensor &latents, const Tensor &means, const Tensor &logweights, const Tensor &loggammas, double sigma,
            double next) {
    const Sizes n = check_heads(latents, means, logweights, loggammas);
    const size_t means_each = n.modes * n.channels, weights_each = n.modes * n.sub_pixels;
    const size_t gammas_each = weights_each - n.sub_pixels;
    std::vector<double> weights(n.modes);
    std::vector<float> scratch(means_each + 3 * weights_each + 2 * n.channels);
    float *const mean_row = scratch.data(), *const weight_row = mean_row + means_each;
    float *const gamma_row = weight_row + weights_each, *const token_coefficients = gamma_row + weights_each;
    float *const row = token_coefficients + weights_each, *const sum = row + n.channels;
    const auto tokens = static_cast<size_t>(latents.shape[0] * latents.shape[1]);
    for (size_t t = 0; t < tokens; ++t) {
        const float *w = as_floats(logweights, t * weights_each, weights_each, weight_row);
        const float *g = as_floats(loggammas, t * gammas_each, gammas_each, gamma_row);
        const float *m = as_floats(means, t * means_each, means_each, mean_row);
        arcflow_update::coefficients(w, g, n, sigma - next, weights.data(), token_coefficients);
        arcflow_update::mix(m, token_coefficients, n, row, sum, latents.as<float>() + t * n.channels);
    }
}

}  // namespace arcflow
