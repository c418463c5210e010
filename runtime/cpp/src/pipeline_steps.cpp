// The pipeline's stages from noise to pixels: on the device in one piece, or part by part on host tensors.
#include <algorithm>
#include <map>

#include "error.h"
#include "maths.h"
#include "pipeline.h"
#include "rows.h"

namespace arcflow {

namespace {

void check_pixels(const Tensor &pixels, const std::vector<int64_t> &shape) {
    if (pixels.dtype == DType::uint8 && pixels.shape == shape) return;
    throw engine_error("vae_decoder: output \"images\" must be " + Tensor(DType::uint8, shape).describe() + ", got " +
                       pixels.describe() + "; export the bundle again");
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

// Group the batch's images by the text length of their prompts, so that no text is padded.
std::vector<Pipeline::Group> Pipeline::group(const Prompts &prompts, const std::vector<int64_t> &of_image,
                                             int64_t height, int64_t width) {
    std::vector<Group> groups;
    std::map<int64_t, std::size_t> by_length;
    for (std::size_t image = 0; image < of_image.size(); ++image) {
        const int64_t prompt = of_image[image];
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

// The images [b] of a batch whose prompts have the same text length, and so have their negative prompts, if any.
// `prompts` and `negatives` [b]: their indices in Prompts::embeddings.
struct Pipeline::JobGroup {
    std::vector<int64_t> images, prompts, negatives;
    std::shared_ptr<const Tensor> rotary, negative_rotary;
};

std::vector<Pipeline::JobGroup> Pipeline::job_groups(const Prompts &prompts, int64_t height, int64_t width) {
    std::vector<JobGroup> found;
    const std::vector<Group> negative = group(prompts, prompts.negative_of_image, height, width);
    for (Group &g : group(prompts, prompts.of_image, height, width)) {
        if (negative.empty()) {
            found.push_back({std::move(g.images), std::move(g.prompts), {}, std::move(g.rotary), nullptr});
            continue;
        }
        for (const Group &n : negative) {
            JobGroup both{{}, {}, {}, g.rotary, n.rotary};
            for (std::size_t i = 0; i < g.images.size(); ++i) {
                const auto place = std::find(n.images.begin(), n.images.end(), g.images[i]);
                if (place == n.images.end()) continue;
                both.images.push_back(g.images[i]);
                both.prompts.push_back(g.prompts[i]);
                both.negatives.push_back(n.prompts[static_cast<std::size_t>(place - n.images.begin())]);
            }
            if (!both.images.empty()) found.push_back(std::move(both));
        }
    }
    return found;
}

// Run conditioner, all steps and the decoder on the device, with one job for each pair of text lengths.
Denoised Pipeline::run_denoiser(Denoiser &denoiser, const Request &request,
                                const std::shared_ptr<const PreparedLoras> &loras, const Prompts &prompts,
                                Stopwatch &watch) {
    const Manifest &m = bundle_.manifest;
    const int64_t height = tokens(request.height_px), width = tokens(request.width_px), batch = request.batch();
    const std::vector<int64_t> shape{batch, height * width,
                                     m.latents.channels * m.latents.patch_size * m.latents.patch_size};
    const std::vector<NoiseStream> streams = noise_streams(request.seeds, batch, shape[1] * shape[2]);
    DenoiseJob job{};
    std::vector<JobGroup> groups;
    {
        const auto timed = watch("rotary");
        job.image_rotary = rotary(height, width);
        groups = job_groups(prompts, height, width);
    }
    const auto texts_of = [&](const std::vector<int64_t> &places) {
        std::vector<std::shared_ptr<const Embeddings>> texts;
        for (const int64_t place : places) texts.push_back(prompts.embeddings[static_cast<std::size_t>(place)]);
        return texts;
    };
    job.height = height;
    job.width = width;
    job.sigmas = schedule(request);
    job.timesteps = timesteps(request);
    job.guidance = guidance(request);
    job.table = baked(request.steps, *loras);
    job.loras = loras;
    job.pixels = request.decode;

    Denoised made;
    made.latents = Tensor(DType::float32, shape);
    if (request.decode) made.pixels = Tensor(DType::uint8, {batch, request.height_px, request.width_px, 3});
    std::vector<Tensor> by_step(request.on_step == nullptr ? 0 : job.timesteps.size(), made.latents);
    for (const JobGroup &g : groups) {
        job.streams.clear();
        for (const int64_t image : g.images) job.streams.push_back(streams[static_cast<std::size_t>(image)]);
        job.texts = texts_of(g.prompts);
        job.text_rotary = g.rotary;
        if (request.guided())
            job.negative = {texts_of(g.negatives), g.negative_rotary, static_cast<float>(request.true_cfg_scale)};
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

Pipeline::Pass Pipeline::prepare(std::vector<Group> groups, const Prompts &prompts, const Tensor &image_rotary,
                                 int64_t rows_of_step, const Parts::Use &backbone) const {
    std::vector<Tensors> inputs(groups.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        std::vector<const Tensor *> states;
        for (const int64_t prompt : groups[i].prompts)
            states.push_back(&prompts.embeddings[static_cast<std::size_t>(prompt)]->states);
        inputs[i]["encoder_hidden_states"] =
            backbone.cast("encoder_hidden_states", join(states, "text encoder: encoder_hidden_states"));
        inputs[i]["image_rotary"] = backbone.cast("image_rotary", image_rotary);
        inputs[i]["text_rotary"] = backbone.cast("text_rotary", *groups[i].rotary);
    }
    return {std::move(groups), std::move(inputs), rows_of_step};
}

// Run the backbone on the latents [b, N, C] of one group.
Tensors Pipeline::run_backbone(Parts::Use &backbone, Pass &pass, std::size_t group, const Tensor &latents,
                               const Tensor &modulation, int64_t step, Stopwatch &watch) const {
    const auto timed = watch("backbone");
    std::vector<int64_t> rows;
    for (const int64_t prompt : pass.groups[group].prompts)
        rows.push_back(step * pass.rows_of_step + (pass.rows_of_step > 1 ? prompt : 0));
    Tensors &inputs = pass.inputs[group];
    inputs["latents"] = backbone.cast("latents", latents);
    inputs["modulation"] = backbone.cast("modulation", gather(modulation, rows));
    return backbone.run(inputs, watch);
}

// One step of a momentum student, in place.
void Pipeline::momentum_step(Parts::Use &backbone, Pass &pass, Tensor &latents, const Tensor &modulation, int64_t step,
                             const std::vector<double> &schedule, Stopwatch &watch) const {
    const int64_t modes = bundle_.manifest.latents.num_gaussians;
    const int64_t sub_pixels = bundle_.manifest.latents.logweights_channels;
    for (std::size_t i = 0; i < pass.groups.size(); ++i) {
        const std::vector<int64_t> &images = pass.groups[i].images;
        Tensor x = gather(latents, images);
        Tensors heads = run_backbone(backbone, pass, i, x, modulation, step, watch);
        const auto timed = watch("update");
        const int64_t b = x.shape[0], n = x.shape[1];
        const Tensor means = backbone.take(heads, "means", {b, n, modes, x.shape[2]});
        const Tensor logweights = backbone.take(heads, "logweights", {b, n, modes, sub_pixels});
        const Tensor loggammas = backbone.take(heads, "loggammas", {b, n, modes - 1, sub_pixels});
        const auto place = static_cast<std::size_t>(step);
        update(x, means, logweights, loggammas, schedule[place], schedule[place + 1]);
        scatter(x, images, latents);
    }
}

// The velocity [B, N, C] float32 of a straight student.
Tensor Pipeline::velocity(Parts::Use &backbone, Pass &pass, const Tensor &latents, const Tensor &modulation,
                          int64_t step, Stopwatch &watch) const {
    Tensor found(DType::float32, latents.shape);
    for (std::size_t i = 0; i < pass.groups.size(); ++i) {
        const std::vector<int64_t> &images = pass.groups[i].images;
        const Tensor x = gather(latents, images);
        Tensors outputs = run_backbone(backbone, pass, i, x, modulation, step, watch);
        const auto timed = watch("update");
        scatter(cast(backbone.take(outputs, "velocity", x.shape), DType::float32), images, found);
    }
    return found;
}

// Run the steps one by one on the host, each a backbone run, or two with guidance, and an update -> latents [B, N, C]
// float32.
Tensor Pipeline::run_steps(const Request &request, const PreparedLoras &loras, const Prompts &prompts,
                           Stopwatch &watch) {
    const Manifest &m = bundle_.manifest;
    const int64_t height = tokens(request.height_px), width = tokens(request.width_px);
    const std::vector<double> levels = schedule(request);
    Tensor modulation = condition(request, loras, prompts, watch);  // [S, U, M]
    const int64_t rows_of_step = modulation.shape[1];
    modulation.shape = {modulation.shape[0] * rows_of_step, modulation.shape[2]};
    std::shared_ptr<const Tensor> image_rotary;
    std::vector<Group> groups, negative_groups;
    {
        const auto timed = watch("rotary");
        image_rotary = rotary(height, width);
        groups = group(prompts, prompts.of_image, height, width);
        negative_groups = group(prompts, prompts.negative_of_image, height, width);
    }
    Tensor latents;
    {
        const auto timed = watch("noise");
        latents =
            packed_noise(request.seeds, request.batch(), m.latents, request.height_px / m.latents.vae_scale_factor,
                         request.width_px / m.latents.vae_scale_factor);
    }
    Parts::Use backbone = parts_.use("backbone", loras.of("backbone"));
    Pass pass = prepare(std::move(groups), prompts, *image_rotary, rows_of_step, backbone);
    Pass negative = prepare(std::move(negative_groups), prompts, *image_rotary, rows_of_step, backbone);
    for (int64_t step = 0; step < request.steps; ++step) {
        if (m.sampler == Sampler::momentum) {
            momentum_step(backbone, pass, latents, modulation, step, levels, watch);
        } else {
            Tensor v = velocity(backbone, pass, latents, modulation, step, watch);
            Tensor away;
            if (request.guided()) away = velocity(backbone, negative, latents, modulation, step, watch);
            const auto timed = watch("update");
            if (request.guided()) guide(v, away, request.true_cfg_scale);
            const auto place = static_cast<std::size_t>(step);
            euler(latents, v, levels[place] - levels[place + 1]);
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
