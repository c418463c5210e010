// A request of the C API, checked against a bundle and completed with defaults.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "arcflow/arcflow.h"
#include "manifest.h"

namespace arcflow {

struct TokenIds {
    std::vector<int64_t> ids, ids_2;
};

struct Request {
    std::vector<std::string> prompts;  // empty if tokens were given
    std::vector<TokenIds> tokens;
    int64_t images_per_prompt, height_px, width_px, steps, max_sequence_length;
    std::optional<float> guidance_scale;  // if the student takes guidance
    // One negative prompt for each prompt, in one of the two forms; both are empty if the images are not guided.
    std::vector<std::string> negative_prompts;
    std::vector<TokenIds> negative_tokens;
    double true_cfg_scale;
    std::vector<uint64_t> seeds;  // 1 or batch
    bool decode;
    arcflow_step_callback on_step;
    void *user;
    std::vector<std::string> warnings;

    int64_t prompt_count() const { return static_cast<int64_t>(prompts.empty() ? tokens.size() : prompts.size()); }
    bool guided() const { return !negative_prompts.empty() || !negative_tokens.empty(); }
    int64_t batch() const { return prompt_count() * images_per_prompt; }
};

// Throws Error(ARCFLOW_REQUEST_ERROR) that names the field of arcflow_request.
Request check_request(const arcflow_request &request, const Manifest &manifest);

}  // namespace arcflow
