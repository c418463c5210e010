// The pipeline: prompts -> tokens -> text states -> modulation -> latents -> images.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lora.h"
#include "modulations.h"
#include "parts.h"
#include "recent.h"
#include "request.h"
#include "stopwatch.h"
#include "text.h"

namespace arcflow {

// The options of arcflow_options.
struct LoadOptions {
    std::string backend;                    // "": the default
    int threads = 0;                        // CPU threads per engine; 0: one per core
    std::optional<MemoryMode> memory = {};  // by the free memory
    bool full_check = false;
};

// The result of one request: latents [B, N, C] float32 and, unless decoding was skipped, pixels [B, H, W, 3] uint8.
struct Images {
    int64_t batch = 0, height_px = 0, width_px = 0;
    Tensor latents, pixels;
    std::vector<uint64_t> seeds;  // 1 or B, which reproduce the images
    std::vector<std::string> warnings;
    // Milliseconds of each stage, of "engines" (the part of the stages spent in engines) and of "total".
    std::vector<std::pair<std::string, double>> timings_ms;
};

// A loaded bundle. Several threads may call `generate` at the same time.
class Pipeline {
public:
    // Throws Error if the bundle is missing, damaged or of another version, or if the backend cannot run it.
    Pipeline(const std::filesystem::path &bundle, const LoadOptions &options);
    Pipeline(Bundle bundle, std::unique_ptr<Backend> backend, std::optional<MemoryMode> memory);
    Pipeline(const Pipeline &) = delete;
    Pipeline &operator=(const Pipeline &) = delete;

    // Throws Error if an argument is invalid (then nothing was run), an engine fails, or the latents are not finite.
    Images generate(const arcflow_request &request, const std::vector<ScaledLora> &loras = {});

    // Read a converted LoRA for `generate`. Throws Error(ARCFLOW_LORA_ERROR).
    std::shared_ptr<const Lora> open_lora(const std::filesystem::path &path) const;

    // Free what was prepared of a LoRA; requests that are running keep theirs.
    void forget_lora(const Lora &lora);

    // The memory mode, given or chosen by default.
    MemoryMode memory() const { return parts_.mode(); }

private:
    // `embeddings` of the distinct prompts, then negative prompts, in order of first appearance. `of_image` is each
    // image's index among them, `negative_of_image` that of its negative prompt; it is empty if there is no guidance.
    struct Prompts {
        std::vector<int64_t> of_image, negative_of_image;
        std::vector<std::shared_ptr<const Embeddings>> embeddings;
    };

    // The images of a batch whose texts have the same length T; the backbone runs them together. `images` [b]: each
    // image's index in the batch. `prompts` [b]: each image's index in Prompts::embeddings. `rotary` [2, T, D/2].
    struct Group {
        std::vector<int64_t> images, prompts;
        std::shared_ptr<const Tensor> rotary;
    };

    // The backbone's inputs for each group of a batch, all but latents and modulation, and the number of rows that the
    // modulation has for each step: one for each prompt, or 1.
    struct Pass {
        std::vector<Group> groups;
        std::vector<Tensors> inputs;
        int64_t rows_of_step;
    };

    struct JobGroup;

    Prompts encode(const Request &request, const PreparedLoras &loras, std::vector<std::string> &warnings,
                   Stopwatch &watch);
    std::vector<std::shared_ptr<const Embeddings>> run_encoders(const std::vector<const Ids *> &prompts,
                                                                const PreparedLoras &loras, Stopwatch &watch);
    std::vector<Tensor> run_encoder(const std::string &part, const std::string &output,
                                    const std::vector<int64_t> &shape, const std::vector<const Ids *> &prompts,
                                    const Tensors *slots, Stopwatch &watch);
    std::shared_ptr<const Tensor> baked(int64_t steps, const PreparedLoras &loras);
    Tensor condition(const Request &request, const PreparedLoras &loras, const Prompts &prompts, Stopwatch &watch);
    std::vector<double> schedule(const Request &request) const;  // the sigmas
    std::vector<float> timesteps(const Request &request) const;
    std::optional<float> guidance(const Request &request) const;
    std::vector<Group> group(const Prompts &prompts, const std::vector<int64_t> &of_image, int64_t height,
                             int64_t width);
    std::vector<JobGroup> job_groups(const Prompts &prompts, int64_t height, int64_t width);
    // The rotary table of the text if `text_tokens` is above 0, otherwise that of the image.
    std::shared_ptr<const Tensor> rotary(int64_t height, int64_t width, int64_t text_tokens = 0);
    Denoised run_denoiser(Denoiser &denoiser, const Request &request, const std::shared_ptr<const PreparedLoras> &loras,
                          const Prompts &prompts, Stopwatch &watch);
    Denoised run_job(Denoiser &denoiser, const DenoiseJob &job, const OnStep &on_step, Stopwatch &watch) const;
    Pass prepare(std::vector<Group> groups, const Prompts &prompts, const Tensor &image_rotary, int64_t rows_of_step,
                 const Parts::Use &backbone) const;
    // In these three, `modulation` is [S * rows_of_step, M].
    Tensors run_backbone(Parts::Use &backbone, Pass &pass, std::size_t group, const Tensor &latents,
                         const Tensor &modulation, int64_t step, Stopwatch &watch) const;
    void momentum_step(Parts::Use &backbone, Pass &pass, Tensor &latents, const Tensor &modulation, int64_t step,
                       const std::vector<double> &schedule, Stopwatch &watch) const;
    Tensor velocity(Parts::Use &backbone, Pass &pass, const Tensor &latents, const Tensor &modulation, int64_t step,
                    Stopwatch &watch) const;
    Tensor run_steps(const Request &request, const PreparedLoras &loras, const Prompts &prompts, Stopwatch &watch);
    Tensor decode(const Tensor &latents, int64_t height, int64_t width, Stopwatch &watch);
    int64_t tokens(int64_t size_px) const;  // tokens along a side of this length

    const Bundle bundle_;
    PromptTokenizer tokenizer_;
    EmbeddingCache cache_;
    Recent<std::array<int64_t, 3>, Tensor> rotaries_;  // key: height and width in tokens, and text tokens or 0
    const std::map<int64_t, Tensor> table_;            // baked modulation [n, M] float32 by number of steps n
    const std::map<int64_t, Tensor> conditioning_;     // input [n, in] of the table's LoRA slots, by n
    Recent<std::pair<LoraKey, int64_t>, Tensor> changed_{changed_tables};  // the table with LoRAs, by these and n
    LoraSets lora_sets_;
    ModulationCache modulations_{cached_modulations,
                                 cached_modulation_bytes};  // of conditioners that run outside a Denoiser
    Parts parts_;
};

}  // namespace arcflow
