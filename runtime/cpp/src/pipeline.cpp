#include "pipeline.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"
#include "maths.h"
#include "repr.h"
#include "safetensors.h"

namespace arcflow {

namespace {

// [1, size] int64, what a text encoder takes.
Tensor row(const std::vector<int64_t> &ids) {
    Tensor tensor(DType::int64, {1, static_cast<int64_t>(ids.size())});
    std::copy(ids.begin(), ids.end(), tensor.as<int64_t>());
    return tensor;
}

std::size_t bytes_of_row(const Tensor &tensor) {
    return tensor.shape[0] == 0 ? 0 : tensor.data.size() / static_cast<std::size_t>(tensor.shape[0]);
}

// The rows of `tensor` at these places of its first axis.
Tensor gather(const Tensor &tensor, const std::vector<std::size_t> &places) {
    std::vector<int64_t> shape = tensor.shape;
    shape[0] = static_cast<int64_t>(places.size());
    Tensor out(tensor.dtype, shape);
    const std::size_t bytes = bytes_of_row(tensor);
    for (std::size_t i = 0; i < places.size(); ++i)
        std::memcpy(out.data.data() + i * bytes, tensor.data.data() + places[i] * bytes, bytes);
    return out;
}

// Puts the rows of `from` at these places of `to`.
void scatter(const Tensor &from, const std::vector<std::size_t> &places, Tensor &to) {
    const std::size_t bytes = bytes_of_row(to);
    for (std::size_t i = 0; i < places.size(); ++i)
        std::memcpy(to.data.data() + places[i] * bytes, from.data.data() + i * bytes, bytes);
}

// Tensors of shape [1, ...], of one dtype, joined along the first axis.
Tensor join(const std::vector<const Tensor *> &tensors, const std::string &what) {
    std::vector<int64_t> shape = tensors.front()->shape;
    shape[0] = static_cast<int64_t>(tensors.size());
    Tensor out(tensors.front()->dtype, shape);
    const std::size_t bytes = bytes_of_row(out);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (tensors[i]->dtype != out.dtype || tensors[i]->shape != tensors.front()->shape)
            throw engine_error(what + " must have one shape for all prompts, got " + tensors.front()->describe() +
                               " and " + tensors[i]->describe() + "; export the bundle again");
        std::memcpy(out.data.data() + i * bytes, tensors[i]->data.data(), bytes);
    }
    return out;
}

// Refuses latents [B, N, C] with NaN or Inf, which would decode to a black picture.
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
    throw engine_error("backbone: latents of images " + repr(bad) + " must be finite, got NaN or Inf; " + advice);
}

// Refuses the flat black pictures [B, H, W, 3] that a float16 decoder gives when it overflows.
void check_pictures(const Tensor &pixels, DType precision) {
    if (precision != DType::float16) return;
    const std::size_t size = bytes_of_row(pixels);
    std::vector<int64_t> flat;
    for (std::size_t i = 0; i < static_cast<std::size_t>(pixels.shape[0]); ++i) {
        const uint8_t *p = pixels.as<uint8_t>() + i * size;
        if (std::all_of(p, p + size, [&](uint8_t v) { return v == *p; })) flat.push_back(static_cast<int64_t>(i));
    }
    if (flat.empty()) return;
    throw engine_error("vae_decoder: pictures " + repr(flat) +
                       " must have more than one colour; float16 overflows in some decoders, "
                       "export with --precision vae_decoder=float32");
}

}  // namespace

Pipeline::Pipeline(const std::filesystem::path &bundle, const LoadOptions &options)
    : Pipeline(Bundle::open(bundle, options.full_check), make_backend(options.backend, options.threads),
               options.low_memory) {}

Pipeline::Pipeline(Bundle bundle, std::unique_ptr<Backend> backend, bool low_memory)
    : bundle_(std::move(bundle)),
      tokenizer_(bundle_),
      table_(load_modulation(bundle_)),
      parts_(bundle_, std::move(backend), !low_memory) {}

Drawing Pipeline::draw(const arcflow_request &arguments) {
    Stopwatch total, watch;
    Drawing out;
    {
        const auto timed = total("total");
        Request request = check_request(arguments, bundle_.manifest);
        out.batch = request.batch();
        out.height_px = request.height_px;
        out.width_px = request.width_px;
        out.warnings = request.warnings;
        const Prompts prompts = encode(request, out.warnings, watch);
        out.latents = denoise(request, prompts, watch);
        if (request.decode) out.pixels = decode(out.latents, request.height_px, request.width_px, watch);
        out.seeds = std::move(request.seeds);
    }
    out.timings_ms = watch.ms();
    out.timings_ms.push_back(total.ms().front());
    return out;
}

// Tokenise, and encode the distinct prompts that are not in the cache.
Pipeline::Prompts Pipeline::encode(const Request &request, std::vector<std::string> &warnings, Stopwatch &watch) {
    std::vector<Ids> ids;
    {
        const auto timed = watch("tokenize");
        ids = tokenizer_.tokenize(request, warnings);
    }
    const auto timed = watch("encode");
    Prompts prompts;
    std::map<Ids, std::size_t> places;
    std::vector<const Ids *> distinct, unknown;
    for (const Ids &prompt : ids) {
        const auto [place, is_new] = places.emplace(prompt, distinct.size());
        if (is_new) {
            distinct.push_back(&prompt);
            prompts.embeddings.push_back(cache_.get(prompt));
            if (!prompts.embeddings.back()) unknown.push_back(&prompt);
        }
        prompts.of_image.insert(prompts.of_image.end(), static_cast<std::size_t>(request.images_per_prompt),
                                place->second);
    }
    const auto made = run_encoders(unknown, watch);
    for (std::size_t i = 0; i < unknown.size(); ++i) {
        cache_.put(*unknown[i], made[i]);
        prompts.embeddings[places.at(*unknown[i])] = made[i];
    }
    return prompts;
}

// Each prompt by itself, so that its states never depend on the others.
std::vector<std::shared_ptr<const Embeddings>> Pipeline::run_encoders(const std::vector<const Ids *> &prompts,
                                                                      Stopwatch &watch) {
    const bool flux = bundle_.manifest.family == Family::flux;
    std::vector<Tensor> pooled(prompts.size());
    if (flux) pooled = run_encoder("text_encoder", "pooled_projections", {1, -1}, prompts, watch);
    std::vector<Tensor> states =
        run_encoder(flux ? "text_encoder_2" : "text_encoder", "encoder_hidden_states", {1, -1, -1}, prompts, watch);
    std::vector<std::shared_ptr<const Embeddings>> out;
    for (std::size_t i = 0; i < prompts.size(); ++i)
        out.push_back(std::make_shared<const Embeddings>(Embeddings{std::move(states[i]), std::move(pooled[i])}));
    return out;
}

std::vector<Tensor> Pipeline::run_encoder(const std::string &part, const std::string &output,
                                          const std::vector<int64_t> &shape, const std::vector<const Ids *> &prompts,
                                          Stopwatch &watch) {
    std::vector<Tensor> out;
    if (prompts.empty()) return out;
    Parts::Use encoder = parts_.use(part);
    for (const Ids *prompt : prompts) {
        const std::vector<int64_t> &ids = prompt->at(part);
        Tensors inputs;
        inputs["input_ids"] = encoder.cast("input_ids", row(ids));
        Tensors outputs = encoder.run(inputs, watch);
        std::vector<int64_t> expected = shape;
        if (expected.size() == 3) expected[1] = static_cast<int64_t>(ids.size());
        Tensor tensor = encoder.take(outputs, output, expected);
        if (expected.size() == 3 && bundle_.manifest.text.drop_tokens > 0) {
            // [1, T, Dt] without the states of the template's beginning.
            const int64_t kept = tensor.shape[1] - bundle_.manifest.text.drop_tokens;
            if (kept < 1)
                throw request_error("tokens must hold more than the template's first " +
                                    std::to_string(bundle_.manifest.text.drop_tokens) + " ids, got " +
                                    std::to_string(ids.size()) + "; give the whole template");
            const std::size_t bytes = tensor.data.size() / ids.size() * static_cast<std::size_t>(kept);
            tensor.data.erase(tensor.data.begin(), tensor.data.end() - static_cast<std::ptrdiff_t>(bytes));
            tensor.shape[1] = kept;
        }
        out.push_back(std::move(tensor));
    }
    return out;
}

// The modulation of every step in one run, or from the bundle's table where it has the step count.
Pipeline::Modulation Pipeline::condition(const Request &request, const Prompts &prompts,
                                         const std::vector<double> &sigmas, Stopwatch &watch) {
    const Manifest &m = bundle_.manifest;
    if (const auto baked = table_.find(request.steps); baked != table_.end()) return {baked->second, 1};
    const std::vector<float> timesteps = conditioning_timesteps(sigmas, m.family, m.reference_dtype);
    Parts::Use conditioner = parts_.use("conditioner");
    Tensors inputs;
    Tensor seen(DType::float32, {request.steps});
    std::copy(timesteps.begin(), timesteps.end(), seen.as<float>());
    inputs["timesteps"] = conditioner.cast("timesteps", std::move(seen));
    int64_t count = 1;
    if (m.family == Family::flux) {
        std::vector<const Tensor *> pooled;
        for (const auto &e : prompts.embeddings) pooled.push_back(&e->pooled);
        inputs["pooled_projections"] =
            conditioner.cast("pooled_projections", join(pooled, "text_encoder: pooled_projections"));
        count = static_cast<int64_t>(pooled.size());
    }
    if (request.guidance_scale) {
        Tensor guidance(DType::float32, {count});
        std::fill_n(guidance.as<float>(), count, conditioning_guidance(*request.guidance_scale, m.reference_dtype));
        inputs["guidance"] = conditioner.cast("guidance", std::move(guidance));
    }
    Tensors outputs = conditioner.run(inputs, watch);
    Tensor rows = conditioner.take(outputs, "modulation", {request.steps, count, -1});
    rows.shape = {request.steps * count, rows.shape[2]};
    return {std::move(rows), count};
}

// Latents [B, N, C] float32 after every step: one backbone run and one closed-form update each.
Tensor Pipeline::denoise(const Request &request, const Prompts &prompts, Stopwatch &watch) {
    const Manifest &m = bundle_.manifest;
    const std::vector<double> schedule = sigmas(request.steps, m.schedule);
    const int64_t height = tokens(request.height_px), width = tokens(request.width_px), patch = m.latents.patch_size;
    const Modulation modulation = [&] {
        const auto timed = watch("condition");
        return condition(request, prompts, schedule, watch);
    }();
    Tensor latents = [&] {
        const auto timed = watch("noise");
        return draw_latents(request.seeds, request.batch(), m.latents, height * patch, width * patch);
    }();
    Parts::Use backbone = parts_.use("backbone");
    std::vector<Group> groups = [&] {
        const auto timed = watch("rotary");
        return group(backbone, prompts, height, width);
    }();
    const int64_t modes = m.latents.num_gaussians, sub_pixels = m.latents.logweights_channels;
    for (std::size_t step = 0; step < static_cast<std::size_t>(request.steps); ++step) {
        for (Group &g : groups) {
            const auto images = static_cast<int64_t>(g.images.size());
            Tensor x = gather(latents, g.images);
            Tensors heads;
            {
                const auto timed = watch("backbone");
                std::vector<std::size_t> rows;
                for (const std::size_t image : g.images)
                    rows.push_back(step * static_cast<std::size_t>(modulation.prompts) +
                                   (modulation.prompts > 1 ? prompts.of_image[image] : 0));
                g.inputs["latents"] = backbone.cast("latents", x);
                g.inputs["modulation"] = backbone.cast("modulation", gather(modulation.rows, rows));
                heads = backbone.run(g.inputs, watch);
            }
            const auto timed = watch("update");
            const Tensor means = backbone.take(heads, "means", {images, x.shape[1], modes, x.shape[2]});
            const Tensor logweights = backbone.take(heads, "logweights", {images, x.shape[1], modes, sub_pixels});
            const Tensor loggammas = backbone.take(heads, "loggammas", {images, x.shape[1], modes - 1, sub_pixels});
            update(x, means, logweights, loggammas, schedule[step], schedule[step + 1]);
            scatter(x, g.images, latents);
        }
        if (request.on_step == nullptr) continue;
        const int answer = request.on_step(request.user, static_cast<int32_t>(step), latents.as<float>(),
                                           static_cast<std::size_t>(latents.count()));
        if (answer != 0)
            throw request_error("on_step stopped the call after step " + std::to_string(step) + " by returning " +
                                std::to_string(answer) + "; return 0 to go on");
    }
    check_finite(latents, m.parts.at("backbone").precision);
    return latents;
}

// The batch's images by text length, so that no image's text is padded to its neighbours'.
std::vector<Pipeline::Group> Pipeline::group(const Parts::Use &backbone, const Prompts &prompts, int64_t height,
                                             int64_t width) const {
    std::vector<Group> groups;
    std::map<int64_t, std::size_t> by_length;
    for (std::size_t image = 0; image < prompts.of_image.size(); ++image) {
        const int64_t length = prompts.embeddings[prompts.of_image[image]]->states.shape[1];
        const auto [place, is_new] = by_length.emplace(length, groups.size());
        if (is_new) groups.emplace_back();
        groups[place->second].images.push_back(image);
    }
    const Tensor rotary = image_rotary(bundle_.manifest, height, width);
    for (Group &g : groups) {
        std::vector<const Tensor *> states;
        for (const std::size_t image : g.images)
            states.push_back(&prompts.embeddings[prompts.of_image[image]]->states);
        const int64_t length = states.front()->shape[1];
        g.inputs["encoder_hidden_states"] =
            backbone.cast("encoder_hidden_states", join(states, "text encoder: encoder_hidden_states"));
        g.inputs["image_rotary"] = backbone.cast("image_rotary", rotary);
        g.inputs["text_rotary"] =
            backbone.cast("text_rotary", text_rotary(bundle_.manifest, height, width, length));
    }
    return groups;
}

// Latents [B, N, C] -> pixels [B, H, W, 3] uint8, RGB.
Tensor Pipeline::decode(const Tensor &latents, int64_t height, int64_t width, Stopwatch &watch) {
    const auto timed = watch("decode");
    Parts::Use decoder = parts_.use("vae_decoder");
    Tensor grid = latents;
    grid.shape = {latents.shape[0], tokens(height), tokens(width), latents.shape[2]};
    Tensors inputs;
    inputs["latents"] = decoder.cast("latents", std::move(grid));
    Tensors outputs = decoder.run(inputs, watch);
    Tensor pixels = decoder.take(outputs, "images", {latents.shape[0], height, width, 3});
    if (pixels.dtype != DType::uint8)
        throw engine_error("vae_decoder: images must be uint8, got " + pixels.describe() + "; export the bundle again");
    check_pictures(pixels, bundle_.manifest.parts.at("vae_decoder").precision);
    return pixels;
}

int64_t Pipeline::tokens(int64_t size_px) const {
    return size_px / (bundle_.manifest.latents.vae_scale_factor * bundle_.manifest.latents.patch_size);
}

}  // namespace arcflow
