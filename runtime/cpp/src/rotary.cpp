// Computes rotary position tables. Angles are float64, and each cosine and sine is rounded once. Positions are those of
// diffusers' `FluxPosEmbed`, and of `QwenEmbedRope` with `scale_rope`.
#include <algorithm>
#include <array>
#include <cmath>

#include "maths.h"

namespace arcflow {
namespace {

using Position = std::array<int64_t, 3>;  // time, height, width

// One table for `tokens` positions, [2, tokens, D/2]. On an axis of size d, frequency i turns by position /
// theta^(2i/d).
template <class PositionOf>
Tensor table(const Manifest &m, int64_t tokens, PositionOf position_of) {
    std::vector<double> frequencies;
    std::vector<size_t> axes;  // the axis of each frequency
    for (size_t axis = 0; axis < m.rotary.axes_dims.size(); ++axis) {
        const int64_t size = m.rotary.axes_dims[axis];
        for (int64_t i = 0; i < size; i += 2) {
            const double power = static_cast<double>(i) / static_cast<double>(size);
            frequencies.push_back(1.0 / std::pow(m.rotary.theta, power));
            axes.push_back(axis);
        }
    }
    // FLUX's reference implementation casts cosines and sines to its hidden dtype.
    const DType rounding = m.family == Family::flux ? m.rotary_dtype() : DType::float32;
    Tensor out(DType::float32, {2, tokens, static_cast<int64_t>(frequencies.size())});
    float *cosines = out.as<float>(), *sines = cosines + out.count() / 2;
    for (int64_t token = 0; token < tokens; ++token) {
        const Position position = position_of(token);
        for (size_t i = 0; i < frequencies.size(); ++i) {
            const double angle = static_cast<double>(position[axes[i]]) * frequencies[i];
            *cosines++ = round_to(static_cast<float>(std::cos(angle)), rounding);
            *sines++ = round_to(static_cast<float>(std::sin(angle)), rounding);
        }
    }
    return out;
}

}  // namespace

// FLUX: token (y, x) has position (0, y, x). Qwen-Image centres the grid: y runs from -(h - h//2) to h//2 - 1, and x
// likewise.
Tensor image_rotary(const Manifest &manifest, int64_t height, int64_t width) {
    const bool centred = manifest.family == Family::qwen_image;
    const int64_t top = centred ? height - height / 2 : 0, left = centred ? width - width / 2 : 0;
    return table(manifest, height * width,
                 [=](int64_t token) { return Position{0, token / width - top, token % width - left}; });
}

// FLUX: text tokens have position 0. Qwen-Image: text token j has position max(h//2, w//2) + j on all axes.
Tensor text_rotary(const Manifest &manifest, int64_t height, int64_t width, int64_t text_tokens) {
    const bool placed = manifest.family == Family::qwen_image;
    const int64_t first = std::max(height / 2, width / 2);
    return table(manifest, text_tokens, [=](int64_t token) {
        const int64_t position = placed ? first + token : 0;
        return Position{position, position, position};
    });
}

}  // namespace arcflow
