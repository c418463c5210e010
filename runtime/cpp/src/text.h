// Prompts -> token ids for a bundle's text encoders, and a bounded cache of their embeddings.
//
// FLUX: CLIP's ids padded to 77 and T5's padded to max_sequence_length. Qwen-Image: the chat template with the prompt
// in it, unpadded, so that a prompt's length never depends on its neighbours'.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

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
    std::vector<Ids> tokenize(const Request &request, std::vector<std::string> &warnings) const;

private:
    Ids text(const std::string &prompt, int64_t max_sequence_length, std::vector<std::string> &warnings) const;
    Ids padded(std::vector<int64_t> ids, std::vector<int64_t> ids_2, int64_t max_sequence_length) const;
    std::vector<int64_t> encode(const std::string &tokenizer, const std::string &text, int64_t limit, int64_t hidden,
                                const std::string &prompt, const char *reader,
                                std::vector<std::string> &warnings) const;

    const Bundle &bundle_;
    std::map<std::string, std::unique_ptr<Tokenizer>> tokenizers_;
};

// The embeddings of the prompts used last; thread-safe. One of Qwen-Image or T5 at 512 tokens takes about 8 MB.
class EmbeddingCache {
public:
    static constexpr std::size_t size = 16;

    // Null where they are not kept.
    std::shared_ptr<const Embeddings> get(const Ids &ids);

    // Beyond the bound, the prompt unused for longest is dropped.
    void put(const Ids &ids, std::shared_ptr<const Embeddings> embeddings);

private:
    using Entry = std::pair<Ids, std::shared_ptr<const Embeddings>>;
    std::mutex lock_;
    std::list<Entry> entries_;  // used last first; few enough to search
};

}  // namespace arcflow
