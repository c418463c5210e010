// The pipeline: prompts -> tokens -> text states -> modulation -> latents -> pictures.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "parts.h"
#include "recent.h"
#include "request.h"
#include "stopwatch.h"
#include "text.h"

namespace arcflow {

// How to load, of arcflow_options.
struct LoadOptions {
    std::string backend;  // "" for the default
    int threads = 0;      // per engine; 0: one per core
    bool low_memory = false, full_check = false;
};

// What one call made: latents [B, N, C] float32 and, unless decoding was left out, pixels [B, H, W, 3] uint8.
struct Drawing {
    int64_t batch = 0, height_px = 0, width_px = 0;
    Tensor latents, pixels;
    std::vector<uint64_t> seeds;  // 1 or B, which draw the same noise again
    std::vector<std::string> warnings;
    // Wall times: of each stage, "total", and "engines", the part of it spent in engines.
    std::vector<std::pair<std::string, double>> timings_ms;
};

// A loaded bundle; calls from several threads are safe.
class Pipeline {
public:
    // Throws Error: the bundle is missing, damaged or of another version, or the backend cannot run it.
    Pipeline(const std::filesystem::path &bundle, const LoadOptions &options);
    Pipeline(Bundle bundle, std::unique_ptr<Backend> backend, bool low_memory);
    Pipeline(const Pipeline &) = delete;
    Pipeline &operator=(const Pipeline &) = delete;

    // Throws Error: an argument is wrong (nothing was run), an engine failed, or the latents are not finite.
    Drawing draw(const arcflow_request &request);

private:
    // The batch's distinct prompts in order of appearance, each image's place among them, and their embeddings.
    struct Prompts {
        std::vector<int64_t> of_image;
        std::vector<std::shared_ptr<const Embeddings>> embeddings;
    };

    Prompts encode(const Request &request, std::vector<std::string> &warnings, Stopwatch &watch);
    std::vector<std::shared_ptr<const Embeddings>> run_encoders(const std::vector<const Ids *> &prompts,
                                                                Stopwatch &watch);
    std::vector<Tensor> run_encoder(const std::string &part, const std::string &output,
                                    const std::vector<int64_t> &shape, const std::vector<const Ids *> &prompts,
                                    Stopwatch &watch);
    DenoiseInputs prepare(const Request &request, const Prompts &prompts, Stopwatch &watch);
    Tensor condition(const Request &request, const Prompts &prompts, const std::vector<double> &sigmas,
                     Stopwatch &watch);
    std::vector<TextGroup> group(const Prompts &prompts, int64_t height, int64_t width);
    std::shared_ptr<const Tensor> rotary(int64_t height, int64_t width, int64_t text_tokens = 0);  // 0: the image's
    Denoised run_denoiser(Denoiser &denoiser, const DenoiseInputs &inputs, Stopwatch &watch) const;
    Tensor run_steps(const DenoiseInputs &inputs, const Request &request, Stopwatch &watch);
    Tensor decode(const Tensor &latents, int64_t height, int64_t width, Stopwatch &watch);
    int64_t tokens(int64_t size_px) const;  // along one side

    const Bundle bundle_;
    PromptTokenizer tokenizer_;
    EmbeddingCache cache_;
    Recent<std::array<int64_t, 3>, Tensor> rotaries_;  // by height and width in tokens, and text tokens or 0
    const std::map<int64_t, Tensor> table_;            // baked modulation [n, M] float32 by step count n
    Parts parts_;
};

}  // namespace arcflow
