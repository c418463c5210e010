// torch.randn's numbers on a CPU, for the C++ library and the Python runtime's compiled module.
#ifndef ARCFLOW_NOISE_HOST_H
#define ARCFLOW_NOISE_HOST_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>

#include "noise_math.h"

namespace arcflow_random {

// torch's method for fewer than 16 numbers: Box-Muller in float64 of 53-bit uniforms, cosine first, then sine.
inline void randn_scalar(std::mt19937 &generator, std::size_t count, float *out) {
    const auto uniform = [&] {
        const std::uint64_t high = generator(), low = generator();
        return static_cast<double>((high << 32 | low) & ((std::uint64_t{1} << 53) - 1)) * 0x1p-53;
    };
    for (std::size_t i = 0; i < count; i += 2) {
        const double theta = 6.283185307179586 * uniform();
        const double radius = std::sqrt(-2 * std::log1p(-uniform()));
        out[i] = static_cast<float>(radius * std::cos(theta));
        if (i + 1 < count) out[i + 1] = static_cast<float>(radius * std::sin(theta));
    }
}

// The next GROUP numbers of a generator.
inline void randn_group(std::mt19937 &generator, float *out) {
    float uniforms[GROUP];
    for (float &u : uniforms) u = uniform_of(static_cast<unsigned int>(generator()));
    for (int i = 0; i < GROUP / 2; ++i) {
        const Pair two = box_muller(uniforms[i], uniforms[i + GROUP / 2]);
        out[i] = two.first;
        out[i + GROUP / 2] = two.second;
    }
}

// `count` standard normal numbers of a generator seeded with the low 32 bits of `seed`.
inline void randn(std::uint64_t seed, std::size_t count, float *out) {
    std::mt19937 generator(static_cast<std::uint32_t>(seed));
    if (count < GROUP) return randn_scalar(generator, count, out);
    const std::size_t tail = count % GROUP;
    for (std::size_t i = 0; i < count - tail; i += GROUP) randn_group(generator, out + i);
    if (tail != 0) {
        // torch skips the tail's uniforms, takes 16 new ones, and computes the last 16 numbers again.
        generator.discard(tail);
        randn_group(generator, out + count - GROUP);
    }
}

}  // namespace arcflow_random

#endif
