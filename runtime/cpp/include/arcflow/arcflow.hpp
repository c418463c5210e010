// ArcFlow for C++17: arcflow.h with objects that free themselves, containers, and exceptions.
//
//     arcflow::Pipeline pipe("out/shapes-fp32");
//     arcflow::Request request;
//     request.prompts = {"a large red circle on the left"};
//     request.seeds = {42};
//     const arcflow::Result result = pipe.draw(request);
//     write_rgb(result.image(0).data(), result.width(), result.height());
//
// Functions throw arcflow::Error. Objects can be moved, not copied. A pipeline may be used by several threads at once,
// a result by one. Views are valid as long as the result they came from.
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
// The names differ from those inside the library, which a program may link statically.
inline namespace api {

// Says what was wrong, what was expected and what to do.
class Error : public std::runtime_error {
public:
    Error(arcflow_status code, const char *text) : std::runtime_error(text), status_(code) {}
    arcflow_status status() const noexcept { return status_; }

private:
    arcflow_status status_;
};

namespace detail {
inline void check(arcflow_status status) {
    if (status != ARCFLOW_OK) throw Error(status, arcflow_last_error());
}

// C strings end at the first NUL, which would cut the text unsaid.
inline const char *c_string(const std::string &text, const char *name) {
    if (text.find('\0') != std::string::npos)
        throw Error(ARCFLOW_REQUEST_ERROR, (std::string(name) + " must not hold a NUL character").c_str());
    return text.c_str();
}
}  // namespace detail

// Some values that another object owns.
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

// How to load; see arcflow_options.
struct Options {
    std::string backend;  // "" for the default
    int threads = 0;      // per engine; 0: one per core
    bool low_memory = false;
    bool full_check = false;
};

// One prompt's token ids; see arcflow_tokens.
struct Tokens {
    std::vector<std::int64_t> ids, ids_2;
};

// What to draw: prompts or tokens, and what differs from the bundle's defaults; see arcflow_request.
struct Request {
    std::vector<std::string> prompts;
    std::vector<Tokens> tokens;
    std::optional<int> images_per_prompt, height, width, steps, max_sequence_length;
    std::optional<float> guidance_scale;
    std::vector<std::uint64_t> seeds;  // one for the whole batch, or one per image; none: a random one
    bool decode = true;                // false: only the latents are wanted
    // Called after each step with its index and the latents [batch, tokens, channels]; false stops the call with an
    // Error. What it throws comes out of draw. It must not use the same pipeline.
    std::function<bool(int step, View<float> latents)> on_step;
};

// Pictures, and how they were made.
class Result {
public:
    // Takes ownership.
    explicit Result(arcflow_result *handle) : handle_(handle) {}

    int batch() const { return arcflow_result_batch(handle_.get()); }
    int height() const { return arcflow_result_height(handle_.get()); }
    int width() const { return arcflow_result_width(handle_.get()); }

    // RGB, [batch, height, width, 3]; empty without decoding.
    View<std::uint8_t> pixels() const {
        const std::uint8_t *data = arcflow_result_pixels(handle_.get());
        return {data, data == nullptr ? 0 : static_cast<std::size_t>(batch()) * image_size()};
    }
    // One picture of them, [height, width, 3].
    View<std::uint8_t> image(int index) const {
        if (index < 0 || index >= batch() || pixels().empty())
            throw Error(ARCFLOW_REQUEST_ERROR, ("there is no image " + std::to_string(index) + " of " +
                                                std::to_string(pixels().empty() ? 0 : batch()))
                                                   .c_str());
        return {pixels().data() + static_cast<std::size_t>(index) * image_size(), image_size()};
    }
    // [batch, tokens, channels].
    View<float> latents() const {
        std::int32_t tokens = 0, channels = 0;
        const float *data = arcflow_result_latents(handle_.get(), &tokens, &channels);
        return {data, static_cast<std::size_t>(batch()) * static_cast<std::size_t>(tokens) *
                          static_cast<std::size_t>(channels)};
    }
    // Those that draw the same noise again: 1 or batch.
    View<std::uint64_t> seeds() const {
        std::size_t count = 0;
        const std::uint64_t *data = arcflow_result_seeds(handle_.get(), &count);
        return {data, count};
    }
    // One a line, "" if there were none.
    std::string warnings() const { return arcflow_result_warnings(handle_.get()); }
    // {"tokenize": 0.02, ...} in ms.
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

// A loaded bundle. Its end waits for calls in progress.
class Pipeline {
public:
    // Checks and loads the bundle in a directory, whose name is UTF-8.
    explicit Pipeline(const std::string &bundle, const Options &options = {}) {
        arcflow_options c = ARCFLOW_OPTIONS_INIT;
        c.backend = options.backend.empty() ? nullptr : detail::c_string(options.backend, "backend");
        c.threads = options.threads;
        c.low_memory = options.low_memory ? 1 : 0;
        c.full_check = options.full_check ? 1 : 0;
        arcflow_pipeline *handle = nullptr;
        detail::check(arcflow_open(detail::c_string(bundle, "bundle"), &c, &handle));
        handle_.reset(handle);
    }

    // Draws images_per_prompt pictures of each prompt, prompt by prompt.
    Result draw(const Request &request) const {
        if (!request.prompts.empty() && !request.tokens.empty())
            throw Error(ARCFLOW_REQUEST_ERROR, "prompts and tokens must not both be given; give one of them");
        std::vector<const char *> prompts;
        for (const std::string &prompt : request.prompts) prompts.push_back(detail::c_string(prompt, "prompt"));
        std::vector<arcflow_tokens> tokens;
        for (const Tokens &t : request.tokens)
            tokens.push_back({t.ids.data(), t.ids.size(), t.ids_2.data(), t.ids_2.size()});
        arcflow_request c = ARCFLOW_REQUEST_INIT;
        c.prompts = prompts.empty() ? nullptr : prompts.data();
        c.tokens = tokens.empty() ? nullptr : tokens.data();
        c.prompt_count = prompts.empty() ? tokens.size() : prompts.size();
        // Zero is the C struct's default, so one that was set is told apart here.
        c.num_images_per_prompt = given(request.images_per_prompt, "images_per_prompt");
        c.height = given(request.height, "height");
        c.width = given(request.width, "width");
        c.num_inference_steps = given(request.steps, "steps");
        c.max_sequence_length = given(request.max_sequence_length, "max_sequence_length");
        if (request.guidance_scale) {
            // A negative one means the default in the C struct.
            if (*request.guidance_scale < 0)
                throw Error(ARCFLOW_REQUEST_ERROR, "guidance_scale must not be negative; leave it out for the default");
            c.guidance_scale = *request.guidance_scale;
        }
        c.seeds = request.seeds.empty() ? nullptr : request.seeds.data();
        c.seed_count = request.seeds.size();
        c.skip_decode = request.decode ? 0 : 1;
        Step step{request.on_step, nullptr};
        if (request.on_step) {
            c.on_step = &Step::call;
            c.user = &step;
        }
        arcflow_result *result = nullptr;
        const arcflow_status status = arcflow_draw(handle_.get(), &c, &result);
        if (step.thrown) std::rethrow_exception(step.thrown);
        detail::check(status);
        return Result(result);
    }

private:
    // No exception may go through the library, so one of the callback's waits here.
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

    static std::int32_t given(const std::optional<int> &value, const char *name) {
        if (value && *value == 0)
            throw Error(ARCFLOW_REQUEST_ERROR, (std::string(name) + " must be at least 1, got 0").c_str());
        return value.value_or(0);
    }

    struct Close {
        void operator()(arcflow_pipeline *handle) const { arcflow_close(handle); }
    };
    std::unique_ptr<arcflow_pipeline, Close> handle_;
};

}  // namespace api
}  // namespace arcflow
