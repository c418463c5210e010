// Noise of a batch: seeds -> packed latents. The generator is in runtime/kernels/noise_host.h.
#include "noise_host.h"

#include <algorithm>
#include <string>

#include "error.h"
#include "maths.h"

namespace arcflow {
namespace {

// Pack one image: [C, h, w] -> [(h/p)*(w/p), C*p*p], where channel c*p*p + p*dy + dx holds channel c of pixel (dy, dx).
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

void randn(uint64_t seed, size_t count, float *out) { arcflow_random::randn(seed, count, out); }

std::vector<NoiseStream> noise_streams(const std::vector<uint64_t> &seeds, int64_t batch, int64_t numbers) {
    std::vector<NoiseStream> streams;
    for (int64_t i = 0; i < batch; ++i)
        if (seeds.size() == 1) streams.push_back({static_cast<uint32_t>(seeds[0]), i * numbers});
        else streams.push_back({static_cast<uint32_t>(seeds.at(static_cast<size_t>(i))), 0});
    return streams;
}

Tensor packed_noise(const std::vector<uint64_t> &seeds, int64_t batch, const Latents &latents, int64_t height,
                    int64_t width) {
    const int64_t p = latents.patch_size;
    if (seeds.size() != 1 && static_cast<int64_t>(seeds.size()) != batch) {
        throw Error(ARCFLOW_INTERNAL_ERROR, "noise needs one seed, or one per image, " + std::to_string(batch) +
                                                ", got " + std::to_string(seeds.size()));
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
    for (int64_t b = 0; b < batch; ++b)
        pack(noise.as<float>() + b * image, latents, height, width, tokens.as<float>() + b * image);
    return tokens;
}

}  // namespace arcflow
