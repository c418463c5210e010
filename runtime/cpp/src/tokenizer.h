// The tokenizer interface: prompt -> token ids, by the tokenizers that `arcflow build --backend openvino` made.
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

// One tokenizer. Several threads may call `ids` at the same time.
class Tokenizer {
public:
    virtual ~Tokenizer() = default;

    // The ids of a text, without special tokens, neither cut nor padded. Throws Error.
    virtual std::vector<int64_t> ids(const std::string &text) = 0;

    // Special tokens to put before and after the text's ids.
    std::vector<int64_t> prefix, suffix;
};

// Stands in for a tokenizer that this machine cannot run: each text throws an Error that says why.
class UnavailableTokenizer : public Tokenizer {
public:
    explicit UnavailableTokenizer(std::string why) : why_(std::move(why)) {}
    std::vector<int64_t> ids(const std::string &) override { throw engine_error(why_ + ", or give token ids"); }

private:
    std::string why_;
};

// The bundle's tokenizers by name; empty if none were built, so that requests must give token ids. A missing tokenizer
// library is an error only when a prompt is tokenized, because requests with token ids do not need it. Throws Error if
// the tokenizers are damaged or belong to another version of the bundle.
std::map<std::string, std::unique_ptr<Tokenizer>> open_tokenizers(const Bundle &bundle);

}  // namespace arcflow
