// The interface between the pipeline and the backends that run a graph: named tensors in, named tensors out.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
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

    // The same with inputs of the part's LoRA slots (B14); slots that `slots` lacks get a LoRA of rank 0. A backend
    // whose `check` refuses bundles with slots has no need of it.
    virtual Tensors run_with_slots(const Tensors &, const Tensors &) {
        throw engine_error("this backend runs no LoRA slots; this is a bug in libarcflow");
    }
};

// One prompt's text states [1, T, Dt] and, for FLUX only, CLIP's pooled vector [1, Dp].
struct Embeddings {
    Tensor states, pooled;
};

// What a Denoiser takes: b images whose texts all have T tokens. `streams` [b]: where each image's noise begins.
// `texts` [b]: one for each image. `image_rotary` [2, N, D/2] and `text_rotary` [2, T, D/2] float32. `height` and
// `width`: the grid of image tokens. `sigmas` [S+1], falling. `timesteps` [S] and `guidance`: inputs of the
// conditioner; a student without guidance has none. `table`: the baked modulation [S, M] float32, or null if the
// conditioner must run. `pixels`: whether to decode.
struct DenoiseJob {
    std::vector<NoiseStream> streams;
    std::vector<std::shared_ptr<const Embeddings>> texts;
    std::shared_ptr<const Tensor> image_rotary, text_rotary;
    int64_t height, width;
    std::vector<double> sigmas;
    std::vector<float> timesteps;
    std::optional<float> guidance;
    const Tensor *table;
    bool pixels;
};

// `latents`: [b, N, C] float32 after the last step. `pixels`: [b, H, W, 3] uint8 if the job asked for them.
// `stages_ms`: the device's time in milliseconds for "copy", "noise", "condition", "backbone", "update" and "decode".
struct Denoised {
    Tensor latents, pixels;
    std::vector<std::pair<std::string, double>> stages_ms;
};

// Called with the index of a step and the latents after it, [b, N, C] float32. What it throws ends the job.
using OnStep = std::function<void(int64_t, const Tensor &)>;

// Runs conditioner, noise, all backbone calls, all updates and the decoder on the device, without going back to the
// host in between. Several threads may call `run` at the same time.
class Denoiser {
public:
    virtual ~Denoiser() = default;

    // `on_step` may be empty; otherwise it is called after every step, before the next one starts. Throws Error that
    // names the part. The caller checks the latents for NaN.
    virtual Denoised run(const DenoiseJob &job, const OnStep &on_step) = 0;
};

// Opens the parts of bundles.
class Backend {
public:
    virtual ~Backend() = default;

    // Throws Error if this backend cannot run the bundle. Loads nothing.
    virtual void check(const Bundle &bundle) = 0;
    virtual std::unique_ptr<Engine> open(const Bundle &bundle, const std::string &part) = 0;

    // A Denoiser for the bundle, which must not outlive this backend, or null if the backend has none. It shares its
    // engines with `open`.
    virtual std::unique_ptr<Denoiser> open_denoiser(const Bundle &) { return nullptr; }
};

// Make the backend `name`, or the default for "". Throws Error that lists the backends of this build.
std::unique_ptr<Backend> make_backend(const std::string &name, int threads);

// The names of this build's backends, separated by commas.
const char *backend_names();

}  // namespace arcflow
