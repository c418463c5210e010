// The interface between the pipeline and what runs a graph: named tensors in, named tensors out.
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

// One loaded part of a bundle. `run` may be called from several threads at once.
class Engine {
public:
    virtual ~Engine() = default;

    // One tensor per input of the part, of the manifest's dtype; gives one per output. Throws Error that names the
    // part.
    virtual Tensors run(const Tensors &inputs) = 0;
};

// The images of a batch whose text has one length, run together. `images` [b] are their places in the batch, `prompts`
// [b] their prompts' places in the modulation's axis U, `states` [b, T, Dt] their text states in any float dtype,
// `rotary` [2, T, D/2] float32.
struct TextGroup {
    std::vector<int64_t> images, prompts;
    Tensor states;
    std::shared_ptr<const Tensor> rotary;
};

// What every step of a schedule takes. `streams` of the noise, one per image; `shape` of noise and latents, [B, N, C],
// where C is a multiple of noise_group; modulation [S, U, M], or [S, 1, M] where it does not depend on the prompt, in
// any float dtype; image_rotary [2, N, D/2] float32; sigmas [S+1], falling.
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

// latents [B, N, C] float32 after the last step; pixels [B, H, W, 3] uint8 if they were asked for. `stages_ms` are the
// device's milliseconds in "copy", "noise", "backbone", "update" and "decode".
struct Denoised {
    Tensor latents, pixels;
    std::vector<std::pair<std::string, double>> stages_ms;
};

// Noise, the backbone of every step, the updates between and the decoder without a return to the host, for backends
// that have a way to run them at one go. `run` may be called from several threads at once. It has no step callback: a
// request with one is run through Backend::open's engines, which gives the same latents.
class Denoiser {
public:
    virtual ~Denoiser() = default;

    // Throws Error that names the part. Latents are not checked for NaN; that is the caller's.
    virtual Denoised run(const DenoiseInputs &inputs) = 0;
};

// Opens the parts of bundles.
class Backend {
public:
    virtual ~Backend() = default;

    // Throws Error if this backend cannot run the bundle, before anything is loaded.
    virtual void check(const Bundle &bundle) = 0;
    virtual std::unique_ptr<Engine> open(const Bundle &bundle, const std::string &part) = 0;

    // The backbone and decoder of a bundle behind one call, which must not outlive this backend; null where a backend
    // has none. It shares the engines of these parts with `open`.
    virtual std::unique_ptr<Denoiser> open_denoiser(const Bundle &) { return nullptr; }
};

// The backend of a name, "" for the default. Throws Error that lists those this library was built with.
std::unique_ptr<Backend> make_backend(const std::string &name, int threads);

// The names, separated by commas.
const char *backend_names();

}  // namespace arcflow
