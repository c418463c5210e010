// Prompts to token ids, with the tokenizers that `arcflow build --backend openvino` made from the bundle's.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
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

// Stands for one that this machine cannot run; the error of its texts says why.
class UnavailableTokenizer : public Tokenizer {
public:
    explicit UnavailableTokenizer(std::string why) : why_(std::move(why)) {}
    std::vector<int64_t> ids(const std::string &) override { throw engine_error(why_ + ", or give token ids"); }

private:
    std::string why_;
};

// The bundle's tokenizers by name; empty where none were built, so that only token ids can be drawn. What this machine
// lacks to run them is no error until a prompt is read, for token ids need none of it.
// Throws Error where they are damaged, or of another version of the bundle.
std::map<std::string, std::unique_ptr<Tokenizer>> open_tokenizers(const Bundle &bundle);

}  // namespace arcflow
