// The arithmetic on the host: noise, schedule, conditioning, rotary tables and the update. docs/bundle.md, "What a
// reader computes", specifies it.
#pragma once

#include <cstdint>
#include <vector>

#include "geometry.h"
#include "manifest.h"
#include "tensor.h"

namespace arcflow {

// Fill `out` with `count` standard normal numbers, equal bit for bit to torch.randn with a CPU generator seeded with
// `seed`, and to arcflow_runtime/maths/noise.py.
void randn(uint64_t seed, size_t count, float *out);

// Noise as packed latents [B, N, C] float32, for images of `height` x `width` latent pixels. With one seed a single
// generator makes the noise of the whole batch; with B seeds each image has its own generator.
Tensor packed_noise(const std::vector<uint64_t> &seeds, int64_t batch, const Latents &latents, int64_t height,
                    int64_t width);

// The generator makes this many numbers at a time; a GPU generates noise in whole groups only.
constexpr int64_t noise_group = ARCFLOW_NOISE_GROUP;

// Where a device's noise for one image begins: the generator's seed, and the index of the image's first number in that
// generator's sequence.
struct NoiseStream {
    uint32_t seed;
    int64_t first;
};

// The streams of a batch of images with `numbers` values each; `seeds` as for packed_noise.
std::vector<NoiseStream> noise_streams(const std::vector<uint64_t> &seeds, int64_t batch, int64_t numbers);

// The sigmas [S+1] of S steps, falling from 1 to 0, or from the first of the schedule's own sigmas. `image_tokens`: N
// of one image, which a dynamic shift depends on.
std::vector<double> sigmas(int64_t steps, const Schedule &schedule, int64_t image_tokens);

// The values that the student's embeddings of timestep [S] and guidance take.
std::vector<float> conditioning_timesteps(const std::vector<double> &sigmas, Family family, DType reference,
                                          Sampler sampler);
float conditioning_guidance(float scale, DType reference);

// Cosines and sines [2, tokens, D/2] float32, for the image tokens of a `height` x `width` grid and for its text
// tokens.
Tensor image_rotary(const Manifest &manifest, int64_t height, int64_t width);
Tensor text_rotary(const Manifest &manifest, int64_t height, int64_t width, int64_t text_tokens);

// The closed-form step, in place: `latents` [B, N, C] float32 go from `sigma` to `next`. `means` [B, N, K, C],
// `logweights` [B, N, K, P] and `loggammas` [B, N, K-1, P] may each be in any float dtype.
void update(Tensor &latents, const Tensor &means, const Tensor &logweights, const Tensor &loggammas, double sigma,
            double next);

// A straight student's step, in place: `latents` - `step` * `velocity`, both [B, N, C] float32. `step` is the sigma
// before minus the one after it.
void euler(Tensor &latents, const Tensor &velocity, double step);

// Guide a velocity away from that of a negative prompt, in place, and keep its norm at each token: negative + scale *
// (velocity - negative), scaled to the norm of `velocity` (diffusers' QwenImagePipeline). Both are [B, N, C] float32. A
// token whose guided velocity is 0 stays 0, where diffusers divides 0 by 0.
void guide(Tensor &velocity, const Tensor &negative, double scale);

}  // namespace arcflow
