// torch's CPU generator: MT19937 and a Box-Muller transform, 8 pairs at a time, whose log and sincos are the Cephes
// polynomials evaluated with fused multiply-add. See arcflow_runtime/noise.py, whose bits these are.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>

#include "error.h"
#include "maths.h"

namespace arcflow {
namespace {

constexpr size_t lanes = 8;  // pairs per block
using Lanes = std::array<float, lanes>;
using Block = std::array<float, 2 * lanes>;

constexpr double pi = 3.14159265358979323846;
constexpr float two_pi = static_cast<float>(2 * pi);
constexpr float sqrt_half = static_cast<float>(0.707106781186547524);
constexpr std::array<double, 9> log_coefficients = {7.0376836292e-2,  -1.1514610310e-1, 1.1676998740e-1,
                                                    -1.2420140846e-1, 1.4249322787e-1,  -1.6668057665e-1,
                                                    2.0000714765e-1,  -2.4999993993e-1, 3.3333331174e-1};
constexpr float ln2_high = static_cast<float>(0.693359375), ln2_low = static_cast<float>(-2.12194440e-4);
// pi/4 in three parts, each short enough for an exact product with a small integer.
constexpr std::array<double, 3> pi_4_parts = {-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8};
constexpr std::array<double, 3> sin_coefficients = {-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1};
constexpr std::array<double, 3> cos_coefficients = {2.443315711809948e-5, -1.388731625493765e-3,
                                                    4.166664568298827e-2};
constexpr float four_over_pi = static_cast<float>(1.27323954473516);

// The product of two float32 is exact in float64, so only the sum is rounded: twice, as in the Python runtime.
inline float fma(float a, float b, float c) {
    return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}

template <size_t count>
inline float polynomial(float x, const std::array<double, count> &coefficients) {
    float y = static_cast<float>(coefficients[0]);
    for (size_t i = 1; i < count; ++i) y = fma(y, x, static_cast<float>(coefficients[i]));
    return y;
}

// Natural logarithm of a positive normal number (Cephes logf).
inline float log_cephes(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const int32_t mantissa_bits = (bits & 0x7FFFFF) | 0x3F000000;
    float mantissa;  // in [0.5, 1)
    std::memcpy(&mantissa, &mantissa_bits, sizeof mantissa);
    const bool small = mantissa < sqrt_half;
    const float exponent = static_cast<float>((bits >> 23) - 126) - (small ? 1.0f : 0.0f);
    const float x = (mantissa - 1.0f) + (small ? mantissa : 0.0f);
    const float z = x * x;
    float y = fma(polynomial(x, log_coefficients) * x, z, exponent * ln2_low);
    y = fma(z, -0.5f, y);
    return fma(exponent, ln2_high, x + y);
}

// Sine and cosine of a number in [0, 2 pi] (Cephes sinf and cosf).
inline void sincos_cephes(float x, float &sin_x, float &cos_x) {
    const int32_t octant = (static_cast<int32_t>(x * four_over_pi) + 1) & ~1;
    const float y = static_cast<float>(octant);
    for (const double part : pi_4_parts) x = fma(y, static_cast<float>(part), x);
    const float z = x * x;
    const float cos = fma(polynomial(z, cos_coefficients) * z, z, z * -0.5f) + 1.0f;
    const float sin = fma(polynomial(z, sin_coefficients) * z, x, x);
    const int32_t quadrant = (octant >> 1) & 3;
    const bool odd = (quadrant & 1) == 1;
    sin_x = odd ? cos : sin;
    cos_x = odd ? sin : cos;
    sin_x = quadrant >= 2 ? -sin_x : sin_x;
    cos_x = quadrant == 1 || quadrant == 2 ? -cos_x : cos_x;
}

// The generator's next 16 numbers as uniforms of 24 bits: radii's first, then angles'.
void draw_uniforms(std::mt19937 &generator, Block &uniforms) {
    for (float &u : uniforms) u = static_cast<float>(generator() & 0xFFFFFFu) * 0x1p-24f;
}

// 16 uniforms in [0, 1) give 16 normals.
void box_muller(const Block &uniforms, float *out) {
    Lanes radius, sin, cos;
    for (size_t i = 0; i < lanes; ++i) radius[i] = std::sqrt(-2.0f * log_cephes(1.0f - uniforms[i]));
    for (size_t i = 0; i < lanes; ++i) sincos_cephes(two_pi * uniforms[lanes + i], sin[i], cos[i]);
    // Adding zero turns -0 into +0, as torch's `fma(x, std, mean)` does.
    for (size_t i = 0; i < lanes; ++i) out[i] = radius[i] * cos[i] + 0.0f;
    for (size_t i = 0; i < lanes; ++i) out[lanes + i] = radius[i] * sin[i] + 0.0f;
}

// torch's path below 16 numbers: Box-Muller in float64, from 53-bit uniforms, cosine first, then sine.
void randn_scalar(std::mt19937 &generator, size_t count, float *out) {
    const auto uniform = [&] {
        const uint64_t high = generator(), low = generator();
        return static_cast<double>((high << 32 | low) & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
    };
    for (size_t i = 0; i < count; i += 2) {
        const double theta = 2 * pi * uniform();
        const double radius = std::sqrt(-2 * std::log1p(-uniform()));
        out[i] = static_cast<float>(radius * std::cos(theta));
        if (i + 1 < count) out[i + 1] = static_cast<float>(radius * std::sin(theta));
    }
}

// [C, h, w] -> [(h/p)*(w/p), C*p*p], channel c*p*p + p*dy + dx.
void pack(const float *image, const Latents &latents, int64_t height, int64_t width, float *tokens) {
    const int64_t p = latents.patch_size, channels = latents.channels;
    for (int64_t y = 0; y < height; y += p) {
        for (int64_t x = 0; x < width; x += p) {
            for (int64_t c = 0; c < channels; ++c) {
                for (int64_t dy = 0; dy < p; ++dy) {
                    const float *row = image + (c * height + y + dy) * width + x;
                    tokens = std::copy(row, row + p, tokens);
                }
            }
        }
    }
}

}  // namespace

void randn(uint64_t seed, size_t count, float *out) {
    std::mt19937 generator(static_cast<uint32_t>(seed));  // its low 32 bits count
    if (count < 2 * lanes) return randn_scalar(generator, count, out);
    Block uniforms;
    const size_t tail = count % uniforms.size();
    for (size_t i = 0; i < count - tail; i += uniforms.size()) {
        draw_uniforms(generator, uniforms);
        box_muller(uniforms, out + i);
    }
    if (tail != 0) {  // torch draws the tail's uniforms, then 16 fresh ones, and computes the last 16 numbers again
        generator.discard(tail);
        draw_uniforms(generator, uniforms);
        box_muller(uniforms, out + count - uniforms.size());
    }
}

std::vector<NoiseStream> noise_streams(const std::vector<uint64_t> &seeds, int64_t batch, int64_t numbers) {
    std::vector<NoiseStream> streams;
    for (int64_t i = 0; i < batch; ++i) {
        if (seeds.size() == 1) streams.push_back({static_cast<uint32_t>(seeds[0]), i * numbers});
        else streams.push_back({static_cast<uint32_t>(seeds.at(static_cast<size_t>(i))), 0});
    }
    return streams;
}

Tensor draw_latents(const std::vector<uint64_t> &seeds, int64_t batch, const Latents &latents, int64_t height,
                    int64_t width) {
    const int64_t p = latents.patch_size;
    if (seeds.size() != 1 && static_cast<int64_t>(seeds.size()) != batch) {
        throw Error(ARCFLOW_INTERNAL_ERROR, "noise must be drawn with one seed or one per image, " +
                                                std::to_string(batch) + ", got " + std::to_string(seeds.size()));
    }
    if (height < 1 || width < 1 || height % p != 0 || width % p != 0) {
        throw Error(ARCFLOW_INTERNAL_ERROR, "latent sizes must be multiples of " + std::to_string(p) + ", got " +
                                                std::to_string(height) + " x " + std::to_string(width));
    }
    Tensor noise(DType::float32, {batch, latents.channels, height, width});
    Tensor tokens(DType::float32, {batch, (height / p) * (width / p), latents.channels * p * p});
    const auto each = static_cast<size_t>(noise.count()) / seeds.size();
    for (size_t i = 0; i < seeds.size(); ++i) randn(seeds[i], each, noise.as<float>() + i * each);
    const int64_t image = batch == 0 ? 0 : noise.count() / batch;
    for (int64_t b = 0; b < batch; ++b) {
        pack(noise.as<float>() + b * image, latents, height, width, tokens.as<float>() + b * image);
    }
    return tokens;
}

}  // namespace arcflow
