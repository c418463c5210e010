// Tests of the TensorRT denoiser and engine with a driver and engines that run on the CPU.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "trt_denoiser.h"
#include "trt_engine.h"
#include "trt_parts.h"

namespace {

using namespace fake;

// 16-bit inputs may round differently where the two updates differ in their last bit.
float largest_difference(const Tensor &a, const Tensor &b) {
    CHECK(a.shape == b.shape);
    float most = 0;
    for (int64_t i = 0; i < a.count(); ++i) most = std::fmax(most, std::fabs(a.as<float>()[i] - b.as<float>()[i]));
    return most;
}

struct Setup {
    explicit Setup(DType dtype, bool capturable = true)
        : device(std::make_shared<const cuda::Device>()),
          backbone(std::make_shared<Session>("backbone", dtype, capturable)),
          decoder(std::make_shared<Session>("vae_decoder", DType::float32, capturable)),
          denoiser(make_trt_denoiser(device, backbone, decoder, manifest_in(dtype))) {}

    std::shared_ptr<const cuda::Device> device;
    std::shared_ptr<Session> backbone, decoder;
    std::unique_ptr<Denoiser> denoiser;
};

int launches() { return driver<int()>("fake_graph_launches")(); }

void test_agrees_with_the_host() {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
        Setup s(dtype);
        // An ulp of the backbone's input changes its heads by about as much.
        const float near = dtype == DType::float32 ? 1e-5f : dtype == DType::float16 ? 4e-3f : 4e-2f;
        for (const int64_t prompts : {1, 2}) {
            const int before = launches();
            for (uint64_t seed = 1; seed < 4; ++seed) {
                const DenoiseInputs in = inputs_of(seed, prompts, true);
                const Denoised ours = s.denoiser->run(in), host = expected(in, dtype);
                CHECK(largest_difference(ours.latents, host.latents) <= near);
                Denoised again = expected(in, dtype);  // the pixels of exactly these latents
                decoder({{"latents", {3, 2, 3, C}}}, {{"latents", const_cast<std::byte *>(ours.latents.data.data())},
                                                      {"images", again.pixels.data.data()}});
                CHECK(ours.pixels.shape == host.pixels.shape && ours.pixels.data == again.pixels.data);
            }
            // The first request of a shape is enqueued, later ones launch its graph. Requests with 1 and 2 prompts
            // share a plan.
            CHECK(launches() - before == (prompts == 1 ? 2 : 3));
        }
        CHECK(s.backbone->contexts == 2 && s.decoder->contexts == 1);
    }
}

// Prompts a, b, a: images 0 and 2 share a row of the modulation, and the same plan then runs a, a, b.
void test_prompts_that_repeat() {
    Setup s(DType::float32);
    DenoiseInputs in = inputs_of(1, 2, true);
    in.groups = {{{0, 1, 2}, {0, 1, 0}, random_tensor(2, {3, 4, TEXT}), in.groups[0].rotary}};
    for (const std::vector<int64_t> &prompts : {std::vector<int64_t>{0, 1, 0}, {0, 0, 1}, {1, 1, 1}, {0, 1, 0}}) {
        in.groups[0].prompts = prompts;
        const Denoised ours = s.denoiser->run(in);
        CHECK(largest_difference(ours.latents, expected(in, DType::float32).latents) <= 1e-5f);
    }
    CHECK(s.backbone->contexts == 1);
}

void test_graph_and_enqueue_give_equal_bits() {
    Setup graph(DType::bfloat16), plain(DType::bfloat16, false);
    const int before = launches();
    for (uint64_t seed = 1; seed < 4; ++seed) {
        // Another schedule with as many steps uses the same graph.
        const DenoiseInputs in = inputs_of(seed, 2, true, {1, 0.9 / static_cast<double>(seed), 0});
        const Denoised a = graph.denoiser->run(in), b = plain.denoiser->run(in);
        CHECK(a.latents.data == b.latents.data && a.pixels.data == b.pixels.data);
    }
    CHECK(launches() - before == 2);
}

void test_a_refused_capture_falls_back() {
    driver<void(int)>("fake_refuse_capture")(1);
    Setup s(DType::float32);
    const int before = launches();
    for (uint64_t seed = 1; seed < 4; ++seed) {
        const DenoiseInputs in = inputs_of(seed, 1, false);
        const Denoised out = s.denoiser->run(in);
        CHECK(largest_difference(out.latents, expected(in, DType::float32).latents) <= 1e-5f);
        CHECK(out.pixels.data.empty());
    }
    CHECK(launches() == before);
    driver<void(int)>("fake_refuse_capture")(0);
}

// The fake device's clock: 10 ms for each engine run, 1 for each update, 1/2 for each noise, 1/4 for each copy.
void test_times_of_stages() {
    Setup graph(DType::float32), plain(DType::float32, false);
    using Times = std::vector<std::pair<std::string, double>>;
    for (uint64_t seed = 1; seed < 4; ++seed) {
        for (const Setup *s : {&graph, &plain}) {
            // Two groups in two steps.
            const Times whole = s->denoiser->run(inputs_of(seed, 2, true)).stages_ms;
            CHECK(whole == (Times{{"copy", 0.75}, {"noise", 1}, {"backbone", 40}, {"update", 4}, {"decode", 10}}));
            const Times latents = s->denoiser->run(inputs_of(seed, 2, false, {1, 0})).stages_ms;
            CHECK(latents == (Times{{"copy", 0.5}, {"noise", 1}, {"backbone", 20}, {"update", 2}}));
        }
    }
}

void test_plans_are_bounded() {
    const auto live = driver<int()>("fake_live_allocations");
    const int before = live();
    {
        Setup s(DType::float32);
        int most = 0;
        for (size_t steps = 1; steps < 12; ++steps) {
            std::vector<double> sigmas;
            for (size_t i = 0; i <= steps; ++i)
                sigmas.push_back(1 - static_cast<double>(i) / static_cast<double>(steps));
            const DenoiseInputs in = inputs_of(steps, 1, true, sigmas);
            const Denoised out = s.denoiser->run(in);
            CHECK(largest_difference(out.latents, expected(in, DType::float32).latents) <= 1e-4f);
            most = std::max(most, live() - before);
        }
        CHECK(most == 4 * 3);  // tensors, scratch and pinned memory of four plans
    }
    CHECK(live() == before && driver<int()>("fake_live_events")() == 0);
}

void test_threads() {
    Setup s(DType::float16);
    std::vector<Denoised> alone;
    for (uint64_t seed = 0; seed < 8; ++seed) alone.push_back(s.denoiser->run(inputs_of(seed, 2, true)));
    std::vector<std::thread> threads;
    std::vector<int> equal(8);
    for (uint64_t seed = 0; seed < 8; ++seed) {
        threads.emplace_back([&, seed] {
            for (int i = 0; i < 10; ++i) {
                const Denoised out = s.denoiser->run(inputs_of(seed, 2, true));
                equal[seed] +=
                    out.latents.data == alone[seed].latents.data && out.pixels.data == alone[seed].pixels.data;
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    CHECK(equal == std::vector<int>(8, 10));
}

void test_inputs_that_do_not_fit() {
    Setup s(DType::float32);
    const auto refused = [&](void (*change)(DenoiseInputs &)) {
        DenoiseInputs in = inputs_of(1, 2, true);
        change(in);
        try {
            s.denoiser->run(in);
        } catch (const Error &e) {
            return e.status == ARCFLOW_INTERNAL_ERROR;
        }
        return false;
    };
    CHECK(refused([](DenoiseInputs &in) { in.groups[0].images[0] = 3; }));
    CHECK(refused([](DenoiseInputs &in) { in.groups[0].images[0] = -1; }));
    CHECK(refused([](DenoiseInputs &in) { in.groups[0].images[0] = 1; }));
    CHECK(refused([](DenoiseInputs &in) { in.groups[0].prompts[1] = 2; }));
    CHECK(refused([](DenoiseInputs &in) { in.streams.pop_back(); }));
    CHECK(refused([](DenoiseInputs &in) { in.groups.pop_back(); }));
    CHECK(refused([](DenoiseInputs &in) { in.sigmas.pop_back(); }));
    CHECK(refused([](DenoiseInputs &in) { in.groups[1].states = random_tensor(1, {2, 7, TEXT}); }));
}

void test_an_engine_on_host_tensors() {
    const auto device = std::make_shared<const cuda::Device>();
    Part part = manifest_in(DType::float16).parts.at("backbone");
    const auto session = std::make_shared<Session>("backbone", DType::float16, true);
    const auto engine = make_trt_engine(device, session, "backbone", part);
    for (const int64_t tokens : {6, 6, 9}) {
        Tensors in;
        in["latents"] = cast(random_tensor(1, {2, tokens, C}), DType::float16);
        in["encoder_hidden_states"] = cast(random_tensor(2, {2, 4, TEXT}), DType::float16);
        in["modulation"] = cast(random_tensor(3, {2, M}), DType::float16);
        in["image_rotary"] = random_tensor(4, {2, tokens, HALF_HEAD});
        in["text_rotary"] = random_tensor(5, {2, 4, HALF_HEAD});
        const Tensors out = engine->run(in);
        Tensors wanted = in;
        wanted["means"] = Tensor(DType::float16, {2, tokens, K, C});
        wanted["logweights"] = Tensor(DType::float16, {2, tokens, K, P});
        wanted["loggammas"] = Tensor(DType::float16, {2, tokens, K - 1, P});
        std::map<std::string, std::byte *> at;
        for (auto &[name, tensor] : wanted) at[name] = tensor.data.data();
        backbone(shapes_of(in), at, DType::float16);
        CHECK(out.size() == 3);
        for (const auto &[name, tensor] : out)
            CHECK(tensor.shape == wanted.at(name).shape && tensor.data == wanted.at(name).data);
    }
    CHECK(session->contexts == 2);  // one per shape
}

// 19 timesteps go through an engine for 8 in three runs, and each row of the modulation is its own timestep's.
void test_a_conditioner_in_pieces() {
    const auto device = std::make_shared<const cuda::Device>();
    Part part{};
    part.inputs = {{"timesteps", DType::float32, {}}, {"pooled_projections", DType::float32, {}}};
    part.outputs = {{"modulation", DType::float32, {}}};
    const auto session = std::make_shared<Session>("conditioner", DType::float32, true);
    const auto engine = make_trt_engine(device, session, "conditioner", part);
    Tensors in;
    in["timesteps"] = Tensor(DType::float32, {19});
    for (int i = 0; i < 19; ++i) in["timesteps"].as<float>()[i] = static_cast<float>(i);
    in["pooled_projections"] = Tensor(DType::float32, {2, 1});
    in["pooled_projections"].as<float>()[1] = 1;
    const Tensors out = engine->run(in);
    const Tensor &modulation = out.at("modulation");
    CHECK(modulation.describe() == "float32[19, 2, 5]");
    for (int64_t i = 0; i < modulation.count(); ++i) {
        const auto expected = static_cast<float>(i / 10 + 100 * (i / 5 % 2)) + static_cast<float>(i % 5) / 8;
        CHECK(modulation.as<float>()[i] == expected);
    }
}

// Requests that differ in one part of their shape only get plans of their own.
void test_shapes_that_differ_in_one_part() {
    Setup s(DType::float32);
    const DenoiseInputs base = inputs_of(1, 1, true);
    DenoiseInputs latents_only = base, turned = base, longer_text = base;
    latents_only.decode = false;
    turned.height_px = 48;
    turned.width_px = 32;
    longer_text.groups[1].states = random_tensor(2, {1, 9, TEXT});
    longer_text.groups[1].rotary = std::make_shared<const Tensor>(random_tensor(3, {2, 9, HALF_HEAD}));
    for (int repeat = 0; repeat < 2; ++repeat) {
        for (const DenoiseInputs *in :
             std::vector<const DenoiseInputs *>{&base, &latents_only, &turned, &longer_text}) {
            const Denoised ours = s.denoiser->run(*in), host = expected(*in, DType::float32);
            CHECK(largest_difference(ours.latents, host.latents) <= 1e-5f);
            CHECK(ours.pixels.shape == (in->decode ? host.pixels.shape : std::vector<int64_t>{}));
        }
    }
    CHECK(s.backbone->contexts == 4 * 2 && s.decoder->contexts == 3);
}

// The plan that was unused for longest makes room: after shapes 1, 2, 3, 4, again 1, and 5, shape 1 still has its plan.
void test_the_oldest_plan_makes_room() {
    Setup s(DType::float32);
    const auto contexts_after = [&](size_t steps) {
        std::vector<double> sigmas;
        for (size_t i = 0; i <= steps; ++i) sigmas.push_back(1 - static_cast<double>(i) / static_cast<double>(steps));
        s.denoiser->run(inputs_of(1, 1, false, sigmas));
        return s.backbone->contexts;
    };
    for (size_t steps = 1; steps <= 4; ++steps) CHECK(contexts_after(steps) == static_cast<int>(2 * steps));
    CHECK(contexts_after(1) == 8);
    CHECK(contexts_after(5) == 10);
    CHECK(contexts_after(1) == 10);
    CHECK(contexts_after(2) == 12);
}

}  // namespace

int main() {
    test_agrees_with_the_host();
    test_prompts_that_repeat();
    test_graph_and_enqueue_give_equal_bits();
    test_a_refused_capture_falls_back();
    test_times_of_stages();
    test_plans_are_bounded();
    test_threads();
    test_inputs_that_do_not_fit();
    test_an_engine_on_host_tensors();
    test_a_conditioner_in_pieces();
    test_the_oldest_plan_makes_room();
    test_shapes_that_differ_in_one_part();
    std::puts("ok");
    return 0;
}
