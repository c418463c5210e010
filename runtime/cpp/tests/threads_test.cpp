// Tests of everything that callers in several threads share, through the C API with engines that compute nothing:
// pipelines, results, LoRAs, caches, the last error, closing, and the pool. `make cpp-tsan` runs it under
// ThreadSanitizer.
#include <atomic>
#include <filesystem>
#include <functional>
#include <thread>

#include "arcflow/arcflow.h"
#include "core_test.h"
#include "error.h"
#include "fake/fake_outputs.h"
#include "lora.h"
#include "pool.h"
#include "tokenizer.h"

namespace {

using arcflow::Json;
using arcflow::Tensors;

// Returns tensors from its pool, which must give each to one caller at a time.
class FakeEngine : public arcflow::Engine {
public:
    FakeEngine(const arcflow::Manifest &manifest, std::string part) : manifest_(manifest), part_(std::move(part)) {}

    Tensors run(const Tensors &inputs) override {
        Tensors request = requests_.take([] { return Tensors(); });
        request = fake_outputs(manifest_, part_, inputs, 0.5f, 1);
        Tensors outputs = request;
        requests_.give_back(std::move(request));
        return outputs;
    }

private:
    const arcflow::Manifest &manifest_;
    std::string part_;
    arcflow::Pool<Tensors> requests_;
};

class FakeBackend : public arcflow::Backend {
public:
    void check(const arcflow::Bundle &) override {}
    std::unique_ptr<arcflow::Engine> open(const arcflow::Bundle &bundle, const std::string &part) override {
        return std::make_unique<FakeEngine>(bundle.manifest, part);
    }
};

Json specs(const std::vector<std::pair<const char *, const char *>> &tensors) {
    Json list = Json::array();
    for (const auto &[name, dtype] : tensors) list.push_back({{"name", name}, {"dtype", dtype}, {"shape", {"any"}}});
    return list;
}

// Write a FLUX bundle whose parts take the pipeline's inputs.
void write_bundle(const std::filesystem::path &root) {
    Json m = flux_manifest();
    m["parts"]["text_encoder"]["inputs"] = m["parts"]["text_encoder_2"]["inputs"] = specs({{"input_ids", "int64"}});
    m["parts"]["conditioner"]["inputs"] =
        specs({{"timesteps", "float32"}, {"guidance", "float32"}, {"pooled_projections", "float32"}});
    m["parts"]["backbone"]["inputs"] = specs({{"latents", "float32"},
                                              {"encoder_hidden_states", "float32"},
                                              {"modulation", "float32"},
                                              {"image_rotary", "float32"},
                                              {"text_rotary", "float32"}});
    for (const auto &file : m["files"].items()) write(root / file.key(), "bytes");
    write(root / "manifest.json", sealed(m));
}

// Generate one image of the token id `id`; returns the status.
arcflow_status generate(arcflow_pipeline *pipeline, int64_t id, arcflow_result **result, int32_t height = 32,
                        arcflow_step_callback on_step = nullptr, void *user = nullptr) {
    const arcflow_tokens tokens{&id, 1, &id, 1};
    const uint64_t seed = static_cast<uint64_t>(id);
    arcflow_request request = ARCFLOW_REQUEST_INIT;
    request.tokens = &tokens;
    request.prompt_count = 1;
    request.height = height;
    request.width = 32;
    request.seeds = &seed;
    request.seed_count = 1;
    request.on_step = on_step;
    request.user = user;
    return arcflow_generate(pipeline, &request, result);
}

std::vector<float> latents_of(const arcflow_result *result) {
    int32_t tokens = 0, channels = 0;
    const float *latents = arcflow_result_latents(result, &tokens, &channels);
    return {latents, latents + tokens * channels};
}

arcflow_pipeline *open(const std::string &root, bool low_memory = false) {
    arcflow_options options = ARCFLOW_OPTIONS_INIT;
    options.low_memory = low_memory ? 1 : 0;
    arcflow_pipeline *pipeline = nullptr;
    CHECK(arcflow_open(root.c_str(), &options, &pipeline) == ARCFLOW_OK);
    return pipeline;
}

void on_threads(int count, const std::function<void(int)> &work) {
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) threads.emplace_back(work, i);
    for (std::thread &thread : threads) thread.join();
}

// Uses more prompts than the cache holds; each thread also makes an error of its own.
void generates_and_errors(const std::string &root, bool low_memory) {
    constexpr int callers = 6, prompts = 20;
    arcflow_pipeline *pipeline = open(root, low_memory);
    std::vector<std::vector<float>> alone;
    for (int id = 0; id < prompts; ++id) {
        arcflow_result *result = nullptr;
        CHECK(generate(pipeline, id, &result) == ARCFLOW_OK);
        alone.push_back(latents_of(result));
        arcflow_result_free(result);
    }
    on_threads(callers, [&](int caller) {
        for (int i = 0; i < 2 * prompts; ++i) {
            const int id = (i + 3 * caller) % prompts, height = 33 + caller;
            arcflow_result *result = nullptr;
            CHECK(generate(pipeline, id, &result) == ARCFLOW_OK);
            CHECK(latents_of(result) == alone[static_cast<std::size_t>(id)]);
            arcflow_result_free(result);
            CHECK(generate(pipeline, id, &result, height) == ARCFLOW_REQUEST_ERROR);
            const std::string expected = "request.height must be a multiple of 16, got " + std::to_string(height) + ";";
            CHECK(std::string(arcflow_last_error()).rfind(expected, 0) == 0);
        }
    });
    arcflow_close(pipeline);
}

// Two threads close a pipeline that four others use; then four callbacks close their own pipeline.
void closes_while_busy(const std::string &root) {
    for (int round = 0; round < 6; ++round) {
        arcflow_pipeline *pipeline = open(root);
        std::atomic<int> generated{0};
        on_threads(6, [&](int caller) {
            if (caller < 2) {
                while (generated < 4 + round) std::this_thread::yield();
                arcflow_close(pipeline);
                return;
            }
            arcflow_result *result = nullptr;
            while (generate(pipeline, caller, &result) == ARCFLOW_OK) {
                arcflow_result_free(result);
                ++generated;
            }
            CHECK(std::string(arcflow_last_error()).rfind("pipeline was closed", 0) == 0);
        });
        pipeline = open(root);
        on_threads(4, [&](int caller) {
            const auto close = [](void *user, int32_t, const float *, size_t) {
                arcflow_close(static_cast<arcflow_pipeline *>(user));
                return 0;
            };
            arcflow_result *result = nullptr;
            const arcflow_status status = generate(pipeline, caller, &result, 32, close, pipeline);
            CHECK(status == ARCFLOW_OK || status == ARCFLOW_CLOSED);
            arcflow_result_free(result);
        });
    }
}

// Results are read and freed by other threads after their pipelines are closed.
void results_wander(const std::string &root) {
    constexpr int callers = 4;
    arcflow_result *results[callers] = {};
    on_threads(callers, [&](int caller) {
        arcflow_pipeline *pipeline = open(root);
        CHECK(generate(pipeline, caller, &results[caller]) == ARCFLOW_OK);
        arcflow_close(pipeline);
    });
    on_threads(2 * callers, [&](int caller) {
        arcflow_result *result = results[(caller + 1) % callers];
        CHECK(arcflow_result_batch(result) <= 1);
        arcflow_result_free(result);
    });
}

arcflow::ScaledLora lora(uint64_t number, float value, float scale) {
    arcflow::LoraFactors factors{filled(arcflow::DType::float32, {3, 1, 8}, value),
                                 filled(arcflow::DType::float32, {1, 8, 2}, value)};
    auto made = std::make_shared<arcflow::Lora>(arcflow::Lora{number, "lora", {}});
    made->parts["backbone"].emplace("to_q", std::move(factors));
    return {made, scale};
}

// More sets of LoRAs than the cache holds, while each thread also closes LoRAs of its own.
void sets_of_loras() {
    arcflow::Manifest manifest{};
    manifest.parts["backbone"].lora = arcflow::LoraSlots{{{"to_q", {3, 2, arcflow::DType::float32}}}, 8, 16, {}};
    arcflow::LoraSets sets(manifest);
    const arcflow::ScaledLora shared = lora(1, 3.0f, 0.5f);
    on_threads(6, [&](int caller) {
        for (int i = 0; i < 40; ++i) {
            const arcflow::ScaledLora given{shared.lora, static_cast<float>(i % 20 + 1)};
            const auto number = 2 + static_cast<uint64_t>(caller) * 100 + static_cast<uint64_t>(i);
            const arcflow::ScaledLora own = lora(number, 2.0f, 0.25f);
            const auto set = sets.get({own, given});
            const arcflow::Tensor &a = set->of("backbone")->at("to_q.lora_a");
            const arcflow::Tensor &b = set->of("backbone")->at("to_q.lora_b");
            CHECK(a.describe() == "float32[3, 2, 8]" && b.describe() == "float32[2, 8, 2]");
            CHECK(a.as<float>()[0] == 3.0f && a.as<float>()[8] == 2.0f);  // in the order of the numbers
            CHECK(b.as<float>()[0] == 3.0f * given.scale && b.as<float>()[16] == 0.5f);
            sets.forget(*own.lora);
            CHECK(set->of("conditioner") == nullptr && set->bytes() == (48 + 32) * 4);
            CHECK(sets.get({given})->of("backbone")->at("to_q.lora_b").as<float>()[15] == 3.0f * given.scale);
        }
    });
    CHECK(sets.get({shared}) == sets.get({shared}));
}

}  // namespace

namespace arcflow {

const char *backend_names() { return "fake"; }
std::unique_ptr<Backend> make_backend(const std::string &, int) { return std::make_unique<FakeBackend>(); }
std::map<std::string, std::unique_ptr<Tokenizer>> open_tokenizers(const Bundle &) { return {}; }

}  // namespace arcflow

int main() {
    const Folder folder;
    write_bundle(folder.path());
    for (const bool low_memory : {false, true}) generates_and_errors(folder.path().string(), low_memory);
    closes_while_busy(folder.path().string());
    results_wander(folder.path().string());
    sets_of_loras();
    std::puts("ok");
}
