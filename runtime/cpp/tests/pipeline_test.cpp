// Tests of the pipeline with engines that record their inputs: pipeline_test FLUX QWEN HALF, three bundles of
// tests/fake_bundle.py. QWEN has baked modulation; HALF is FLUX in float16. Requests use token ids.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "check.h"
#include "error.h"
#include "fake/fake_backend.h"

namespace {

using arcflow::DType;
using arcflow::MemoryMode;
using arcflow::Tensor;
using arcflow::Tensors;

using Prompts = std::vector<std::vector<int64_t>>;

arcflow::Images generate(arcflow::Pipeline &pipe, const Prompts &prompts, int32_t images = 1, bool decode = true,
                         arcflow_step_callback on_step = nullptr) {
    static const int64_t t5[] = {1};
    std::vector<arcflow_tokens> tokens;
    const bool flux = prompts.front().size() == 1;
    for (const auto &ids : prompts) tokens.push_back({ids.data(), ids.size(), flux ? t5 : nullptr, flux ? 1u : 0u});
    const uint64_t seed = 3;
    arcflow_request request = ARCFLOW_REQUEST_INIT;
    request.tokens = tokens.data();
    request.prompt_count = tokens.size();
    request.num_images_per_prompt = images;
    request.height = 32;
    request.width = 48;
    request.max_sequence_length = 4;
    request.seeds = &seed;
    request.seed_count = 1;
    request.skip_decode = decode ? 0 : 1;
    request.on_step = on_step;
    return pipe.generate(request);
}

std::vector<float> floats(const Tensor &tensor) {
    const Tensor single = arcflow::cast(tensor, DType::float32);
    return {single.as<float>(), single.as<float>() + single.count()};
}

using Names = std::vector<std::string>;
using Shape = std::vector<int64_t>;

void runs_in_order(const char *flux) {
    Log log;
    const auto pipe = open(flux, log);
    CHECK(log.most_open == 5);
    generate(*pipe, {{7}, {8}, {7}});
    CHECK((log.runs == Names{"text_encoder", "text_encoder", "text_encoder_2", "text_encoder_2", "conditioner",
                             "backbone", "backbone", "vae_decoder"}));
    // CLIP's ids are padded to 77, T5's to max_sequence_length.
    CHECK((log.inputs[0].at("input_ids").shape == Shape{1, 77}));
    CHECK((log.of("text_encoder_2")[0].at("input_ids").shape == Shape{1, 4}));
}

void conditions_once_for_distinct_prompts(const char *flux) {
    Log log;
    const auto pipe = open(flux, log);
    generate(*pipe, {{7}, {8}}, 2);
    const Tensors seen = log.of("conditioner").at(0);
    CHECK((seen.at("timesteps").shape == Shape{2}));
    CHECK((floats(seen.at("guidance")) == std::vector<float>{3500, 3500}));
    CHECK((seen.at("pooled_projections").shape == Shape{2, 6}));
    CHECK(floats(seen.at("pooled_projections"))[6] == 8);
    // Step s and prompt u have row 2 s + u.
    const auto first = floats(log.of("backbone")[0].at("modulation"));
    const auto second = floats(log.of("backbone")[1].at("modulation"));
    const std::vector<float> expected{0, 0, 1, 1};
    for (std::size_t i = 0; i < expected.size(); ++i) {
        CHECK(first[5 * i] == expected[i]);
        CHECK(second[5 * i] == expected[i] + 2);
    }
}

void caches_sixteen_prompts(const char *flux) {
    Log log;
    const auto pipe = open(flux, log);
    for (int64_t id = 0; id < 17; ++id) generate(*pipe, {{id}}, 1, false);
    CHECK(log.of("text_encoder").size() == 17);
    generate(*pipe, {{16}}, 1, false);
    generate(*pipe, {{1}}, 1, false);
    CHECK(log.of("text_encoder").size() == 17);
    generate(*pipe, {{0}}, 1, false);  // drops 2, because 1 was used since
    CHECK(log.of("text_encoder").size() == 18);
    generate(*pipe, {{1}}, 1, false);
    CHECK(log.of("text_encoder").size() == 18);
    generate(*pipe, {{2}}, 1, false);
    CHECK(log.of("text_encoder").size() == 19);
}

void low_memory_opens_one_part_at_a_time(const char *flux) {
    Log log, other;
    const auto lean = open(flux, log, MemoryMode::low);
    CHECK(log.opens.empty());
    const arcflow::Images images = generate(*lean, {{7}, {8}});
    CHECK((log.opens == Names{"text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder"}));
    CHECK(log.most_open == 1 && log.open.empty());
    generate(*lean, {{7}}, 1, false);
    CHECK((Names(log.opens.begin() + 5, log.opens.end()) == Names{"conditioner", "backbone"}));
    CHECK(generate(*open(flux, other), {{7}, {8}}).latents.data == images.latents.data);
}

// Backbone and decoder stay open; the others are opened one at a time, and only for what is not in a cache.
void balanced_keeps_what_every_image_needs(const char *flux) {
    Log log, other;
    const auto pipe = open(flux, log, MemoryMode::balanced);
    CHECK(pipe->memory() == MemoryMode::balanced && (log.opens == Names{"backbone", "vae_decoder"}));
    log.opens.clear();
    const arcflow::Images images = generate(*pipe, {{7}, {8}});
    CHECK((log.opens == Names{"text_encoder", "text_encoder_2", "conditioner"}));
    CHECK(log.most_open == 3 && log.open.size() == 2);
    CHECK(generate(*pipe, {{7}, {8}}).latents.data == images.latents.data && log.opens.size() == 3);
    generate(*pipe, {{8}});  // the text is known, the modulation of this batch is not
    CHECK(log.opens.size() == 4 && log.opens.back() == "conditioner");
    CHECK(generate(*open(flux, other), {{7}, {8}}).latents.data == images.latents.data);
}

void groups_by_text_length(const char *qwen) {
    Log log;
    const auto pipe = open(qwen, log);
    generate(*pipe, {{1, 2, 3, 4}, {1, 2, 3, 5, 6}, {1, 2, 3, 7}}, 1, false);
    CHECK((log.runs ==
           Names{"text_encoder", "text_encoder", "text_encoder", "backbone", "backbone", "backbone", "backbone"}));
    const auto runs = log.of("backbone");
    CHECK((runs[0].at("latents").shape == Shape{2, 6, 64}) && (runs[1].at("latents").shape == Shape{1, 6, 64}));
    // The states of the template's first three tokens are dropped.
    CHECK((runs[0].at("encoder_hidden_states").shape == Shape{2, 1, 8}));
    CHECK(floats(runs[0].at("encoder_hidden_states")).front() == 4);
    CHECK(floats(runs[0].at("encoder_hidden_states")).back() == 7);
    CHECK(floats(runs[1].at("encoder_hidden_states")).front() == 5);
    CHECK((runs[1].at("text_rotary").shape == Shape{2, 2, 16}));
    // The baked modulation, equal for all prompts.
    CHECK((runs[0].at("modulation").shape == Shape{2, 5}) && floats(runs[0].at("modulation")).front() == 2);
}

void updates_and_scatters(const char *qwen) {
    Log log;
    const auto pipe = open(qwen, log);
    const Prompts prompts{{1, 2, 3, 4}, {1, 2, 3, 5, 6}, {1, 2, 3, 7}};
    log.mean = 0;
    const Tensor noise = generate(*pipe, prompts, 1, false).latents;
    log.mean = 0.5f;
    const Tensor moved = generate(*pipe, prompts, 1, false).latents;
    // A constant velocity of 0.5 from sigma 1 to 0 changes every number by -0.5.
    for (int64_t i = 0; i < noise.count(); ++i)
        CHECK(std::abs(noise.as<float>()[i] - 0.5f - moved.as<float>()[i]) < 1e-6f * 4);
}

void casts_to_each_parts_dtype(const char *half) {
    Log log;
    const auto pipe = open(half, log);
    CHECK(generate(*pipe, {{7}}).latents.dtype == DType::float32);
    const Tensors seen = log.of("backbone").at(0);
    for (const char *name : {"latents", "encoder_hidden_states", "modulation"})
        CHECK(seen.at(name).dtype == DType::float16);
    for (const char *name : {"image_rotary", "text_rotary"}) CHECK(seen.at(name).dtype == DType::float32);
    CHECK(log.of("conditioner").at(0).at("pooled_projections").dtype == DType::float16);
    CHECK(log.of("conditioner").at(0).at("timesteps").dtype == DType::float32);
    CHECK(log.of("vae_decoder").at(0).at("latents").dtype == DType::float32);
}

void refuses_bad_images(const char *flux, const char *half) {
    for (const float poison : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
        Log log;
        log.mean = poison;
        CHECK(thrown<arcflow::Error>([&] { generate(*open(flux, log), {{7}}, 2); }) ==
              "backbone: latents of images [0, 1] must be finite, got NaN or Inf; "
              "check the checkpoint and adapter with `arcflow verify`");
        const std::string advice = thrown<arcflow::Error>([&] { generate(*open(half, log), {{7}}); });
        CHECK(advice.find("; float16 overflows in these models:") != std::string::npos);
        CHECK(log.of("vae_decoder").empty());
    }
    Log flat;
    flat.colour_step = 0;
    CHECK(thrown<arcflow::Error>([&] { generate(*open(half, flat), {{7}}, 2); }) ==
          "vae_decoder: images [0, 1] must have more than one colour; float16 overflows in some decoders, "
          "export with --precision vae_decoder=float32");
    CHECK(generate(*open(flux, flat), {{7}}).pixels.count() == 32 * 48 * 3);
}

// An error names the one image of a batch that is bad, also if it is not the first.
void names_the_bad_image(const char *half) {
    const auto fill_second = [](Tensor &tensor, std::byte value) {
        std::fill(tensor.data.begin() + static_cast<std::ptrdiff_t>(tensor.data.size() / 2), tensor.data.end(), value);
    };
    Log log;
    log.spoil = [&](const std::string &part, Tensors &out) {
        if (part == "backbone") fill_second(out.at("means"), std::byte{0xff});  // NaN
    };
    CHECK(thrown<arcflow::Error>([&] {
              generate(*open(half, log), {{7}}, 2);
          }).rfind("backbone: latents of images [1] must be finite", 0) == 0);
    log.spoil = [&](const std::string &part, Tensors &out) {
        if (part == "vae_decoder") fill_second(out.at("images"), std::byte{9});
    };
    CHECK(thrown<arcflow::Error>([&] {
              generate(*open(half, log), {{7}}, 2);
          }).rfind("vae_decoder: images [1] must have more than one colour", 0) == 0);
}

void refuses_outputs_that_do_not_fit(const char *flux) {
    Log log;
    const auto pipe = open(flux, log);
    log.spoil = [](const std::string &part, Tensors &out) {
        if (part == "backbone") out["means"] = Tensor(DType::float32, {1, 6, 3, 32});
    };
    CHECK(
        thrown<arcflow::Error>([&] { generate(*pipe, {{7}}); }) ==
        "backbone: output \"means\" must have shape [1, 6, 3, 64], got float32[1, 6, 3, 32]; export the bundle again");
    log.spoil = [](const std::string &part, Tensors &out) {
        if (part == "vae_decoder") out.clear();
    };
    CHECK(thrown<arcflow::Error>([&] { generate(*pipe, {{7}}); }) ==
          "vae_decoder: the engine returned no output \"images\"; export the bundle again");
}

void denoises_at_one_go_where_the_backend_can(const char *qwen, const char *half) {
    Log log, other;
    log.has_denoiser = true;
    const auto pipe = open(qwen, log);
    const Prompts prompts{{1, 2, 3, 4}, {1, 2, 3, 5, 6}, {1, 2, 3, 7}};
    const arcflow::Images images = generate(*pipe, prompts);
    CHECK(log.of("backbone").empty() && log.of("vae_decoder").empty());
    // One job for each text length, with the images that have it.
    CHECK(log.denoised.size() == 2 && log.of("conditioner").empty());
    const arcflow::DenoiseJob &seen = log.denoised[0], &other_length = log.denoised[1];
    CHECK(seen.height == 2 && seen.width == 3 && seen.sigmas.size() == 3 && seen.timesteps.size() == 2 && seen.pixels);
    CHECK(seen.table != nullptr && (seen.table->shape == Shape{2, 5}) && !seen.guidance);
    CHECK(seen.texts.size() == 2 && (seen.texts[1]->states.shape == Shape{1, 1, 8}));
    CHECK(other_length.texts.size() == 1 && (other_length.texts[0]->states.shape == Shape{1, 2, 8}));
    const int64_t numbers = 6 * 64;  // one generator for the batch: each image's noise begins where the last one ends
    CHECK(seen.streams[0].first == 0 && seen.streams[1].first == 2 * numbers &&
          other_length.streams[0].first == numbers);
    // The same latents as step by step, up to the update's rounding.
    const arcflow::Images stepped = generate(*open(qwen, other), prompts);
    CHECK(images.pixels.shape == stepped.pixels.shape && images.latents.shape == stepped.latents.shape);
    // The engines' pixels depend on an image's place in its job: 0 and 2 are the first job's images, 1 the second's.
    const auto image = [](const arcflow::Images &of, std::size_t i) {
        return std::vector<std::byte>(of.pixels.data.begin() + static_cast<std::ptrdiff_t>(i * 32 * 48 * 3),
                                      of.pixels.data.begin() + static_cast<std::ptrdiff_t>((i + 1) * 32 * 48 * 3));
    };
    CHECK(image(images, 0) == image(stepped, 0) && image(images, 1) == image(stepped, 0));
    CHECK(image(images, 2) == image(stepped, 1));
    for (int64_t i = 0; i < stepped.latents.count(); ++i)
        CHECK(std::abs(images.latents.as<float>()[i] - stepped.latents.as<float>()[i]) < 1e-6f * 4);

    // Stages have the device's times, and "stage" is the rest of the call.
    std::map<std::string, double> ms(images.timings_ms.begin(), images.timings_ms.end());
    for (const auto &[stage, expected] : device_ms) CHECK(ms.at(stage) == 2 * expected);  // of two jobs
    CHECK(ms.at("engines") > 2 * 7e-6 && ms.at("stage") > 0);
    double sum = 0;
    for (const auto &[stage, time] : ms) sum += stage == "engines" || stage == "total" ? 0 : time;
    CHECK(sum <= ms.at("total"));

    // A callback gets the latents of the whole batch, in order, during the last job.
    static std::vector<std::vector<float>> steps;
    steps.clear();
    const arcflow::Images again =
        generate(*pipe, prompts, 1, false, [](void *, int32_t, const float *latents, size_t count) {
            steps.emplace_back(latents, latents + count);
            return 0;
        });
    CHECK(steps.size() == 2 && log.of("backbone").empty());
    CHECK(std::memcmp(steps[1].data(), again.latents.data.data(), again.latents.data.size()) == 0);
    CHECK(again.latents.data == images.latents.data);
    CHECK(thrown<arcflow::Error>([&] {
              generate(*pipe, prompts, 1, false, [](void *, int32_t, const float *, size_t) { return 7; });
          }) == "on_step stopped the call after step 0 by returning 7; return 0 to go on");

    // The denoiser runs in every mode, and loads the parts itself.
    for (const MemoryMode mode : {MemoryMode::balanced, MemoryMode::low}) {
        const std::size_t jobs = log.denoised.size();
        generate(*open(qwen, log, mode), {{1, 2, 3, 4}}, 1, false);
        CHECK(log.denoised.size() == jobs + 1 && log.of("backbone").empty());
    }

    log.mean = std::nanf("");
    CHECK(thrown<arcflow::Error>([&] {
              generate(*pipe, prompts);
          }).find("latents of images [0, 1, 2] must be finite") != std::string::npos);
    Log flat;
    flat.has_denoiser = true;
    flat.colour_step = 0;
    CHECK(thrown<arcflow::Error>([&] { generate(*open(half, flat), {{7}}); }).find("more than one colour") !=
          std::string::npos);
}

}  // namespace

int main(int argc, char **argv) {
    CHECK(argc == 4);
    const char *flux = argv[1], *qwen = argv[2], *half = argv[3];
    runs_in_order(flux);
    conditions_once_for_distinct_prompts(flux);
    caches_sixteen_prompts(flux);
    low_memory_opens_one_part_at_a_time(flux);
    balanced_keeps_what_every_image_needs(flux);
    groups_by_text_length(qwen);
    updates_and_scatters(qwen);
    casts_to_each_parts_dtype(half);
    refuses_bad_images(flux, half);
    names_the_bad_image(half);
    refuses_outputs_that_do_not_fit(flux);
    denoises_at_one_go_where_the_backend_can(qwen, half);
    std::puts("ok");
}
