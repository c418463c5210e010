// Computes the closed-form ArcFlow step on a CPU. With s the sigma at which the student was evaluated, e the next, d =
// s - e, w = softmax_k(logweights), loggamma_0 = 0 and phi(z) = expm1(z) / z (ArcFlow, arXiv 2602.09014):
//
//     x_e = x_s - d * sum_k w_k * mean_k * phi(loggamma_k * d)
//
// The coefficient of each mode and sub-pixel is computed in float64, because an error of half an ulp in exp's argument
// z becomes |z| half ulps in its result; there are sixteen times fewer coefficients than means. Latents, means and the
// sum are float32.
//
// The C++ library and the Python runtime's compiled module use it.
#ifndef ARCFLOW_UPDATE_HOST_H
#define ARCFLOW_UPDATE_HOST_H

#include <algorithm>
#include <cmath>
#include <cstring>

namespace arcflow_update {

using std::size_t;

// expm1(z) / z, and its limit 1 at 0.
inline double phi(double z) { return z == 0 ? 1.0 : std::expm1(z) / z; }

// Sizes of the heads of one token: modes, channels, sub-pixels.
struct Sizes {
    size_t modes, channels, sub_pixels;
};

// The coefficients d * w_k * phi(loggamma_k * d) of one token: logweights [K, P], loggammas [K-1, P] -> out [K, P].
// `weights` is scratch for K numbers.
inline void coefficients(const float *logweights, const float *loggammas, const Sizes &n, double step, double *weights,
                         float *out) {
    for (size_t p = 0; p < n.sub_pixels; ++p) {
        double largest = logweights[p];
        for (size_t k = 1; k < n.modes; ++k) {
            const double logweight = logweights[k * n.sub_pixels + p];
            // Keeps a NaN, so that it reaches the latents, where the caller refuses it.
            if (!(logweight <= largest)) largest = logweight;
        }
        double sum = 0;
        for (size_t k = 0; k < n.modes; ++k) {
            weights[k] = std::exp(static_cast<double>(logweights[k * n.sub_pixels + p]) - largest);
            sum += weights[k];
        }
        for (size_t k = 0; k < n.modes; ++k) {
            const double gamma = k == 0 ? 0.0 : static_cast<double>(loggammas[(k - 1) * n.sub_pixels + p]);
            out[k * n.sub_pixels + p] = static_cast<float>(weights[k] / sum * phi(gamma * step) * step);
        }
    }
}

// Repeat one mode's coefficients [P] over the channels [C]: channel c*P + p gets coefficient p.
inline void tile(const float *coefficients, const Sizes &n, float *row) {
    std::copy(coefficients, coefficients + n.sub_pixels, row);
    for (size_t done = n.sub_pixels; done < n.channels; done *= 2)
        std::memcpy(row + done, row, std::min(done, n.channels - done) * sizeof(float));
}

// latents[c] -= sum_k coefficients[k, c % P] * means[k, c] for one token. `row` and `sum` are scratch for C numbers.
inline void mix(const float *means, const float *coefficients, const Sizes &n, float *row, float *sum, float *latents) {
    std::fill(sum, sum + n.channels, 0.0f);
    for (size_t k = 0; k < n.modes; ++k) {
        tile(coefficients + k * n.sub_pixels, n, row);
        const float *mean = means + k * n.channels;
        for (size_t c = 0; c < n.channels; ++c) sum[c] += row[c] * mean[c];
    }
    for (size_t c = 0; c < n.channels; ++c) latents[c] -= sum[c];
}

}  // namespace arcflow_update

#endif
