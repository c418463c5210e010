// Tokenizes the prompts of a request.
#include "text.h"

#include <algorithm>

#include "constants.h"
#include "error.h"
#include "json_text.h"

namespace arcflow {

namespace {

// The start of a prompt for a warning: one line, quoted, at most shown_characters characters.
std::string shown(const std::string &prompt) {
    const auto continues = [](char c) { return (static_cast<unsigned char>(c) & 0xC0u) == 0x80u; };
    std::size_t end = 0;
    for (std::size_t characters = 0; end < prompt.size() && characters < shown_characters; ++characters) {
        ++end;
        while (end < prompt.size() && continues(prompt[end])) ++end;
    }
    return json_text(end < prompt.size() ? prompt.substr(0, end) + "..." : prompt);
}

}  // namespace

PromptTokenizer::PromptTokenizer(const Bundle &bundle) : bundle_(bundle), tokenizers_(open_tokenizers(bundle)) {}

std::vector<Ids> PromptTokenizer::tokenize(const Request &request, std::vector<std::string> &warnings) {
    std::vector<Ids> ids;
    std::map<std::string, std::size_t> first;
    const auto add = [&](const std::vector<std::string> &prompts, const std::vector<TokenIds> &tokens) {
        for (const TokenIds &given : tokens) ids.push_back(padded(given.ids, given.ids_2, request.max_sequence_length));
        for (const std::string &prompt : prompts) {
            const auto [place, is_new] = first.emplace(prompt, ids.size());
            if (!is_new) {
                ids.push_back(ids[place->second]);
                continue;
            }
            const std::pair key(prompt, request.max_sequence_length);
            auto read = texts_.get(key);
            if (!read) texts_.put(key, read = std::make_shared<const Text>(text(prompt, request.max_sequence_length)));
            ids.push_back(read->ids);
            warnings.insert(warnings.end(), read->warnings.begin(), read->warnings.end());
        }
    };
    add(request.prompts, request.tokens);
    add(request.negative_prompts, request.negative_tokens);
    return ids;
}

PromptTokenizer::Text PromptTokenizer::text(const std::string &prompt, int64_t max_sequence_length) const {
    const Manifest &m = bundle_.manifest;
    std::vector<std::string> warnings;
    if (m.family == Family::flux) {
        auto clip = encode("tokenizer", prompt, m.text.clip_tokens.value(), 0, prompt, "CLIP (text_encoder)", warnings);
        auto t5 = encode("tokenizer_2", prompt, max_sequence_length, 0, prompt, "T5 (text_encoder_2)", warnings);
        return {padded(std::move(clip), std::move(t5), max_sequence_length), std::move(warnings)};
    }
    std::string templated = m.text.templ.value_or("{}");
    const std::size_t place = templated.find("{}");
    if (place == std::string::npos) throw bundle_error(bundle_.root.u8string() + ": text.template must hold one {}");
    templated.replace(place, 2, prompt);
    // The language model is causal, so tokens that are cut here do not change the states that are kept.
    const int64_t drop = m.text.drop_tokens;
    auto ids = encode("tokenizer", templated, drop + max_sequence_length, drop, prompt, "the text encoder", warnings);
    return {padded(std::move(ids), {}, max_sequence_length), std::move(warnings)};
}

Ids PromptTokenizer::padded(std::vector<int64_t> ids, std::vector<int64_t> ids_2, int64_t max_sequence_length) const {
    const Manifest &m = bundle_.manifest;
    if (m.family != Family::flux) return {{"text_encoder", std::move(ids)}};
    const auto pad = [](std::vector<int64_t> &row, int64_t size, int64_t id) {
        row.resize(std::max(row.size(), static_cast<std::size_t>(size)), id);
    };
    pad(ids, m.text.clip_tokens.value(), m.text.clip_pad_token_id.value());
    pad(ids_2, max_sequence_length, m.text.t5_pad_token_id.value());
    return {{"text_encoder", std::move(ids)}, {"text_encoder_2", std::move(ids_2)}};
}

// Encode `text` to at most `limit` ids, always with the special tokens. The first `hidden` ids belong to the template;
// warnings do not count them.
std::vector<int64_t> PromptTokenizer::encode(const std::string &tokenizer, const std::string &text, int64_t limit,
                                             int64_t hidden, const std::string &prompt, const char *reader,
                                             std::vector<std::string> &warnings) const {
    const auto found = tokenizers_.find(tokenizer);
    if (found == tokenizers_.end()) {
        throw bundle_error(bundle_.root.u8string() + ": the bundle has no OpenVINO tokenizer for " +
                           json_text(tokenizer) + ", which prompts need; run `arcflow build " +
                           bundle_.root.u8string() + " --backend openvino`, or give token ids");
    }
    const Tokenizer &special = *found->second;
    std::vector<int64_t> ids = found->second->ids(text);
    const auto total = static_cast<int64_t>(ids.size());
    const int64_t room = limit - static_cast<int64_t>(special.prefix.size() + special.suffix.size());
    if (total > room) {
        const int64_t kept = std::max<int64_t>(room, 0);
        ids.resize(static_cast<std::size_t>(kept));
        warnings.push_back("prompt " + shown(prompt) + " was cut for " + reader + ": " + std::to_string(kept - hidden) +
                           " of " + std::to_string(total - hidden) + " tokens kept");
    }
    ids.insert(ids.begin(), special.prefix.begin(), special.prefix.end());
    ids.insert(ids.end(), special.suffix.begin(), special.suffix.end());
    return ids;
}

}  // namespace arcflow
