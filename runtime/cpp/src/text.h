// Prompts -> token ids for a bundle's text encoders, and a bounded cache of their embeddings.
//
// FLUX: CLIP's ids padded to 77 and T5's padded to max_sequence_length. Qwen-Image: the chat template with the prompt
// in it, unpadded, so that a prompt's length never depends on its neighbours'.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "recent.h"
#include "request.h"
#include "tokenizer.h"

namespace arcflow {

// The input of each text encoder by its part's name. Embeddings depend on nothing else, so it is their key as well.
using Ids = std::map<std::string, std::vector<int64_t>>;

// One prompt's text states [1, T, Dt] and, for FLUX, CLIP's pooled vector [1, Dp].
struct Embeddings {
    Tensor states, pooled;
};

// Tokenises prompts for one bundle; safe to call from several threads.
class PromptTokenizer {
public:
    // Throws Error where tokenizers were built and are damaged. `bundle` must outlive the object.
    explicit PromptTokenizer(const Bundle &bundle);

    // The ids of each of the request's prompts, cut and padded; a warning for each distinct prompt that was cut is
    // appended to `warnings`. Throws Error where the bundle has no tokenizers and the request no ids.
    std::vector<Ids> tokenize(const Request &request, std::vector<std::string> &warnings);

private:
    // What one prompt gives.
    struct Text {
        Ids ids;
        std::vector<std::string> warnings;
    };

    Text text(const std::string &prompt, int64_t max_sequence_length) const;
    Ids padded(std::vector<int64_t> ids, std::vector<int64_t> ids_2, int64_t max_sequence_length) const;
    std::vector<int64_t> encode(const std::string &tokenizer, const std::string &text, int64_t limit, int64_t hidden,
                                const std::string &prompt, const char *reader,
                                std::vector<std::string> &warnings) const;

    const Bundle &bundle_;
    std::map<std::string, std::unique_ptr<Tokenizer>> tokenizers_;
    Recent<std::pair<std::string, int64_t>, Text> texts_;
};

// The embeddings of the prompts used last. One of Qwen-Image or T5 at 512 tokens takes about 8 MB.
using EmbeddingCache = Recent<Ids, Embeddings>;

}  // namespace arcflow
