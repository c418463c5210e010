// The interface between the pipeline and the backends that run a graph: named tensors in, named tensors out.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "manifest.h"
#include "maths.h"
#include "tensor.h"

namespace arcflow {

using Tensors = std::map<std::string, Tensor>;

// One loaded part of a bundle. Several threads may call `run` at the same time.
class Engine {
public:
    virtual ~Engine() = default;

    // Takes one tensor for each input of the part, in the manifest's dtype, and returns one for each output. Throws
    // Error that names the part.
    virtual Tensors run(const Tensors &inputs) = 0;
};

// The images of a batch whose texts have the same length; the backbone runs them together. `images` [b]: each image's
// index in the batch. `prompts` [b]: each image's index along the axis U of the modulation. `states` [b, T, Dt]: text
// states in any float dtype. `rotary` [2, T, D/2] float32.
struct TextGroup {
    std::vector<int64_t> images, prompts;
    Tensor states;
    std::shared_ptr<const Tensor> rotary;
};

// Everything that the steps need. `streams`: where each image's noise begins. `shape`: shape of noise and latents, [B,
// N, C], where C is a multiple of noise_group. `modulation`: [S, U, M], or [S, 1, M] if it does not depend on the
// prompt, in any float dtype. `image_rotary`: [2, N, D/2] float32. `sigmas`: [S+1], falling.
struct DenoiseInputs {
    std::vector<NoiseStream> streams;
    std::vector<int64_t> shape;
    std::vector<TextGroup> groups;
    Tensor modulation;
    std::shared_ptr<const Tensor> image_rotary;
    std::vector<double> sigmas;
    int64_t height_px, width_px;
    bool decode;
};

// `latents`: [B, N, C] float32 after the last step. `pixels`: [B, H, W, 3] uint8 if `decode` was set. `stages_ms`: the
// device's time in milliseconds for "copy", "noise", "backbone", "update" and "decode".
struct Denoised {
    Tensor latents, pixels;
    std::vector<std::pair<std::string, double>> stages_ms;
};

// Runs noise, all backbone calls, all updates and the decoder on the device, without going back to the host in between.
// Several threads may call `run` at the same time. It has no step callback: a request with a callback runs the engines
// of Backend::open one by one, and gives the same latents.
class Denoiser {
public:
    virtual ~Denoiser() = default;

    // Throws Error that names the part. The caller checks the latents for NaN.
    virtual Denoised run(const DenoiseInputs &inputs) = 0;
};

// Opens the parts of bundles.
class Backend {
public:
    virtual ~Backend() = default;

    // Throws Error if this backend cannot run the bundle. Loads nothing.
    virtual void check(const Bundle &bundle) = 0;
    virtual std::unique_ptr<Engine> open(const Bundle &bundle, const std::string &part) = 0;

    // A Denoiser for the bundle, which must not outlive this backend, or null if the backend has none. It shares the
    // engines of backbone and decoder with `open`.
    virtual std::unique_ptr<Denoiser> open_denoiser(const Bundle &) { return nullptr; }
};

// Make the backend `name`, or the default for "". Throws Error that lists the backends of this build.
std::unique_ptr<Backend> make_backend(const std::string &name, int threads);

// The names of this build's backends, separated by commas.
const char *backend_names();

}  // namespace arcflow
