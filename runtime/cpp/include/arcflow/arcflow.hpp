// ArcFlow for C++17: the functions of arcflow.h as classes that free themselves, with containers and exceptions.
//
//     arcflow::Pipeline pipe("out/shapes-fp32");
//     arcflow::Request request;
//     request.prompts = {"a large red circle on the left"};
//     request.seeds = {42};
//     const arcflow::Result result = pipe.generate(request);
//     write_rgb(result.image(0).data(), result.width(), result.height());
//
// Functions throw arcflow::Error. Objects can be moved but not copied. Several threads may use one pipeline at the same
// time; use a result in one thread at a time. A view is valid as long as the result it came from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arcflow.h"

namespace arcflow {
// A namespace of its own keeps these names apart from the library's own classes in a static link.
inline namespace api {

// A call failed: what() says what was wrong, what was expected and what to do.
class Error : public std::runtime_error {
public:
    Error(arcflow_status code, const char *text) : std::runtime_error(text), status_(code) {}
    Error(arcflow_status code, const std::string &text) : std::runtime_error(text), status_(code) {}
    arcflow_status status() const noexcept { return status_; }

private:
    arcflow_status status_;
};

namespace detail {
inline void check(arcflow_status status) {
    if (status != ARCFLOW_OK) throw Error(status, arcflow_last_error());
}

// The text for C, which ends a string at its first NUL: a NUL inside would cut the text silently, so it is an error.
inline const char *c_string(const std::string &text, const char *name) {
    if (text.find('\0') != std::string::npos)
        throw Error(ARCFLOW_REQUEST_ERROR, std::string(name) + " must not contain a NUL character");
    return text.c_str();
}
}  // namespace detail

// A read-only array that another object owns.
template <class T> class View {
public:
    View(const T *data, std::size_t size) : data_(data), size_(size) {}
    const T *data() const { return data_; }
    std::size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    const T *begin() const { return data_; }
    const T *end() const { return data_ + size_; }
    const T &operator[](std::size_t i) const { return data_[i]; }

private:
    const T *data_;
    std::size_t size_;
};

// How to load a bundle; see arcflow_options.
struct Options {
    std::string backend;  // "": the default
    int threads = 0;      // CPU threads per engine; 0: one per core
    bool low_memory = false;
    bool full_check = false;
    std::string memory = {};  // "resident", "balanced" or "low"; "": by the free memory
};

// Token ids of one prompt; see arcflow_tokens.
struct Tokens {
    std::vector<std::int64_t> ids, ids_2;
};

// A LoRA that Pipeline::open_lora has read.
class Lora {
public:
    // Takes ownership of the handle.
    explicit Lora(arcflow_lora *handle) : handle_(handle) {}
    const arcflow_lora *handle() const { return handle_.get(); }

private:
    struct Close {
        void operator()(arcflow_lora *handle) const { arcflow_lora_close(handle); }
    };
    std::unique_ptr<arcflow_lora, Close> handle_;
};

// A LoRA of a request, which must outlive the request's call; see arcflow_scaled_lora.
struct ScaledLora {
    const Lora *lora = nullptr;
    float scale = 1;
};

// What to generate; see arcflow_request. Set either `prompts` or `tokens`; what is left empty gets its default.
struct Request {
    std::vector<std::string> prompts;
    std::vector<Tokens> tokens;
    std::optional<int> num_images_per_prompt, height, width, num_inference_steps, max_sequence_length;
    std::optional<float> guidance_scale;
    std::vector<std::uint64_t> seeds;  // one for the whole batch, or one per image; empty: random ones
    bool skip_decode = false;          // true: return only the latents, no pixels
    std::vector<ScaledLora> loras;     // of the same pipeline, each once
    // Guidance by a negative prompt, for models that have it; see arcflow_request. One for each prompt, or one for all.
    std::vector<std::string> negative_prompts;
    std::vector<Tokens> negative_tokens;
    std::optional<float> true_cfg_scale;
    // Called after each step with its index and the latents [batch, tokens, channels]. Return true to continue; false
    // ends the request with an Error. An exception that it throws leaves `generate`. Do not use the same pipeline in
    // it.
    std::function<bool(int step, View<float> latents)> on_step;
};

// The images of one request.
class Result {
public:
    // Takes ownership of the handle.
    explicit Result(arcflow_result *handle) : handle_(handle) {}

    int batch() const { return arcflow_result_batch(handle_.get()); }
    int height() const { return arcflow_result_height(handle_.get()); }
    int width() const { return arcflow_result_width(handle_.get()); }

    // All images as RGB bytes, [batch, height, width, 3]; empty with skip_decode.
    View<std::uint8_t> pixels() const {
        const std::uint8_t *data = arcflow_result_pixels(handle_.get());
        return {data, data == nullptr ? 0 : static_cast<std::size_t>(batch()) * image_size()};
    }
    // One image, [height, width, 3].
    View<std::uint8_t> image(int index) const {
        const int count = pixels().empty() ? 0 : batch();
        if (index < 0 || index >= count) {
            throw Error(ARCFLOW_REQUEST_ERROR, "image index must be at least 0 and below " + std::to_string(count) +
                                                   ", got " + std::to_string(index));
        }
        return {pixels().data() + static_cast<std::size_t>(index) * image_size(), image_size()};
    }
    // [batch, tokens, channels].
    View<float> latents() const {
        std::int32_t tokens = 0, channels = 0;
        const float *data = arcflow_result_latents(handle_.get(), &tokens, &channels);
        return {data, static_cast<std::size_t>(batch()) * static_cast<std::size_t>(tokens) *
                          static_cast<std::size_t>(channels)};
    }
    // The seeds that reproduce these images: 1 or batch.
    View<std::uint64_t> seeds() const {
        std::size_t count = 0;
        const std::uint64_t *data = arcflow_result_seeds(handle_.get(), &count);
        return {data, count};
    }
    // One warning per line; "" if there are none.
    std::string warnings() const { return arcflow_result_warnings(handle_.get()); }
    // The time of each stage in milliseconds, as JSON: {"tokenize": 0.02, ...}.
    std::string timings() const { return arcflow_result_timings(handle_.get()); }

private:
    std::size_t image_size() const {
        return static_cast<std::size_t>(height()) * static_cast<std::size_t>(width()) * 3;
    }

    struct Free {
        void operator()(arcflow_result *handle) const { arcflow_result_free(handle); }
    };
    std::unique_ptr<arcflow_result, Free> handle_;
};

// A loaded bundle. Its destructor waits for running calls.
class Pipeline {
public:
    // Check and load the bundle in a directory, whose path is UTF-8.
    explicit Pipeline(const std::string &bundle, const Options &options = {}) {
        arcflow_options c = ARCFLOW_OPTIONS_INIT;
        c.backend = options.backend.empty() ? nullptr : detail::c_string(options.backend, "options.backend");
        c.threads = options.threads;
        c.low_memory = options.low_memory ? 1 : 0;
        c.memory = options.memory.empty() ? nullptr : detail::c_string(options.memory, "options.memory");
        c.full_check = options.full_check ? 1 : 0;
        arcflow_pipeline *handle = nullptr;
        detail::check(arcflow_open(detail::c_string(bundle, "bundle"), &c, &handle));
        handle_.reset(handle);
    }

    // The memory mode, also if it was chosen.
    std::string memory() const { return arcflow_memory(handle_.get()); }

    // Read a file that `arcflow lora convert` wrote, whose path is UTF-8, for requests of this pipeline.
    Lora open_lora(const std::string &path) const {
        arcflow_lora *lora = nullptr;
        detail::check(arcflow_lora_open(handle_.get(), detail::c_string(path, "path"), &lora));
        return Lora(lora);
    }

    // Generate num_images_per_prompt images of each prompt, prompt by prompt.
    Result generate(const Request &request) const {
        if (!request.prompts.empty() && !request.tokens.empty()) {
            throw Error(ARCFLOW_REQUEST_ERROR,
                        "request must have either prompts or tokens, got both; leave one of them empty");
        }
        if (!request.negative_prompts.empty() && !request.negative_tokens.empty()) {
            throw Error(ARCFLOW_REQUEST_ERROR,
                        "request must have either negative_prompts or negative_tokens, got both; leave one of them "
                        "empty");
        }
        const std::vector<const char *> prompts = c_strings(request.prompts, "request.prompts");
        const std::vector<const char *> negatives = c_strings(request.negative_prompts, "request.negative_prompts");
        const std::vector<arcflow_tokens> tokens = c_tokens(request.tokens);
        const std::vector<arcflow_tokens> negative_tokens = c_tokens(request.negative_tokens);
        arcflow_request c = ARCFLOW_REQUEST_INIT;
        c.prompts = prompts.empty() ? nullptr : prompts.data();
        c.tokens = tokens.empty() ? nullptr : tokens.data();
        c.prompt_count = prompts.empty() ? tokens.size() : prompts.size();
        c.negative_prompts = negatives.empty() ? nullptr : negatives.data();
        c.negative_tokens = negative_tokens.empty() ? nullptr : negative_tokens.data();
        c.negative_prompt_count = negatives.empty() ? negative_tokens.size() : negatives.size();
        if (request.true_cfg_scale) {
            // In the C struct a scale of 0 selects the bundle's.
            if (*request.true_cfg_scale == 0) {
                throw Error(ARCFLOW_REQUEST_ERROR,
                            "request.true_cfg_scale must be above 0, got 0; give 1 for no guidance, "
                            "or leave it empty for the bundle's scale");
            }
            c.true_cfg_scale = *request.true_cfg_scale;
        }
        c.num_images_per_prompt = or_default(request.num_images_per_prompt, "num_images_per_prompt");
        c.height = or_default(request.height, "height");
        c.width = or_default(request.width, "width");
        c.num_inference_steps = or_default(request.num_inference_steps, "num_inference_steps");
        c.max_sequence_length = or_default(request.max_sequence_length, "max_sequence_length");
        if (request.guidance_scale) {
            // In the C struct a negative scale selects the default.
            if (*request.guidance_scale < 0) {
                throw Error(ARCFLOW_REQUEST_ERROR,
                            "request.guidance_scale must not be negative; leave it empty for the default");
            }
            c.guidance_scale = *request.guidance_scale;
        }
        c.seeds = request.seeds.empty() ? nullptr : request.seeds.data();
        c.seed_count = request.seeds.size();
        c.skip_decode = request.skip_decode ? 1 : 0;
        std::vector<arcflow_scaled_lora> loras;
        for (const ScaledLora &l : request.loras)
            loras.push_back({l.lora == nullptr ? nullptr : l.lora->handle(), l.scale});
        c.loras = loras.empty() ? nullptr : loras.data();
        c.lora_count = loras.size();
        Step step{request.on_step, nullptr};
        if (request.on_step) {
            c.on_step = &Step::call;
            c.user = &step;
        }
        arcflow_result *result = nullptr;
        const arcflow_status status = arcflow_generate(handle_.get(), &c, &result);
        if (step.thrown) std::rethrow_exception(step.thrown);
        detail::check(status);
        return Result(result);
    }

private:
    // Calls on_step for C. It keeps what on_step throws until arcflow_generate has returned, since no exception may
    // pass through C.
    struct Step {
        const std::function<bool(int, View<float>)> &function;
        std::exception_ptr thrown;

        static int call(void *user, std::int32_t step, const float *latents, std::size_t count) {
            auto &self = *static_cast<Step *>(user);
            try {
                return self.function(step, {latents, count}) ? 0 : 1;
            } catch (...) {
                self.thrown = std::current_exception();
                return 1;
            }
        }
    };

    static std::vector<const char *> c_strings(const std::vector<std::string> &texts, const std::string &name) {
        std::vector<const char *> out;
        for (const std::string &text : texts) {
            const std::string place = name + "[" + std::to_string(out.size()) + "]";
            out.push_back(detail::c_string(text, place.c_str()));
        }
        return out;
    }

    static std::vector<arcflow_tokens> c_tokens(const std::vector<Tokens> &tokens) {
        std::vector<arcflow_tokens> out;
        for (const Tokens &t : tokens) out.push_back({t.ids.data(), t.ids.size(), t.ids_2.data(), t.ids_2.size()});
        return out;
    }

    // A value for the C struct, where 0 selects the default; so a 0 that the caller sets is an error here.
    static std::int32_t or_default(const std::optional<int> &value, const char *name) {
        if (value && *value == 0)
            throw Error(ARCFLOW_REQUEST_ERROR, std::string("request.") + name + " must be at least 1, got 0");
        return value.value_or(0);
    }

    struct Close {
        void operator()(arcflow_pipeline *handle) const { arcflow_close(handle); }
    };
    std::unique_ptr<arcflow_pipeline, Close> handle_;
};

}  // namespace api
}  // namespace arcflow
