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
#include "memory_mode.h"
#include "tensor.h"

namespace arcflow {

using Tensors = std::map<std::string, Tensor>;

struct Lora;           // lora.h
struct PreparedLoras;  // lora.h

// One loaded part of a bundle. Several threads may call `run` at the same time.
class Engine {
public:
    virtual ~Engine() = default;

    // Takes one tensor for each input of the part, in the manifest's dtype, and returns one for each output. Throws
    // Error that names the part.
    virtual Tensors run(const Tensors &inputs) = 0;

    // The same with inputs of the part's LoRA slots (B14). A slot that `slots` lacks is left as without a LoRA.
    virtual Tensors run_with_slots(const Tensors &, const Tensors &) {
        throw engine_error("this backend runs no LoRA slots; this is a bug in libarcflow");
    }
};

// One prompt's text states [1, T, Dt] and, for FLUX only, CLIP's pooled vector [1, Dp].
struct Embeddings {
    Tensor states, pooled;
};

// The negative prompts of a job's images, for guidance (B16): `texts` [b], which all have T tokens, `text_rotary`
// [2, T, D/2] float32. T may differ from that of the prompts.
struct NegativeTexts {
    std::vector<std::shared_ptr<const Embeddings>> texts;
    std::shared_ptr<const Tensor> text_rotary;
    float scale;
};

// What a Denoiser takes: b images whose texts all have T tokens. `streams` [b]: where each image's noise begins.
// `texts` [b]: one for each image. `image_rotary` [2, N, D/2] and `text_rotary` [2, T, D/2] float32. `height` and
// `width`: the grid of image tokens. `sigmas` [S+1], falling. `timesteps` [S] and `guidance`: inputs of the
// conditioner; a student without guidance has none. `table`: the baked modulation [S, M] float32, with the changes of
// its LoRAs, or null if the conditioner must run. `pixels`: whether to decode. `loras`: those of all images, or null.
// `negative`: guides a straight student.
struct DenoiseJob {
    std::vector<NoiseStream> streams;
    std::vector<std::shared_ptr<const Embeddings>> texts;
    std::shared_ptr<const Tensor> image_rotary, text_rotary;
    int64_t height, width;
    std::vector<double> sigmas;
    std::vector<float> timesteps;
    std::optional<float> guidance;
    std::shared_ptr<const Tensor> table;
    bool pixels;
    std::shared_ptr<const PreparedLoras> loras;
    std::optional<NegativeTexts> negative;
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

    // Free what is kept of a LoRA, now or after the running job. Does not wait for that.
    virtual void forget(const Lora &) {}
};

// The engines of a bundle, some of which stay loaded. Several threads may use it at the same time.
class PartSource {
public:
    virtual ~PartSource() = default;

    virtual bool keeps(const std::string &part) const = 0;

    // The engine of a part. One that does not stay loaded is loaded now, and freed with the last copy of the pointer,
    // in the same thread. Only one of those is in memory at a time, so a thread must not borrow two of them; other
    // threads wait. Throws Error if the part cannot be loaded, or the bundle was replaced since it was opened.
    virtual std::shared_ptr<Engine> borrow(const std::string &part) = 0;
};

// Opens the parts of bundles.
class Backend {
public:
    virtual ~Backend() = default;

    // Throws Error if this backend cannot run the bundle. Loads nothing.
    virtual void check(const Bundle &bundle) = 0;
    virtual std::unique_ptr<Engine> open(const Bundle &bundle, const std::string &part) = 0;

    // A Denoiser that runs the engines of `parts`, which `open` made, or null if the backend has none. It must not
    // outlive this backend and `parts`.
    virtual std::unique_ptr<Denoiser> open_denoiser(const Bundle &, PartSource &) { return nullptr; }

    // The memory mode that fits the free memory of the device, for an image of the usual size. If it is not resident,
    // a line on stderr says why. `check` has accepted the bundle. Throws Error.
    virtual MemoryMode fitting_memory(const Bundle &) { return MemoryMode::resident; }
};

// Make the backend `name`, or the default for "". Throws Error that lists the backends of this build.
std::unique_ptr<Backend> make_backend(const std::string &name, int threads);

// The names of this build's backends, separated by commas.
const char *backend_names();

}  // namespace arcflow
