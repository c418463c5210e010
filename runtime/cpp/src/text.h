// Prompts -> padded token ids for each text encoder, with a cache.
//
// FLUX: CLIP's ids padded to 77 and T5's padded to max_sequence_length. Qwen-Image: the chat template with the prompt
// in it, not padded, so that a prompt's length does not depend on the rest of the batch.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "lora.h"
#include "recent.h"
#include "request.h"
#include "tokenizer.h"

namespace arcflow {

// Token ids by the text encoder's part name. Without LoRAs, embeddings depend on nothing else.
using Ids = std::map<std::string, std::vector<int64_t>>;

// Tokenizes prompts for one bundle. Safe to use from several threads.
class PromptTokenizer {
public:
    // Throws Error if the bundle's built tokenizers are damaged. `bundle` must outlive this object.
    explicit PromptTokenizer(const Bundle &bundle);

    // The padded ids of each prompt, then of each negative prompt. Appends one warning for each distinct one that was
    // cut. Throws Error if the request has prompts and the bundle has no tokenizers for this library.
    std::vector<Ids> tokenize(const Request &request, std::vector<std::string> &warnings);

private:
    // The cached result for one prompt.
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

// Embeddings of the most recent prompts. One prompt of Qwen-Image, or of T5 with 512 tokens, takes about 8 MB.
// The key also has the LoRAs of the text encoder.
using EmbeddingCache = Recent<std::pair<Ids, LoraKey>, Embeddings>;

}  // namespace arcflow
