// Tests of arcflow.hpp: wrapper_test BUNDLE, with a bundle of the shapes student. Compiled without RTTI.
#include <arcflow/arcflow.hpp>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>

#include "check.h"

namespace {

arcflow::Request circle() {
    arcflow::Request request;
    request.prompts = {"a large red circle"};
    request.seeds = {42};
    request.height = 32;
    return request;
}

void generates(const arcflow::Pipeline &pipe) {
    arcflow::Request request = circle();
    request.num_images_per_prompt = 2;
    request.seeds = {1, 2};
    const arcflow::Result result = pipe.generate(request);
    CHECK(result.batch() == 2 && result.height() == 32 && result.width() == 64);
    CHECK(result.pixels().size() == 2 * 32 * 64 * 3);
    CHECK(result.image(1).data() == result.pixels().data() + 32 * 64 * 3);
    CHECK(result.latents().size() == 2 * 2 * 4 * 64);
    CHECK(result.seeds().size() == 2 && result.seeds()[1] == 2);
    CHECK(result.warnings().empty());
    CHECK(result.timings().front() == '{');
    CHECK(thrown<arcflow::Error>([&] { result.image(2); }) == "image index must be at least 0 and below 2, got 2");

    request.skip_decode = true;
    const arcflow::Result latents = pipe.generate(request);
    CHECK(latents.pixels().empty());
    CHECK(std::equal(latents.latents().begin(), latents.latents().end(), result.latents().begin()));
    CHECK(thrown<arcflow::Error>([&] { latents.image(0); }) == "image index must be at least 0 and below 0, got 0");
}

void moves(const std::string &bundle) {
    arcflow::Pipeline first(bundle);
    arcflow::Pipeline second = std::move(first);
    arcflow::Result result = second.generate(circle());
    const arcflow::Result kept = std::move(result);
    second = arcflow::Pipeline(bundle, arcflow::Options{"", 1, true, false});
    CHECK(kept.image(0).size() == 32 * 64 * 3);
    const arcflow::Result lean = second.generate(circle());
    CHECK(lean.pixels().size() == kept.pixels().size());
}

void throws(const arcflow::Pipeline &pipe) {
    arcflow::Request request = circle();
    request.height = 40;
    try {
        pipe.generate(request);
        CHECK(false);
    } catch (const arcflow::Error &e) {
        CHECK(e.status() == ARCFLOW_REQUEST_ERROR);
        CHECK(std::strcmp(e.what(), "request.height must be a multiple of 16, got 40; the nearest is 32") == 0);
    }
    request.height = 0;
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) == "request.height must be at least 1, got 0");
    request = circle();
    request.guidance_scale = -1.0f;
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) ==
          "request.guidance_scale must not be negative; leave it empty for the default");
    request = circle();
    request.prompts = {std::string("a\0b", 3)};
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) ==
          "request.prompts[0] must not contain a NUL character");
    request = circle();
    request.tokens = {{{1}, {1}}};
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) ==
          "request must have either prompts or tokens, got both; leave one of them empty");
    request = circle();
    request.negative_prompts = {"blurred"};
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) ==
          "request.negative_prompts is not supported: the student is distilled to run once per step, without a "
          "negative prompt; leave it at its default");
    request.negative_tokens = {{{1}, {1}}};
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) ==
          "request must have either negative_prompts or negative_tokens, got both; leave one of them empty");
    request.negative_prompts.clear();
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }).rfind("request.negative_tokens is not supp", 0) == 0);
    request = circle();
    request.negative_prompts = {std::string("a\0b", 3)};
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) ==
          "request.negative_prompts[0] must not contain a NUL character");
    request = circle();
    request.true_cfg_scale = 4.0f;
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }).rfind("request.true_cfg_scale is not supp", 0) == 0);
    request.true_cfg_scale = 0.0f;
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) ==
          "request.true_cfg_scale must be above 0, got 0; give 1 for no guidance, or leave it empty for the bundle's "
          "scale");
    CHECK(thrown<arcflow::Error>([&] { pipe.open_lora("ink"); }) ==
          "ink: this bundle has no LoRA slots; export with --lora-slots all, or merge the LoRA with --lora");
    request = circle();
    request.loras = {{nullptr, 1.0f}};
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) ==
          "request.lora_count must be at most 0, the number of open LoRAs, got 1; name each LoRA once");
    CHECK(thrown<arcflow::Error>([] { arcflow::Pipeline("nowhere"); }) ==
          std::filesystem::absolute("nowhere").string() +
              " is not a directory; give the directory that `arcflow export --out` wrote");
}

void calls_back(const arcflow::Pipeline &pipe) {
    arcflow::Request request = circle();
    std::vector<int> steps;
    std::vector<float> last;
    request.on_step = [&](int step, arcflow::View<float> latents) {
        steps.push_back(step);
        last.assign(latents.begin(), latents.end());
        return true;
    };
    const arcflow::Result result = pipe.generate(request);
    CHECK((steps == std::vector<int>{0, 1}));
    CHECK(std::equal(last.begin(), last.end(), result.latents().begin(), result.latents().end()));
    request.on_step = [](int, arcflow::View<float>) { return false; };
    CHECK(thrown<arcflow::Error>([&] { pipe.generate(request); }) ==
          "on_step stopped the call after step 0 by returning 1; return 0 to go on");
    request.on_step = [](int, arcflow::View<float>) -> bool { throw std::logic_error("mine"); };
    CHECK(thrown<std::logic_error>([&] { pipe.generate(request); }) == "mine");
}

}  // namespace

int main(int argc, char **argv) {
    CHECK(argc == 2);
    const arcflow::Pipeline pipe(argv[1]);
    generates(pipe);
    moves(argv[1]);
    throws(pipe);
    calls_back(pipe);
    std::thread([&] { generates(pipe); }).join();
    std::puts("ok");
}
