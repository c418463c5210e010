// Runs a request through all stages of the pipeline.
#include "pipeline.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "constants.h"
#include "error.h"
#include "json_text.h"
#include "maths.h"
#include "safetensors.h"

namespace arcflow {

namespace {

// One prompt's ids as a text encoder takes them: [1, size] int64.
Tensor row(const std::vector<int64_t> &ids) {
    Tensor tensor(DType::int64, {1, static_cast<int64_t>(ids.size())});
    std::copy(ids.begin(), ids.end(), tensor.as<int64_t>());
    return tensor;
}

std::size_t bytes_of_row(const Tensor &tensor) {
    return tensor.shape[0] == 0 ? 0 : tensor.data.size() / static_cast<std::size_t>(tensor.shape[0]);
}

// The rows of `tensor` with these indices along the first axis.
Tensor gather(const Tensor &tensor, const std::vector<int64_t> &places) {
    std::vector<int64_t> shape = tensor.shape;
    shape[0] = static_cast<int64_t>(places.size());
    Tensor out(tensor.dtype, shape);
    const std::size_t bytes = bytes_of_row(tensor);
    for (std::size_t i = 0; i < places.size(); ++i) {
        std::memcpy(out.data.data() + i * bytes, tensor.data.data() + static_cast<std::size_t>(places[i]) * bytes,
                    bytes);
    }
    return out;
}

// Write the rows of `from` to these rows of `to`.
void scatter(const Tensor &from, const std::vector<int64_t> &places, Tensor &to) {
    const std::size_t bytes = bytes_of_row(to);
    for (std::size_t i = 0; i < places.size(); ++i)
        std::memcpy(to.data.data() + static_cast<std::size_t>(places[i]) * bytes, from.data.data() + i * bytes, bytes);
}

// Join tensors of shape [1, ...] along the first axis. Throws Error, which `what` names, if shapes or dtypes differ.
Tensor join(const std::vector<const Tensor *> &tensors, const std::string &what) {
    std::vector<int64_t> shape = tensors.front()->shape;
    shape[0] = static_cast<int64_t>(tensors.size());
    Tensor out(tensors.front()->dtype, shape);
    const std::size_t bytes = bytes_of_row(out);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (tensors[i]->dtype != out.dtype || tensors[i]->shape != tensors.front()->shape) {
            throw engine_error(what + " must have one shape for all prompts, got " + tensors.front()->describe() +
                               " and " + tensors[i]->describe() + "; export the bundle again");
        }
        std::memcpy(out.data.data() + i * bytes, tensors[i]->data.data(), bytes);
    }
    return out;
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

void check_pixels(const Tensor &pixels, const std::vector<int64_t> &shape) {
    if (pixels.dtype == DType::uint8 && pixels.shape == shape) return;
    throw engine_error("vae_decoder: output \"images\" must be " + Tensor(DType::uint8, shape).describe() + ", got " +
                       pixels.describe() + "; export the bundle again");
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

// Tell the caller of a step. Throws Error if the caller stops the request.
void report(const Request &request, int64_t step, const Tensor &latents) {
    const int answer = request.on_step(request.user, static_cast<int32_t>(step), latents.as<float>(),
                                       static_cast<std::size_t>(latents.count()));
    if (answer != 0) {
        throw request_error("on_step stopped the call after step " + std::to_string(step) + " by returning " +
                            std::to_string(answer) + "; return 0 to go on");
    }
}

}  // namespace

// Braces fix the order of evaluation, so that errors of the bundle come before errors of the backend.
Pipeline::Pipeline(const std::filesystem::path &bundle, const LoadOptions &options)
    : Pipeline{Bundle::open(bundle, options.full_check), make_backend(options.backend, options.threads),
               options.low_memory} {}

Pipeline::Pipeline(Bundle bundle, std::unique_ptr<Backend> backend, bool low_memory)
    : bundle_(std::move(bundle)),
      tokenizer_(bundle_),
      table_(load_modulation(bundle_)),
      conditioning_(load_conditioning(bundle_)),
      lora_sets_(bundle_.manifest),
      parts_(bundle_, std::move(backend), !low_memory) {}

std::shared_ptr<const Lora> Pipeline::open_lora(const std::filesystem::path &path) const {
    return read_lora(path, bundle_.manifest);
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
        if (denoiser != nullptr) made = run_denoiser(*denoiser, request, prompts, watch);
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
    for (const Ids &prompt : ids) {
        const auto [place, is_new] = places.emplace(prompt, static_cast<int64_t>(distinct.size()));
        if (is_new) {
            distinct.push_back(&prompt);
            prompts.embeddings.push_back(cache_.get({prompt, loras.text_key}));
            if (!prompts.embeddings.back()) unknown.push_back(&prompt);
        }
        prompts.of_image.insert(prompts.of_image.end(), static_cast<std::size_t>(request.images_per_prompt),
                                place->second);
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
// comes from the bundle's table if that has this number of steps, else from one run of the conditioner.
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
    Parts::Use conditioner = parts_.use("conditioner", loras.of("conditioner"));
    Tensors inputs;
    Tensor seen(DType::float32, {request.steps});
    std::copy(values.begin(), values.end(), seen.as<float>());
    inputs["timesteps"] = conditioner.cast("timesteps", std::move(seen));
    int64_t count = 1;
    if (m.family == Family::flux) {
        std::vector<const Tensor *> pooled;
        for (const auto &e : prompts.embeddings) pooled.push_back(&e->pooled);
        inputs["pooled_projections"] =
            conditioner.cast("pooled_projections", join(pooled, "text_encoder: pooled_projections"));
        count = static_cast<int64_t>(pooled.size());
    }
    if (const std::optional<float> scale = guidance(request)) {
        Tensor scales(DType::float32, {count});
        std::fill_n(scales.as<float>(), count, *scale);
        inputs["guidance"] = conditioner.cast("guidance", std::move(scales));
    }
    Tensors outputs = conditioner.run(inputs, watch);
    return conditioner.take(outputs, "modulation", {request.steps, count, -1});
}

// The conditioner's inputs.
std::vector<float> Pipeline::timesteps(const Request &request) const {
    const Manifest &m = bundle_.manifest;
    return conditioning_timesteps(sigmas(request.steps, m.schedule), m.family, m.reference_dtype);
}

std::optional<float> Pipeline::guidance(const Request &request) const {
    if (!request.guidance_scale) return std::nullopt;
    return conditioning_guidance(*request.guidance_scale, bundle_.manifest.reference_dtype);
}

// Group the batch's images by text length, so that no text is padded.
std::vector<Pipeline::Group> Pipeline::group(const Prompts &prompts, int64_t height, int64_t width) {
    std::vector<Group> groups;
    std::map<int64_t, std::size_t> by_length;
    for (std::size_t image = 0; image < prompts.of_image.size(); ++image) {
        const int64_t prompt = prompts.of_image[image];
        const int64_t length = prompts.embeddings[static_cast<std::size_t>(prompt)]->states.shape[1];
        const auto [place, is_new] = by_length.emplace(length, groups.size());
        if (is_new) groups.push_back({{}, {}, rotary(height, width, length)});
        groups[place->second].images.push_back(static_cast<int64_t>(image));
        groups[place->second].prompts.push_back(prompt);
    }
    return groups;
}

// The rotary table of the image tokens (`text_tokens` 0) or the text tokens. Tables are cached: at 1024 px the image's
// takes half a million sines and cosines.
std::shared_ptr<const Tensor> Pipeline::rotary(int64_t height, int64_t width, int64_t text_tokens) {
    const std::array<int64_t, 3> key{height, width, text_tokens};
    if (auto kept = rotaries_.get(key)) return kept;
    const Manifest &m = bundle_.manifest;
    auto made = std::make_shared<const Tensor>(text_tokens == 0 ? image_rotary(m, height, width)
                                                                : text_rotary(m, height, width, text_tokens));
    rotaries_.put(key, made);
    return made;
}

// Run conditioner, all steps and the decoder on the device, with one job for each text length.
Denoised Pipeline::run_denoiser(Denoiser &denoiser, const Request &request, const Prompts &prompts, Stopwatch &watch) {
    const Manifest &m = bundle_.manifest;
    const int64_t height = tokens(request.height_px), width = tokens(request.width_px), batch = request.batch();
    const std::vector<int64_t> shape{batch, height * width,
                                     m.latents.channels * m.latents.patch_size * m.latents.patch_size};
    const std::vector<NoiseStream> streams = noise_streams(request.seeds, batch, shape[1] * shape[2]);
    DenoiseJob job{};
    std::vector<Group> groups;
    {
        const auto timed = watch("rotary");
        job.image_rotary = rotary(height, width);
        groups = group(prompts, height, width);
    }
    job.height = height;
    job.width = width;
    job.sigmas = sigmas(request.steps, m.schedule);
    job.timesteps = timesteps(request);
    job.guidance = guidance(request);
    const auto baked = table_.find(request.steps);
    job.table = baked == table_.end() ? nullptr : &baked->second;
    job.pixels = request.decode;

    Denoised made;
    made.latents = Tensor(DType::float32, shape);
    if (request.decode) made.pixels = Tensor(DType::uint8, {batch, request.height_px, request.width_px, 3});
    std::vector<Tensor> by_step(request.on_step == nullptr ? 0 : job.timesteps.size(), made.latents);
    for (const Group &g : groups) {
        job.streams.clear();
        job.texts.clear();
        for (std::size_t i = 0; i < g.images.size(); ++i) {
            job.streams.push_back(streams[static_cast<std::size_t>(g.images[i])]);
            job.texts.push_back(prompts.embeddings[static_cast<std::size_t>(g.prompts[i])]);
        }
        job.text_rotary = g.rotary;
        OnStep on_step;
        if (request.on_step != nullptr) {
            // The jobs run one after the other; the caller gets the whole batch, so it is told during the last job.
            on_step = [&](int64_t step, const Tensor &latents) {
                Tensor &whole = by_step[static_cast<std::size_t>(step)];
                scatter(latents, g.images, whole);
                if (&g == &groups.back()) report(request, step, whole);
            };
        }
        const Denoised part = run_job(denoiser, job, on_step, watch);
        scatter(part.latents, g.images, made.latents);
        if (request.decode) scatter(part.pixels, g.images, made.pixels);
    }
    return made;
}

Denoised Pipeline::run_job(Denoiser &denoiser, const DenoiseJob &job, const OnStep &on_step, Stopwatch &watch) const {
    Stopwatch all;
    Denoised made;
    {
        const auto timed = all("all");
        made = denoiser.run(job, on_step);
    }
    // The device measured its own stages. What remains of the call's time is the host's, and is reported as "stage".
    double rest = all.ms().front().second;
    for (const auto &[stage, ms] : made.stages_ms) {
        watch.add(stage, ms);
        if (stage == "condition" || stage == "backbone" || stage == "decode") watch.add("engines", ms);
        rest -= ms;
    }
    watch.add("stage", std::max(rest, 0.0));
    const Latents &sizes = bundle_.manifest.latents;
    const auto images = static_cast<int64_t>(job.texts.size());
    const std::vector<int64_t> shape{images, job.height * job.width,
                                     sizes.channels * sizes.patch_size * sizes.patch_size};
    if (made.latents.dtype != DType::float32 || made.latents.shape != shape) {
        throw engine_error("backbone: latents must be " + Tensor(DType::float32, shape).describe() + ", got " +
                           made.latents.describe());
    }
    const int64_t token_px = sizes.patch_size * sizes.vae_scale_factor;
    if (job.pixels) check_pixels(made.pixels, {images, job.height * token_px, job.width * token_px, 3});
    return made;
}

// Run the steps one by one on the host, each a backbone run and a closed-form update -> latents [B, N, C] float32.
Tensor Pipeline::run_steps(const Request &request, const PreparedLoras &loras, const Prompts &prompts,
                           Stopwatch &watch) {
    const Latents &sizes = bundle_.manifest.latents;
    const int64_t height = tokens(request.height_px), width = tokens(request.width_px);
    const int64_t modes = sizes.num_gaussians, sub_pixels = sizes.logweights_channels;
    const std::vector<double> schedule = sigmas(request.steps, bundle_.manifest.schedule);
    Tensor modulation = condition(request, loras, prompts, watch);  // [S, U, M]
    const int64_t steps = modulation.shape[0], rows_of_step = modulation.shape[1];
    modulation.shape = {steps * rows_of_step, modulation.shape[2]};
    std::shared_ptr<const Tensor> image_rotary;
    std::vector<Group> groups;
    {
        const auto timed = watch("rotary");
        image_rotary = rotary(height, width);
        groups = group(prompts, height, width);
    }
    Tensor latents;
    {
        const auto timed = watch("noise");
        latents = packed_noise(request.seeds, request.batch(), sizes, request.height_px / sizes.vae_scale_factor,
                               request.width_px / sizes.vae_scale_factor);
    }
    Parts::Use backbone = parts_.use("backbone", loras.of("backbone"));
    std::vector<Tensors> given(groups.size());  // the backbone's inputs of each group
    for (std::size_t i = 0; i < given.size(); ++i) {
        std::vector<const Tensor *> states;
        for (const int64_t prompt : groups[i].prompts)
            states.push_back(&prompts.embeddings[static_cast<std::size_t>(prompt)]->states);
        given[i]["encoder_hidden_states"] =
            backbone.cast("encoder_hidden_states", join(states, "text encoder: encoder_hidden_states"));
        given[i]["image_rotary"] = backbone.cast("image_rotary", *image_rotary);
        given[i]["text_rotary"] = backbone.cast("text_rotary", *groups[i].rotary);
    }
    for (int64_t step = 0; step < steps; ++step) {
        for (std::size_t i = 0; i < given.size(); ++i) {
            const Group &g = groups[i];
            const auto images = static_cast<int64_t>(g.images.size());
            Tensor x = gather(latents, g.images);
            Tensors heads;
            {
                const auto timed = watch("backbone");
                std::vector<int64_t> rows;
                for (const int64_t prompt : g.prompts)
                    rows.push_back(step * rows_of_step + (rows_of_step > 1 ? prompt : 0));
                given[i]["latents"] = backbone.cast("latents", x);
                given[i]["modulation"] = backbone.cast("modulation", gather(modulation, rows));
                heads = backbone.run(given[i], watch);
            }
            const auto timed = watch("update");
            const Tensor means = backbone.take(heads, "means", {images, x.shape[1], modes, x.shape[2]});
            const Tensor logweights = backbone.take(heads, "logweights", {images, x.shape[1], modes, sub_pixels});
            const Tensor loggammas = backbone.take(heads, "loggammas", {images, x.shape[1], modes - 1, sub_pixels});
            const auto place = static_cast<std::size_t>(step);
            update(x, means, logweights, loggammas, schedule[place], schedule[place + 1]);
            scatter(x, g.images, latents);
        }
        if (request.on_step != nullptr) report(request, step, latents);
    }
    return latents;
}

// Decode latents [B, N, C] -> pixels [B, H, W, 3] uint8, RGB.
Tensor Pipeline::decode(const Tensor &latents, int64_t height, int64_t width, Stopwatch &watch) {
    const auto timed = watch("decode");
    Parts::Use decoder = parts_.use("vae_decoder");
    Tensor grid = latents;
    grid.shape = {latents.shape[0], tokens(height), tokens(width), latents.shape[2]};
    Tensors inputs;
    inputs["latents"] = decoder.cast("latents", std::move(grid));
    Tensors outputs = decoder.run(inputs, watch);
    Tensor pixels = decoder.take(outputs, "images", {-1, -1, -1, -1});
    check_pixels(pixels, {latents.shape[0], height, width, 3});
    return pixels;
}

int64_t Pipeline::tokens(int64_t size_px) const {
    return size_px / (bundle_.manifest.latents.vae_scale_factor * bundle_.manifest.latents.patch_size);
}

}  // namespace arcflow
