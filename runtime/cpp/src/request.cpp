// Checks a request of the C API against a bundle.
#include "request.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "constants.h"
#include "error.h"
#include "json_text.h"

namespace arcflow {
namespace {

constexpr int64_t max_token_id = 0x7FFFFFFF;

std::string text_of(int64_t value) { return std::to_string(value); }

int64_t integer(const std::string &name, int64_t value, int64_t low, std::optional<int64_t> high) {
    if (value < low || (high && value > *high)) {
        const std::string bounds =
            high ? "between " + text_of(low) + " and " + text_of(*high) : "at least " + text_of(low);
        throw request_error(name + " must be " + bounds + ", got " + text_of(value));
    }
    return value;
}

// The number of images. Checked first, since a wrong `prompts` count would read past the caller's array.
int64_t check_batch(const Range &allowed, size_t prompts, int64_t images_each) {
    // A count above int64's range is above every limit, too.
    const int64_t count = prompts <= INT64_MAX ? static_cast<int64_t>(prompts) : INT64_MAX;
    int64_t batch = 0;
    const bool fits = !__builtin_mul_overflow(count, images_each, &batch);
    if (!fits || batch < allowed.min || batch > allowed.max) {
        throw request_error("request.prompt_count times request.num_images_per_prompt must be between " +
                            text_of(allowed.min) + " and " + text_of(allowed.max) + " for this bundle, got " +
                            std::to_string(prompts) + " * " + text_of(images_each) +
                            (fits ? " = " + text_of(batch) : "") + "; ask for fewer images at a time");
    }
    return batch;
}

// Bytes of the UTF-8 character at the start of `text`; 0 if it is not valid (RFC 3629: no overlong forms, no
// surrogates).
size_t character_bytes(const unsigned char *text) {
    const unsigned char first = text[0];
    if (first < 0x80) return 1;
    const size_t bytes = first >= 0xC2 && first <= 0xDF   ? 2
                         : first >= 0xE0 && first <= 0xEF ? 3
                         : first >= 0xF0 && first <= 0xF4 ? 4
                                                          : 0;
    for (size_t i = 1; i < bytes; ++i)
        if ((text[i] & 0xC0) != 0x80) return 0;  // also reached at the text's end, which is a NUL
    if ((first == 0xE0 && text[1] < 0xA0) || (first == 0xED && text[1] > 0x9F) || (first == 0xF0 && text[1] < 0x90) ||
        (first == 0xF4 && text[1] > 0x8F)) {
        return 0;
    }
    return bytes;
}

std::vector<std::string> check_prompts(const char *const *given, size_t given_count, const std::string &name) {
    std::vector<std::string> prompts;
    for (size_t i = 0; i < given_count; ++i) {
        const char *prompt = given[i];
        if (!prompt) throw request_error(name + "[" + std::to_string(i) + "] must be a string, got NULL");
        const auto *bytes = reinterpret_cast<const unsigned char *>(prompt);
        size_t position = 0;
        while (bytes[position] != 0) {
            const size_t count = character_bytes(bytes + position);
            if (count == 0) {
                throw request_error(name + "[" + std::to_string(i) +
                                    "] must be UTF-8, got an invalid byte at position " + std::to_string(position) +
                                    "; encode the text as UTF-8");
            }
            position += count;
        }
        prompts.emplace_back(prompt, position);
    }
    return prompts;
}

std::vector<int64_t> check_ids(const int64_t *ids, size_t count, const std::string &name, int64_t low, int64_t high) {
    if (count > static_cast<size_t>(high) || count < static_cast<size_t>(low)) {
        throw request_error(name + " must have between " + text_of(low) + " and " + text_of(high) +
                            " token ids, special tokens included, got " + std::to_string(count));
    }
    if (!ids && count > 0) throw request_error(name + " must point to " + std::to_string(count) + " ids, got NULL");
    std::vector<int64_t> copied;
    copied.reserve(count);
    for (size_t i = 0; i < count; ++i)
        copied.push_back(integer(name + "[" + std::to_string(i) + "]", ids[i], 0, max_token_id));
    return copied;
}

std::vector<TokenIds> check_tokens(const arcflow_tokens *all, size_t count, const std::string &array, const Manifest &m,
                                   int64_t max_sequence_length) {
    std::vector<TokenIds> tokens;
    for (size_t i = 0; i < count; ++i) {
        const arcflow_tokens &given = all[i];
        const std::string name = array + "[" + std::to_string(i) + "].ids";
        if (m.family == Family::flux) {
            tokens.push_back({check_ids(given.ids, given.count, name, 1, m.text.clip_tokens.value()),
                              check_ids(given.ids_2, given.count_2, name + "_2", 1, max_sequence_length)});
        } else {
            // The template's first tokens are dropped, and at least one token must remain.
            const int64_t drop = m.text.drop_tokens;
            tokens.push_back({check_ids(given.ids, given.count, name, drop + 1, drop + max_sequence_length), {}});
            if (given.count_2 != 0) {
                throw request_error(name + "_2 must be empty for a qwen-image bundle, got " +
                                    std::to_string(given.count_2) + " ids");
            }
        }
    }
    return tokens;
}

int64_t check_size(const std::string &name, int64_t value, const Range &allowed, const Latents &latents) {
    if (value == 0) return std::min(std::max(default_size_px, allowed.min), allowed.max);
    const int64_t multiple = latents.vae_scale_factor * latents.patch_size;
    const int64_t size = integer(name, value, 1, std::nullopt);
    if (size % multiple != 0) {
        // The nearest multiple; of two equally near, the even one, as Python rounds.
        const int64_t below = size / multiple, twice = size % multiple * 2;
        const int64_t nearest = twice > multiple || (twice == multiple && below % 2 == 1) ? below + 1 : below;
        throw request_error(name + " must be a multiple of " + text_of(multiple) + ", got " + text_of(size) +
                            "; the nearest is " + text_of(std::max(nearest, int64_t{1}) * multiple));
    }
    if (size < allowed.min || size > allowed.max) {
        throw request_error(name + " must be between " + text_of(allowed.min) + " and " + text_of(allowed.max) +
                            " for this bundle, got " + text_of(size) +
                            "; export a bundle with a wider range or choose another size");
    }
    return size;
}

int64_t check_steps(int64_t value, const Manifest &m) {
    if (value == 0) return m.schedule.num_inference_steps;
    const int64_t steps = integer("request.num_inference_steps", value, 1, max_inference_steps);
    if (m.schedule.sigmas && steps != static_cast<int64_t>(m.schedule.sigmas->size())) {
        throw request_error("request.num_inference_steps must be " + std::to_string(m.schedule.sigmas->size()) +
                            ", the number of sigmas in this bundle's schedule, got " + text_of(steps) +
                            "; export without --sigmas for other step counts");
    }
    const std::vector<int64_t> baked = m.modulation ? m.modulation->num_inference_steps : std::vector<int64_t>{};
    if (std::find(baked.begin(), baked.end(), steps) == baked.end() && m.parts.count("conditioner") == 0) {
        throw request_error("request.num_inference_steps must be one of those baked into this bundle, " +
                            json_text(baked) + ", got " + text_of(steps) + "; export with --steps " + text_of(steps) +
                            ", or with --keep-conditioner for any step count");
    }
    return steps;
}

float check_guidance(float value) {
    if (value < 0) return default_guidance_scale;
    if (!(value <= max_guidance_scale))
        throw request_error("request.guidance_scale must be between 0 and 65, got " + json_text(value));
    return value;
}

// Guidance needs a negative prompt and a scale above 1, as in diffusers.
void check_true_cfg(const arcflow_request &request, const Manifest &m, Request &checked) {
    if (request.negative_prompts && request.negative_tokens)
        throw request_error("request must have either negative_prompts or negative_tokens, got both");
    const bool given = request.negative_prompts || request.negative_tokens;
    const std::string form = request.negative_tokens ? "negative_tokens" : "negative_prompts";
    if (!m.true_cfg_scale) {
        const char *wrong = given                           ? form.c_str()
                            : request.negative_prompt_count ? "negative_prompt_count"
                            : request.true_cfg_scale != 0   ? "true_cfg_scale"
                                                            : nullptr;
        if (wrong == nullptr) return;
        throw request_error(std::string("request.") + wrong + " is not supported: " +
                            (m.sampler == Sampler::linear
                                 ? "this model is guided by guidance_scale or not at all"
                                 : "the student is distilled to run once per step, without a negative prompt") +
                            "; leave it at its default");
    }
    if (!(0 <= request.true_cfg_scale && request.true_cfg_scale <= static_cast<float>(max_true_cfg_scale))) {
        throw request_error("request.true_cfg_scale must be between 0 and 65, got " +
                            json_text(request.true_cfg_scale) + "; 0 is the bundle's own scale");
    }
    const float scale = request.true_cfg_scale;
    checked.true_cfg_scale = scale == 0 ? *m.true_cfg_scale : static_cast<double>(scale);
    // Checked before the array is read, since a wrong count would read past its end.
    const size_t count = request.negative_prompt_count;
    if (!given && count != 0) {
        throw request_error("request.negative_prompts must point to " + std::to_string(count) +
                            " prompts, got NULL; or set request.negative_prompt_count to 0");
    }
    if (!given) {
        if (checked.true_cfg_scale > 1) {
            checked.warnings.emplace_back("without request.negative_prompts the images are not guided; give \" \" as a "
                                          "negative prompt to guide them");
        }
        return;
    }
    if (count != 1 && count != request.prompt_count) {
        throw request_error("request.negative_prompt_count must be 1 or one per prompt, " +
                            std::to_string(request.prompt_count) + ", got " + std::to_string(count));
    }
    std::vector<std::string> prompts;
    std::vector<TokenIds> tokens;
    if (request.negative_prompts) prompts = check_prompts(request.negative_prompts, count, "request." + form);
    else tokens = check_tokens(request.negative_tokens, count, "request." + form, m, checked.max_sequence_length);
    if (checked.true_cfg_scale <= 1) {
        checked.warnings.push_back("request.true_cfg_scale " + json_text(static_cast<float>(checked.true_cfg_scale)) +
                                   " does not guide, so request." + form + " was ignored");
        return;
    }
    for (size_t i = 0; i < request.prompt_count; ++i) {
        const size_t place = count == 1 ? 0 : i;
        if (request.negative_prompts) checked.negative_prompts.push_back(prompts[place]);
        else checked.negative_tokens.push_back(tokens[place]);
    }
}

std::vector<uint64_t> check_seeds(const arcflow_request &request, int64_t batch) {
    if (!request.seeds && request.seed_count == 0) {
        // One per image, so that each image can be generated again by itself.
        std::random_device random;
        std::vector<uint64_t> seeds(static_cast<size_t>(batch));
        std::generate(seeds.begin(), seeds.end(), [&] { return random(); });
        return seeds;
    }
    if (!request.seeds)
        throw request_error("request.seeds must point to " + std::to_string(request.seed_count) + " numbers, got NULL");
    if (request.seed_count != 1 && request.seed_count != static_cast<size_t>(batch)) {
        throw request_error("request.seed_count must be 1 or one per image, " + text_of(batch) + ", got " +
                            std::to_string(request.seed_count));
    }
    return {request.seeds, request.seeds + request.seed_count};
}

}  // namespace

Request check_request(const arcflow_request &request, const Manifest &m) {
    if ((request.prompts != nullptr) == (request.tokens != nullptr)) {
        throw request_error(std::string("request must have either prompts or tokens, got ") +
                            (request.prompts ? "both" : "neither"));
    }
    if (request.prompt_count == 0)
        throw request_error("request.prompt_count must be at least 1, got 0; an empty string is allowed as a prompt");
    Request checked{};
    const int64_t images_each = request.num_images_per_prompt == 0 ? 1 : request.num_images_per_prompt;
    checked.images_per_prompt = integer("request.num_images_per_prompt", images_each, 1, std::nullopt);
    const int64_t batch = check_batch(m.ranges.batch, request.prompt_count, checked.images_per_prompt);
    const int64_t limit = m.text.max_sequence_length;
    checked.max_sequence_length = request.max_sequence_length == 0
                                      ? limit
                                      : integer("request.max_sequence_length", request.max_sequence_length, 1, limit);
    const size_t prompts = request.prompt_count;
    if (request.prompts) checked.prompts = check_prompts(request.prompts, prompts, "request.prompts");
    else checked.tokens = check_tokens(request.tokens, prompts, "request.tokens", m, checked.max_sequence_length);
    checked.steps = check_steps(request.num_inference_steps, m);
    const float guidance = check_guidance(request.guidance_scale);
    check_true_cfg(request, m, checked);
    if (checked.steps == 1)
        checked.warnings.emplace_back("request.num_inference_steps is 1, which gives a blurry image; use 2 or more");
    const int64_t own = m.schedule.num_inference_steps;
    if (m.sampler == Sampler::momentum && checked.steps > far_steps * own) {
        checked.warnings.push_back("request.num_inference_steps is " + text_of(checked.steps) + ", more than " +
                                   text_of(far_steps) + " times the " + text_of(own) +
                                   " that this student was made for; more steps may not improve the image, use " +
                                   text_of(own));
    }
    if (m.guidance) {
        checked.guidance_scale = guidance;
    } else if (!(request.guidance_scale < 0)) {
        checked.warnings.push_back("this student takes no guidance; request.guidance_scale " +
                                   json_text(request.guidance_scale) + " was ignored");
    }
    checked.height_px = check_size("request.height", request.height, m.ranges.height_px, m.latents);
    checked.width_px = check_size("request.width", request.width, m.ranges.width_px, m.latents);
    checked.seeds = check_seeds(request, batch);
    checked.decode = request.skip_decode == 0;
    checked.on_step = request.on_step;
    checked.user = request.user;
    return checked;
}

}  // namespace arcflow
