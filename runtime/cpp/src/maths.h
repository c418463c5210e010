// What the host computes: noise, schedule, conditioning, rotary tables, update. docs/bundle.md, "What a reader
// computes".
#pragma once

#include <cstdint>
#include <vector>

#include "manifest.h"
#include "tensor.h"

namespace arcflow {

// torch.randn of a CPU generator, bit for bit those of arcflow_runtime/noise.py.
void randn(uint64_t seed, size_t count, float *out);

// Packed noise [B, N, C] float32 for pictures of `height` x `width` latent pixels: one seed draws the whole batch in
// one call, B seeds one image each.
Tensor draw_latents(const std::vector<uint64_t> &seeds, int64_t batch, const Latents &latents, int64_t height,
                    int64_t width);

// As many numbers come from as many uniforms, if there are so many.
constexpr int64_t noise_group = 16;

// Where the noise of one image begins, for a device that draws it: what `seed` seeds, and the image's first number in
// what that draws.
struct NoiseStream {
    uint32_t seed;
    int64_t first;
};

// Those of a batch whose images have `numbers` each; seeds as for draw_latents.
std::vector<NoiseStream> noise_streams(const std::vector<uint64_t> &seeds, int64_t batch, int64_t numbers);

// [S+1], falling from 1 to 0.
std::vector<double> sigmas(int64_t steps, const Schedule &schedule);

// What the timestep and guidance embeddings see: [S], and one number.
std::vector<float> conditioning_timesteps(const std::vector<double> &sigmas, Family family, DType reference);
float conditioning_guidance(float scale, DType reference);

// Cosines and sines [2, tokens, D/2] float32 of a grid of `height` x `width` tokens, and of its text.
Tensor image_rotary(const Manifest &manifest, int64_t height, int64_t width);
Tensor text_rotary(const Manifest &manifest, int64_t height, int64_t width, int64_t text_tokens);

// The closed-form step, in place: latents [B, N, C] float32 at `sigma` become those at `next`. means [B, N, K, C],
// logweights [B, N, K, P], loggammas [B, N, K-1, P], each in any float type.
void update(Tensor &latents, const Tensor &means, const Tensor &logweights, const Tensor &loggammas, double sigma,
            double next);

}  // namespace arcflow
