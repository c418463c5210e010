// Prompts to token ids, with the tokenizers that `arcflow build --backend openvino` made from the bundle's.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "manifest.h"

namespace arcflow {

// One tokenizer; `ids` may be called from several threads at once.
class Tokenizer {
public:
    virtual ~Tokenizer() = default;

    // The text's ids without special tokens, not cut or padded. Throws Error.
    virtual std::vector<int64_t> ids(const std::string &text) = 0;

    // Special tokens that stand before and after the text's.
    std::vector<int64_t> prefix, suffix;
};

// The bundle's tokenizers by name; empty where none were built, so that only token ids can be drawn.
// Throws Error where they are damaged, or of another version of the bundle.
std::map<std::string, std::unique_ptr<Tokenizer>> open_tokenizers(const Bundle &bundle);

}  // namespace arcflow
