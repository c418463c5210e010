// Tests of requests: defaults, and the message of each rule.
#include <cmath>
#include <cstddef>
#include <limits>

#include "core_test.h"
#include "request.h"

void test_request() {
    const arcflow::Manifest f = parsed(flux_manifest()), q = parsed(qwen_manifest());
    const char *prompts[] = {"a", "\xc3\xa9\xf0\x9f\x98\x80"};
    arcflow_request given = ARCFLOW_REQUEST_INIT;
    given.prompts = prompts;
    given.prompt_count = 2;
    const arcflow::Request r = arcflow::check_request(given, f);
    CHECK(r.prompts[1] == prompts[1] && r.batch() == 2 && r.steps == 2 && r.guidance_scale == 3.5f && r.decode);
    CHECK(r.height_px == 256 && r.width_px == 1024 && r.max_sequence_length == 64);
    // A random seed for each image.
    CHECK(r.seeds.size() == 2 && r.seeds[0] != r.seeds[1]);
    CHECK(r.warnings.empty() && r.on_step == nullptr);

    const auto fail = [&](const arcflow::Manifest &m, const std::function<void(arcflow_request &)> &change,
                          const std::string &text) {
        arcflow_request changed = given;
        change(changed);
        fails([&] { arcflow::check_request(changed, m); }, text);
    };
    using R = arcflow_request;
    fail(f, [](R &x) { x.prompts = nullptr; }, "request must have either prompts or tokens, got neither");
    fail(
        f, [](R &x) { x.prompt_count = 0; },
        "request.prompt_count must be at least 1, got 0; an empty string is allowed as a prompt");
    fail(f, [](R &x) { x.num_images_per_prompt = -1; }, "request.num_images_per_prompt must be at least 1, got -1");
    fail(
        f, [](R &x) { x.num_images_per_prompt = 3; },
        "request.prompt_count times request.num_images_per_prompt must be between 1 and 4 for this bundle, got 2 * 3 = "
        "6; "
        "ask for fewer images at a time");
    fail(f, [](R &x) { x.prompt_count = SIZE_MAX; }, "for this bundle, got 18446744073709551615 * 1");
    fail(
        f,
        [](R &x) {
            x.prompt_count = SIZE_MAX / 2;
            x.num_images_per_prompt = INT32_MAX;
        },
        " * 2147483647; ask for fewer");
    fail(f, [](R &x) { x.height = -16; }, "request.height must be at least 1, got -16");
    fail(f, [](R &x) { x.height = 40; }, "request.height must be a multiple of 16, got 40; the nearest is 32");
    fail(f, [](R &x) { x.width = 56; }, "request.width must be a multiple of 16, got 56; the nearest is 64");
    fail(f, [](R &x) { x.width = 1; }, "request.width must be a multiple of 16, got 1; the nearest is 16");
    fail(
        f, [](R &x) { x.width = 16; },
        "request.width must be between 32 and 2048 for this bundle, got 16; export a bundle with");
    fail(
        f, [](R &x) { x.num_inference_steps = 1001; },
        "request.num_inference_steps must be between 1 and 1000, got 1001");
    fail(
        q, [](R &x) { x.num_inference_steps = 3; },
        "request.num_inference_steps must be one of those baked into this bundle, [2, 4], got 3; export with --steps "
        "3, "
        "or with --keep-conditioner for any step count");
    fail(f, [](R &x) { x.max_sequence_length = 65; }, "request.max_sequence_length must be between 1 and 64, got 65");
    fail(f, [](R &x) { x.guidance_scale = 65.5f; }, "request.guidance_scale must be between 0 and 65, got 65.5");
    fail(f, [](R &x) { x.guidance_scale = std::nanf(""); }, "request.guidance_scale must be between 0 and 65, got nan");
    const uint64_t seeds[] = {1, 2, 3};
    fail(
        f,
        [&](R &x) {
            x.seeds = seeds;
            x.seed_count = 3;
        },
        "request.seed_count must be 1 or one per image, 2, got 3");
    fail(f, [&](R &x) { x.seed_count = 3; }, "request.seeds must point to 3 numbers, got NULL");
    const std::pair<const char *, int> bad_texts[] = {
        {"ab\xff", 2}, {"\xc3", 0}, {"a\xed\xa0\x80", 1}, {"\xc0\x80", 0}, {"\xf4\x90\x80\x80", 0}, {"\xe2\x82", 0}};
    for (const auto &[text, position] : bad_texts) {
        const char *bad[] = {"", text};
        fail(
            f, [&](R &x) { x.prompts = bad; },
            "request.prompts[1] must be UTF-8, got an invalid byte at position " + std::to_string(position));
    }
    const char *missing[] = {"a", nullptr};
    fail(f, [&](R &x) { x.prompts = missing; }, "request.prompts[1] must be a string, got NULL");

    arcflow_request one = given;
    one.prompt_count = 1;
    one.num_inference_steps = 1;
    CHECK(arcflow::check_request(one, f).warnings[0] ==
          "request.num_inference_steps is 1, which gives a blurry image; use 2 or more");
    one.num_inference_steps = 4;
    one.guidance_scale = 3.2f;
    const arcflow::Request unguided = arcflow::check_request(one, q);
    CHECK(!unguided.guidance_scale && unguided.steps == 4);
    CHECK(unguided.warnings.at(0) == "this student takes no guidance; request.guidance_scale 3.2 was ignored");

    std::vector<int64_t> ids(78, 1);
    arcflow_tokens tokens{ids.data(), 77, ids.data(), 64};
    one.prompts = nullptr;
    one.tokens = &tokens;
    CHECK(arcflow::check_request(one, f).tokens[0].ids_2.size() == 64);
    const auto token_fail = [&](const arcflow::Manifest &m, const std::string &text) {
        fails([&] { arcflow::check_request(one, m); }, text);
    };
    token_fail(q, "request.tokens[0].ids must have between 4 and 67 token ids, special tokens included, got 77");
    tokens.count = 67;
    token_fail(q, "request.tokens[0].ids_2 must be empty for a qwen-image bundle, got 64 ids");
    tokens.count_2 = 0;
    CHECK(arcflow::check_request(one, q).tokens[0].ids.size() == 67);
    token_fail(f, "request.tokens[0].ids_2 must have between 1 and 64 token ids, special tokens included, got 0");
    tokens = {nullptr, 2, ids.data(), 2};
    token_fail(f, "request.tokens[0].ids must point to 2 ids, got NULL");
    ids[1] = -1;
    tokens.ids = ids.data();
    token_fail(f, "request.tokens[0].ids[1] must be between 0 and 2147483647, got -1");
    one.prompts = prompts;
    token_fail(f, "request must have either prompts or tokens, got both");
}

void test_negative_prompts() {
    const arcflow::Manifest f = parsed(flux_manifest()), straight = parsed(straight_manifest());
    const char *prompts[] = {"a", "b"}, *negatives[] = {"x", "y"};
    arcflow_request given = ARCFLOW_REQUEST_INIT;
    given.prompts = prompts;
    given.prompt_count = 2;
    CHECK(arcflow::check_request(given, straight).warnings.at(0) ==
          "without request.negative_prompts the images are not guided; give \" \" as a negative prompt to guide them");
    given.num_inference_steps = 4;
    given.negative_prompts = negatives;
    given.negative_prompt_count = 2;
    const arcflow::Request r = arcflow::check_request(given, straight);
    CHECK(r.guided() && r.negative_prompts[1] == "y" && r.true_cfg_scale == 4 && r.warnings.empty());
    given.negative_prompt_count = 1;
    given.true_cfg_scale = 2.5f;
    const arcflow::Request one = arcflow::check_request(given, straight);
    CHECK(one.negative_prompts == std::vector<std::string>({"x", "x"}) && one.true_cfg_scale == 2.5);
    given.true_cfg_scale = 0.3f;
    const arcflow::Request off = arcflow::check_request(given, straight);
    CHECK(!off.guided() &&
          off.warnings.at(0) == "request.true_cfg_scale 0.3 does not guide, so request.negative_prompts was ignored");
    given.true_cfg_scale = 0;

    using R = arcflow_request;
    const auto fail = [&](const arcflow::Manifest &m, const std::function<void(R &)> &change, const std::string &text) {
        R changed = given;
        change(changed);
        fails([&] { arcflow::check_request(changed, m); }, text);
    };
    const int64_t ids[] = {1, 2, 3, 4};
    const arcflow_tokens tokens{ids, 4, nullptr, 0}, few{ids, 3, nullptr, 0};
    fail(
        straight, [&](R &x) { x.negative_tokens = &tokens; },
        "request must have either negative_prompts or negative_tokens, got both");
    fail(
        straight, [](R &x) { x.negative_prompts = nullptr; },
        "request.negative_prompts must point to 1 prompts, got NULL; or set request.negative_prompt_count to 0");
    for (const std::size_t count : {std::size_t{0}, std::size_t{3}, SIZE_MAX}) {
        fail(
            straight, [&](R &x) { x.negative_prompt_count = count; },
            "request.negative_prompt_count must be 1 or one per prompt, 2, got " + std::to_string(count));
    }
    const char *missing[] = {nullptr}, *bad[] = {"a\xff"};
    fail(
        straight, [&](R &x) { x.negative_prompts = missing; },
        "request.negative_prompts[0] must be a string, got NULL");
    fail(
        straight, [&](R &x) { x.negative_prompts = bad; },
        "request.negative_prompts[0] must be UTF-8, got an invalid byte at position 1; encode the text as UTF-8");
    fail(
        straight,
        [&](R &x) {
            x.negative_prompts = nullptr;
            x.negative_tokens = &few;
        },
        "request.negative_tokens[0].ids must have between 4 and 67 token ids, special tokens included, got 3");
    for (const float scale : {-1.0f, 65.5f, std::nanf("")}) {
        fail(
            straight, [&](R &x) { x.true_cfg_scale = scale; }, "request.true_cfg_scale must be between 0 and 65, got ");
    }

    const std::string momentum = " is not supported: the student is distilled to run once per step, without a negative "
                                 "prompt; leave it at its default";
    fail(f, [](R &) {}, "request.negative_prompts" + momentum);
    fail(f, [](R &x) { x.negative_prompts = nullptr; }, "request.negative_prompt_count" + momentum);
    fail(
        f,
        [](R &x) {
            x.negative_prompts = nullptr;
            x.negative_prompt_count = 0;
            x.true_cfg_scale = 1;
        },
        "request.true_cfg_scale" + momentum);

    arcflow::Json own = straight_manifest();
    own["modulation"]["num_inference_steps"] = {3};
    own["schedule"] = {{"shift", 2}, {"timestep_ratio", 1}, {"num_inference_steps", 3}, {"sigmas", {1, 0.5, 0.25}}};
    fail(
        parsed(own), [](R &) {},
        "request.num_inference_steps must be 3, the number of sigmas in this bundle's schedule, got 4; export without "
        "--sigmas for other step counts");
    // No warning of many steps, which a momentum student gets.
    arcflow::Json many = straight_manifest();
    many["modulation"]["num_inference_steps"] = {2, 50};
    given.num_inference_steps = 50;
    CHECK(arcflow::check_request(given, parsed(many)).warnings.empty());
}
