// Tests of the pipeline with straight students (B16): pipeline_straight_test FLUX QWEN, two bundles of
// make_straight (tests/test_straight_runtime.py). FLUX has a dynamic shift, QWEN a table for 2 steps and guidance of
// scale 4.
#include <cmath>

#include "fake/fake_backend.h"

namespace {

using arcflow::Tensor;

// The negative prompts of a request, as token ids, and its scale.
struct Negative {
    std::vector<std::vector<int64_t>> ids;
    float scale = 0;
};

arcflow::Images generate(arcflow::Pipeline &pipe, const std::vector<std::vector<int64_t>> &prompts,
                         const Negative &negative = {}, int32_t images = 1) {
    static const int64_t t5[] = {1};
    const bool flux = prompts.front().size() == 1;
    const auto tokens_of = [&](const std::vector<std::vector<int64_t>> &given) {
        std::vector<arcflow_tokens> tokens;
        for (const auto &ids : given) tokens.push_back({ids.data(), ids.size(), flux ? t5 : nullptr, flux ? 1u : 0u});
        return tokens;
    };
    const std::vector<arcflow_tokens> tokens = tokens_of(prompts), negatives = tokens_of(negative.ids);
    const uint64_t seed = 3;
    arcflow_request request = ARCFLOW_REQUEST_INIT;
    request.tokens = tokens.data();
    request.prompt_count = tokens.size();
    request.negative_tokens = negatives.empty() ? nullptr : negatives.data();
    request.negative_prompt_count = negatives.size();
    request.true_cfg_scale = negative.scale;
    request.num_images_per_prompt = images;
    request.height = 32;
    request.width = 48;
    request.max_sequence_length = 4;
    request.seeds = &seed;
    request.seed_count = 1;
    return pipe.generate(request);
}

// Checks that image `image` of `moved` is that of `noise` plus `by`. Sigma falls from 1 to 0 in two steps, each of
// which rounds a product and a sum of numbers up to 16 to float32.
void check_moved(const Tensor &noise, const Tensor &moved, std::size_t image, float by) {
    const auto each = static_cast<std::size_t>(noise.count() / noise.shape[0]);
    for (std::size_t i = image * each; i < (image + 1) * each; ++i)
        CHECK(std::abs(noise.as<float>()[i] + by - moved.as<float>()[i]) < 4 * 16 * std::ldexp(1.0f, -24));
}

Tensor noise_of_seed(const char *root, const std::vector<std::vector<int64_t>> &prompts, int32_t images = 1) {
    Log log;
    log.mean = 0;
    return generate(*open(root, log), prompts, {}, images).latents;
}

void a_step_is_a_line(const char *flux) {
    Log log;
    log.mean = 0.5f;
    const auto pipe = open(flux, log);
    const Tensor noise = noise_of_seed(flux, {{7}});
    // T5's first id is 1, so the velocity is 0.5.
    check_moved(noise, generate(*pipe, {{7}}).latents, 0, -0.5f);
    // 32 x 48 pixels are 6 tokens, and t is 1 and 0.5. tests/test_cpp_straight.py compares every schedule with
    // Python's.
    const Tensor seen = log.of("conditioner").at(0).at("timesteps");
    const double shift = std::exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (6 - 256));
    CHECK(seen.as<float>()[0] == 1000 && std::abs(seen.as<float>()[1] - 1000 * shift / (1 + shift)) < 1e-3);
}

// Guided, the velocity 1 of the prompt and 2 of the negative prompt become 2 + 4 (1 - 2) = -2, and -1 at the norm of 1.
void a_negative_prompt_runs_the_backbone_twice(const char *qwen) {
    Log log;
    log.mean = 1;
    const auto pipe = open(qwen, log);
    const std::vector<std::vector<int64_t>> prompts{{1, 2, 3, 1}};
    const Tensor noise = noise_of_seed(qwen, prompts);
    const arcflow::Images plain = generate(*pipe, prompts);
    check_moved(noise, plain.latents, 0, -1);
    CHECK(log.of("backbone").size() == 2);
    CHECK(plain.warnings == std::vector<std::string>{"without request.negative_prompts the images are not guided; "
                                                     "give \" \" as a negative prompt to guide them"});
    const arcflow::Images guided = generate(*pipe, prompts, {{{1, 2, 3, 2, 9}}, 0});
    check_moved(noise, guided.latents, 0, 1);
    CHECK(guided.warnings.empty());
    const auto runs = log.of("backbone");
    CHECK(runs.size() == 2 + 4);
    for (std::size_t step = 0; step < 2; ++step) {
        const arcflow::Tensors &with = runs[2 + 2 * step], &without = runs[3 + 2 * step];
        CHECK(with.at("latents").data == without.at("latents").data);
        CHECK(with.at("modulation").data == without.at("modulation").data);
        CHECK(with.at("encoder_hidden_states").shape[1] == 1 && without.at("encoder_hidden_states").shape[1] == 2);
        CHECK(without.at("text_rotary").shape[1] == 2);
    }
    // The same scale by name, and scales that do not guide.
    CHECK(generate(*pipe, prompts, {{{1, 2, 3, 2, 9}}, 4}).latents.data == guided.latents.data);
    const std::size_t so_far = log.of("backbone").size();
    const arcflow::Images ignored = generate(*pipe, prompts, {{{1, 2, 3, 2, 9}}, 1});
    CHECK(ignored.latents.data == plain.latents.data && log.of("backbone").size() == so_far + 2);
    CHECK(ignored.warnings == std::vector<std::string>{"request.true_cfg_scale 1.0 does not guide, so "
                                                       "request.negative_tokens was ignored"});
    CHECK(generate(*pipe, prompts, {{}, 1}).warnings.empty());
}

// Prompts and negative prompts of different lengths are grouped each by themselves.
void each_image_has_its_own_negative_prompt(const char *qwen) {
    Log log;
    log.mean = 1;
    const auto pipe = open(qwen, log);
    const std::vector<std::vector<int64_t>> prompts{{1, 2, 3, 1}, {1, 2, 3, 3, 4}, {1, 2, 3, 2}};
    const Negative negative{{{1, 2, 3, 2, 9}, {1, 2, 3, 1}, {1, 2, 3, 1}}, 4};
    const Tensor noise = noise_of_seed(qwen, prompts);
    const Tensor guided = generate(*pipe, prompts, negative).latents;
    // 1 and 2 give -1 as above; 3 and 1 give 1 + 4 * 2 = 9, and 3; 2 and 1 give 5, and 2.
    const float by[] = {1, -3, -2};
    for (std::size_t image = 0; image < 3; ++image) check_moved(noise, guided, image, by[image]);
    // The negative prompt that is also a prompt is encoded once.
    CHECK(log.of("text_encoder").size() == 4);
    // One negative prompt for all, and the prompt itself: v + (g - 1) (v - n) is v.
    const Tensor same = generate(*pipe, {{1, 2, 3, 1}}, {{{1, 2, 3, 1}}, 4}).latents;
    check_moved(noise_of_seed(qwen, {{1, 2, 3, 1}}), same, 0, -1);
    const Tensor one_for_all = generate(*pipe, {prompts[0], prompts[2]}, {{{1, 2, 3, 1}}, 4}, 2).latents;
    const Tensor noise_of_four = noise_of_seed(qwen, {prompts[0], prompts[2]}, 2);
    for (std::size_t image = 2; image < 4; ++image) check_moved(noise_of_four, one_for_all, image, -2);
}

void low_memory_gives_the_same_image(const char *qwen) {
    Log log, other;
    const std::vector<std::vector<int64_t>> prompts{{1, 2, 3, 1}};
    const Negative negative{{{1, 2, 3, 2}}, 3};
    const auto lean = open(qwen, log, arcflow::MemoryMode::low);
    const Tensor latents = generate(*lean, prompts, negative).latents;
    CHECK(log.most_open == 1 && log.open.empty());
    CHECK(latents.data == generate(*open(qwen, other), prompts, negative).latents.data);
}

void refuses_a_velocity_that_does_not_fit(const char *qwen) {
    Log log;
    log.spoil = [](const std::string &part, arcflow::Tensors &out) {
        if (part == "backbone") out["velocity"] = Tensor(arcflow::DType::float32, {1, 6, 32});
    };
    CHECK(thrown<arcflow::Error>([&] { generate(*open(qwen, log), {{1, 2, 3, 1}}); }) ==
          "backbone: output \"velocity\" must have shape [1, 6, 64], got float32[1, 6, 32]; export the bundle again");
}

}  // namespace

int main(int argc, char **argv) {
    CHECK(argc == 3);
    a_step_is_a_line(argv[1]);
    a_negative_prompt_runs_the_backbone_twice(argv[2]);
    each_image_has_its_own_negative_prompt(argv[2]);
    low_memory_gives_the_same_image(argv[2]);
    refuses_a_velocity_that_does_not_fit(argv[2]);
    std::puts("ok");
}
