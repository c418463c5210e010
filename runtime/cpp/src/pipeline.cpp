// Runs a request through all stages of the pipeline.
#include "pipeline.h"

#include <algorithm>
#include <cmath>

#include "constants.h"
#include "error.h"
#include "json_text.h"
#include "maths.h"
#include "rows.h"
#include "safetensors.h"

namespace arcflow {

namespace {

// One prompt's ids as a text encoder takes them: [1, size] int64.
Tensor row(const std::vector<int64_t> &ids) {
    Tensor tensor(DType::int64, {1, static_cast<int64_t>(ids.size())});
    std::copy(ids.begin(), ids.end(), tensor.as<int64_t>());
    return tensor;
}

// Throw Error if latents [B, N, C] contain NaN or Inf, which would decode to a black image.
void check_finite(const Tensor &latents, DType precision) {
    const auto size = static_cast<std::size_t>(latents.shape[1] * latents.shape[2]);
    std::vector<int64_t> bad;
    for (std::size_t i = 0; i < static_cast<std::size_t>(latents.shape[0]); ++i) {
        const float *x = latents.as<float>() + i * size;
        if (!std::all_of(x, x + size, [](float v) { return std::isfinite(v); })) bad.push_back(static_cast<int64_t>(i));
    }
    if (bad.empty()) return;
    const char *advice = precision == DType::float16
                             ? "float16 overflows in these models: export with --dtype bfloat16 or float32, or with "
                               "the linears in float32 that `arcflow verify` names"
                             : "check the checkpoint and adapter with `arcflow verify`";
    throw engine_error("backbone: latents of images " + json_text(bad) + " must be finite, got NaN or Inf; " + advice);
}

// Throw Error if an image of [B, H, W, 3] has one colour only: a float16 decoder that overflows gives black images.
void check_images(const Tensor &pixels, DType precision) {
    if (precision != DType::float16) return;
    const std::size_t size = bytes_of_row(pixels);
    std::vector<int64_t> flat;
    for (std::size_t i = 0; i < static_cast<std::size_t>(pixels.shape[0]); ++i) {
        const uint8_t *p = pixels.as<uint8_t>() + i * size;
        if (std::all_of(p, p + size, [&](uint8_t v) { return v == *p; })) flat.push_back(static_cast<int64_t>(i));
    }
    if (flat.empty()) return;
    throw engine_error("vae_decoder: images " + json_text(flat) +
                       " must have more than one colour; float16 overflows in some decoders, "
                       "export with --precision vae_decoder=float32");
}

}  // namespace

// Braces fix the order of evaluation, so that errors of the bundle come before errors of the backend.
Pipeline::Pipeline(const std::filesystem::path &bundle, const LoadOptions &options)
    : Pipeline{Bundle::open(bundle, options.full_check), make_backend(options.backend, options.threads),
               options.memory} {}

Pipeline::Pipeline(Bundle bundle, std::unique_ptr<Backend> backend, std::optional<MemoryMode> memory)
    : bundle_(std::move(bundle)),
      tokenizer_(bundle_),
      table_(load_modulation(bundle_)),
      conditioning_(load_conditioning(bundle_)),
      lora_sets_(bundle_.manifest),
      parts_(bundle_, std::move(backend), memory) {}

std::shared_ptr<const Lora> Pipeline::open_lora(const std::filesystem::path &path) const {
    return read_lora(path, bundle_.manifest);
}

void Pipeline::forget_lora(const Lora &lora) {
    lora_sets_.forget(lora);
    if (Denoiser *const denoiser = parts_.denoiser()) denoiser->forget(lora);
}

Images Pipeline::generate(const arcflow_request &arguments, const std::vector<ScaledLora> &loras) {
    Stopwatch total, watch;
    Images out;
    {
        const auto timed = total("total");
        Request request = check_request(arguments, bundle_.manifest);
        out.batch = request.batch();
        out.height_px = request.height_px;
        out.width_px = request.width_px;
        out.warnings = request.warnings;
        auto prepared = std::make_shared<const PreparedLoras>();
        if (!loras.empty()) {
            const auto timed_loras = watch("loras");
            prepared = lora_sets_.get(loras);
        }
        const Prompts prompts = encode(request, *prepared, out.warnings, watch);
        Denoised made;
        Denoiser *denoiser = parts_.denoiser();
        if (denoiser != nullptr) made = run_denoiser(*denoiser, request, prepared, prompts, watch);
        else made.latents = run_steps(request, *prepared, prompts, watch);
        check_finite(made.latents, bundle_.manifest.parts.at("backbone").precision);
        if (request.decode) {
            if (denoiser == nullptr) made.pixels = decode(made.latents, request.height_px, request.width_px, watch);
            check_images(made.pixels, bundle_.manifest.parts.at("vae_decoder").precision);
        }
        out.latents = std::move(made.latents);
        out.pixels = std::move(made.pixels);
        out.seeds = std::move(request.seeds);
    }
    out.timings_ms = watch.ms();
    out.timings_ms.push_back(total.ms().front());
    return out;
}

// Tokenize the prompts, and encode those distinct prompts whose embeddings are not in the cache.
Pipeline::Prompts Pipeline::encode(const Request &request, const PreparedLoras &loras,
                                   std::vector<std::string> &warnings, Stopwatch &watch) {
    std::vector<Ids> ids;
    {
        const auto timed = watch("tokenize");
        ids = tokenizer_.tokenize(request, warnings);
    }
    const auto timed = watch("encode");
    Prompts prompts;
    std::map<Ids, int64_t> places;
    std::vector<const Ids *> distinct, unknown;
    int64_t index = 0;
    for (const Ids &prompt : ids) {
        const auto [place, is_new] = places.emplace(prompt, static_cast<int64_t>(distinct.size()));
        if (is_new) {
            distinct.push_back(&prompt);
            prompts.embeddings.push_back(cache_.get({prompt, loras.text_key}));
            if (!prompts.embeddings.back()) unknown.push_back(&prompt);
        }
        std::vector<int64_t> &of_image =
            index++ < request.prompt_count() ? prompts.of_image : prompts.negative_of_image;
        of_image.insert(of_image.end(), static_cast<std::size_t>(request.images_per_prompt), place->second);
    }
    const auto made = run_encoders(unknown, loras, watch);
    for (std::size_t i = 0; i < unknown.size(); ++i) {
        cache_.put({*unknown[i], loras.text_key}, made[i]);
        prompts.embeddings[static_cast<std::size_t>(places.at(*unknown[i]))] = made[i];
    }
    return prompts;
}

// Encode each prompt by itself, so that its states do not depend on other prompts.
std::vector<std::shared_ptr<const Embeddings>> Pipeline::run_encoders(const std::vector<const Ids *> &prompts,
                                                                      const PreparedLoras &loras, Stopwatch &watch) {
    const bool flux = bundle_.manifest.family == Family::flux;
    std::vector<Tensor> pooled(prompts.size());
    if (flux)
        pooled = run_encoder("text_encoder", "pooled_projections", {1, -1}, prompts, loras.of("text_encoder"), watch);
    const std::string part = flux ? "text_encoder_2" : "text_encoder";
    std::vector<Tensor> states =
        run_encoder(part, "encoder_hidden_states", {1, -1, -1}, prompts, loras.of(part), watch);
    std::vector<std::shared_ptr<const Embeddings>> out;
    for (std::size_t i = 0; i < prompts.size(); ++i)
        out.push_back(std::make_shared<const Embeddings>(Embeddings{std::move(states[i]), std::move(pooled[i])}));
    return out;
}

std::vector<Tensor> Pipeline::run_encoder(const std::string &part, const std::string &output,
                                          const std::vector<int64_t> &shape, const std::vector<const Ids *> &prompts,
                                          const Tensors *slots, Stopwatch &watch) {
    std::vector<Tensor> out;
    if (prompts.empty()) return out;
    Parts::Use encoder = parts_.use(part, slots);
    for (const Ids *prompt : prompts) {
        const std::vector<int64_t> &ids = prompt->at(part);
        Tensors inputs;
        inputs["input_ids"] = encoder.cast("input_ids", row(ids));
        Tensors outputs = encoder.run(inputs, watch);
        std::vector<int64_t> expected = shape;
        if (expected.size() == 3) expected[1] = static_cast<int64_t>(ids.size());
        Tensor tensor = encoder.take(outputs, output, expected);
        if (expected.size() == 3 && bundle_.manifest.text.drop_tokens > 0) {
            // Drop the states of the template's first tokens: [1, T, Dt] -> [1, kept, Dt].
            const int64_t kept = tensor.shape[1] - bundle_.manifest.text.drop_tokens;
            if (kept < 1) {
                throw request_error("request.tokens must hold more than the template's first " +
                                    std::to_string(bundle_.manifest.text.drop_tokens) + " ids, got " +
                                    std::to_string(ids.size()) + "; give the whole template");
            }
            const std::size_t bytes = tensor.data.size() / ids.size() * static_cast<std::size_t>(kept);
            tensor.data.erase(tensor.data.begin(), tensor.data.end() - static_cast<std::ptrdiff_t>(bytes));
            tensor.shape[1] = kept;
        }
        out.push_back(std::move(tensor));
    }
    return out;
}

// The baked modulation [S, M] with the LoRAs of its slots, or null if the conditioner must run.
std::shared_ptr<const Tensor> Pipeline::baked(int64_t steps, const PreparedLoras &loras) {
    const auto found = table_.find(steps);
    if (found == table_.end() || loras.of("conditioner") != nullptr) return nullptr;
    const Tensors *slots = loras.of(modulation_name);
    if (slots == nullptr) return {std::shared_ptr<const Tensor>(), &found->second};  // the pipeline's, not counted
    const std::pair key(loras.key, steps);
    if (auto kept = changed_.get(key)) return kept;
    auto made = std::make_shared<const Tensor>(
        changed_table(found->second, conditioning_.at(steps), *bundle_.manifest.modulation, *slots));
    changed_.put(key, made);
    return made;
}

// The modulation of all steps: [S, U, M] for U distinct prompts, or [S, 1, M] if it does not depend on the prompt. It
// comes from the bundle's table if that has this number of steps, else from the cache or one run of the conditioner.
Tensor Pipeline::condition(const Request &request, const PreparedLoras &loras, const Prompts &prompts,
                           Stopwatch &watch) {
    const auto timed = watch("condition");
    const Manifest &m = bundle_.manifest;
    if (const auto table = baked(request.steps, loras)) {
        Tensor modulation = *table;
        modulation.shape.insert(modulation.shape.begin() + 1, 1);
        return modulation;
    }
    const std::vector<float> values = timesteps(request);
    Tensors given;
    given["timesteps"] = Tensor(DType::float32, {request.steps});
    std::copy(values.begin(), values.end(), given["timesteps"].as<float>());
    int64_t count = 1;
    if (m.family == Family::flux) {
        std::vector<const Tensor *> pooled;
        for (const auto &e : prompts.embeddings) pooled.push_back(&e->pooled);
        given["pooled_projections"] = join(pooled, "text_encoder: pooled_projections");
        count = static_cast<int64_t>(pooled.size());
    }
    if (const std::optional<float> scale = guidance(request)) {
        given["guidance"] = Tensor(DType::float32, {count});
        std::fill_n(given["guidance"].as<float>(), count, *scale);
    }
    const ModulationKey key = modulation_key(loras, given);
    if (const auto kept = modulations_.get(key)) return *kept;
    Parts::Use conditioner = parts_.use("conditioner", loras.of("conditioner"));
    Tensors inputs;
    for (auto &[name, tensor] : given) inputs[name] = conditioner.cast(name, std::move(tensor));
    Tensors outputs = conditioner.run(inputs, watch);
    Tensor made = conditioner.take(outputs, "modulation", {request.steps, count, -1});
    modulations_.put(key, std::make_shared<const Tensor>(made), made.data.size());
    return made;
}

std::vector<double> Pipeline::schedule(const Request &request) const {
    return sigmas(request.steps, bundle_.manifest.schedule, tokens(request.height_px) * tokens(request.width_px));
}

// The conditioner's inputs.
std::vector<float> Pipeline::timesteps(const Request &request) const {
    const Manifest &m = bundle_.manifest;
    return conditioning_timesteps(schedule(request), m.family, m.reference_dtype, m.sampler);
}

std::optional<float> Pipeline::guidance(const Request &request) const {
    if (!request.guidance_scale) return std::nullopt;
    return conditioning_guidance(*request.guidance_scale, bundle_.manifest.reference_dtype);
}

}  // namespace arcflow
