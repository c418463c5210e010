// Tests of the TensorRT denoiser and engine on the driver made of host memory, with engines that run on the CPU.
//
//   trt_denoiser_test [threads | failures]
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "error.h"
#include "trt_engine.h"
#include "trt_setup.h"

namespace {

// The first job of a shape is enqueued, the second captures the graph, and every later one is one launch.
void test_agrees_with_the_host() {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
        Setup s(dtype);
        reset_driver();
        for (uint64_t seed = 1; seed < 6; ++seed) {
            const DenoiseJob job = job_of(seed);
            check_image(s.run(job), job, s.manifest);
            CHECK(calls("cuGraphLaunch") == static_cast<long>(seed) - 1);
        }
        CHECK(calls("cuStreamBeginCapture") == 1);
        CHECK(s.conditioner->contexts == 1 && s.backbone->contexts == 1 && s.decoder->contexts == 1);
    }
}

// The modulation comes from a table, or through the host if the conditioner has another dtype.
void test_where_the_modulation_comes_from() {
    const auto table = std::make_shared<const Tensor>(random_tensor(8, {2, M}));
    Setup baked;
    Setup other(DType::bfloat16, DType::float32);
    for (uint64_t seed = 1; seed < 4; ++seed) {
        DenoiseJob job = job_of(seed);
        check_image(other.run(job), job, other.manifest);
        job.table = table;
        check_image(baked.run(job), job, baked.manifest);
    }
    CHECK(baked.conditioner->contexts == 0 && other.conditioner->contexts == 1);
}

// 19 steps go through a conditioner for 8 in three runs, the last two of which overlap.
void test_a_conditioner_in_pieces() {
    Setup s;
    for (uint64_t seed = 1; seed < 3; ++seed) {
        const DenoiseJob job = job_of(seed, 3, false, even(19));
        const Denoised ours = s.run(job);
        // Each of the 19 updates rounds anew.
        CHECK(largest_difference(ours.latents, expected(job, s.manifest).latents) <= 19 * bound(DType::float32));
    }
}

// A batch of 7 runs as 4 and 3 images where the engines take 4, and the callback gets all 7.
void test_a_batch_in_pieces() {
    Setup s;
    const DenoiseJob job = job_of(2, 7);
    const Denoised ours = s.run(job);
    check_image(ours, job, s.manifest);
    std::vector<Tensor> steps;
    const Denoised again = s.run(job, [&](int64_t step, const Tensor &latents) {
        CHECK(step == static_cast<int64_t>(steps.size()));
        steps.push_back(latents);
    });
    CHECK(same(ours, again) && steps.size() == 2 && steps[1].data == ours.latents.data);
    CHECK((steps[0].shape == std::vector<int64_t>{7, 6, C}) && steps[0].data != steps[1].data);
    s.backbone->max_batch = 0;
    CHECK(thrown<Error>([&] { s.run(job); }) == "backbone: the engine takes at most 0 images");
}

void test_graph_and_enqueue_give_equal_bits() {
    Setup graph(DType::bfloat16), plain(DType::bfloat16);
    plain.backbone->obstacle = "it cannot";
    reset_driver();
    for (uint64_t seed = 1; seed < 4; ++seed) {
        const DenoiseJob job = job_of(seed);
        CHECK(same(graph.run(job), plain.run(job)));
    }
    CHECK(calls("cuGraphLaunch") == 2 && calls("cuStreamBeginCapture") == 1);
}

// A driver that refuses any call of a capture: the image is generated without a graph.
void test_a_refused_capture_falls_back() {
    const std::pair<const char *, int> refused[] = {{"cuStreamBeginCapture", always},
                                                    {"cuStreamEndCapture", in_capture},
                                                    {"cuGraphInstantiateWithFlags", always},
                                                    {"cuLaunchKernel", in_capture},
                                                    {"cuMemcpyAsync", in_capture},
                                                    {"cuEventRecordWithFlags", in_capture},
                                                    {"*", in_capture}};
    for (const auto &[function, when] : refused) {
        Setup s;
        s.run(job_of(1));
        reset_driver();
        fail(function, 1, capture_unsupported, when);
        for (uint64_t seed = 2; seed < 5; ++seed) {
            const DenoiseJob job = job_of(seed);
            check_image(s.run(job), job, s.manifest);
        }
        CHECK(failures_pending() == 0);
        CHECK(calls("cuGraphLaunch") == 0 && calls("cuStreamBeginCapture") == 1);
        CHECK(live(graphs) == 0 && live(executables) == 0);
    }
}

// Whatever an engine throws while it is captured, the capture is ended and the image generated without a graph.
void test_an_engine_that_throws_in_a_capture() {
    struct Odd : std::exception {};
    for (const int kind : {0, 1, 2}) {
        Setup s;
        int runs = 0;
        s.decoder->before_enqueue = [&] {
            if (++runs != 2) return;
            if (kind == 0) throw engine_error("vae_decoder: no");
            if (kind == 1) throw std::bad_alloc();
            throw Odd();
        };
        reset_driver();
        for (uint64_t seed = 1; seed < 5; ++seed) {
            const DenoiseJob job = job_of(seed);
            check_image(s.run(job), job, s.manifest);
        }
        CHECK(calls("cuStreamBeginCapture") == 1 && calls("cuGraphLaunch") == 0);
    }
}

// Whatever is thrown while work is enqueued, the plan is freed only after the work that is enqueued already, and the
// next image is right. An engine's run after its context was freed would fail.
void test_a_job_that_fails_half_way() {
    for (const int kind : {0, 1, 2}) {
        Setup s;
        const DenoiseJob job = job_of(1);
        s.decoder->before_enqueue = [&] {
            if (kind == 0) throw engine_error("vae_decoder: no");
            if (kind == 1) throw std::bad_alloc();
            throw 7;  // NOLINT(bugprone-std-exception-baseclass): whatever a library throws
        };
        bool caught = false;
        try {
            s.run(job);
        } catch (...) {
            caught = true;
        }
        CHECK(caught && s.backbone->live_contexts == 0 && live(events) == 0);
        s.decoder->before_enqueue = [] {};
        check_image(s.run(job), job, s.manifest);
    }
}

// Every call of the driver fails once, in a job that is enqueued, captured and replayed. Each failure is a sentence or
// a right image, and the next image is right.
void test_every_call_may_fail() {
    const DenoiseJob job = job_of(1, 1), other = job_of(2, 1, false);
    for (const int image : {1, 2, 3}) {
        for (long nth = 1;; ++nth) {
            Setup s;
            for (int i = 1; i < image; ++i) s.run(job);
            reset_driver();
            fail("*", nth, unknown);
            try {
                check_image(s.run(job), job, s.manifest);
            } catch (const Error &e) {
                const std::string text = e.what();
                CHECK(text.find("CUDA_ERROR_UNKNOWN") != std::string::npos ||
                      text.find("error 999") != std::string::npos);
                CHECK(text.find('\n') == std::string::npos && e.status == ARCFLOW_ENGINE_ERROR);
            }
            const bool reached = failures_pending() == 0;
            reset_driver();
            check_image(s.run(job), job, s.manifest);
            check_image(s.run(other), other, s.manifest);
            if (reached) continue;
            CHECK(nth > (image == 3 ? 3 : 30));
            break;
        }
    }
}

// As above, for allocations that find no memory: what is held by other shapes makes room.
void test_every_allocation_may_fail() {
    for (const char *function : {"cuMemAlloc", "cuMemHostAlloc"}) {
        for (long nth = 1;; ++nth) {
            Setup s;
            const DenoiseJob small = job_of(1, 1), large = job_of(2);
            s.run(small);
            reset_driver();
            fail(function, nth, out_of_memory);
            check_image(s.run(large), large, s.manifest);  // the second attempt has room
            const bool reached = failures_pending() == 0;
            reset_driver();
            check_image(s.run(small), small, s.manifest);
            if (reached) continue;
            CHECK(nth > 3);
            break;
        }
    }
}

// Without anything else to free, the error says what the memory is for and what to do.
void test_out_of_memory_is_a_sentence() {
    Setup s;
    const DenoiseJob job = job_of(1);
    reset_driver();
    for (int i = 0; i < 2; ++i) fail("cuMemAlloc", 1, out_of_memory);
    const std::string said = thrown<Error>([&] { s.run(job); });
    CHECK(said.find("backbone: inputs and outputs need ") == 0);
    CHECK(said.find(" bytes of Host memory's memory, 8,5") != std::string::npos);
    CHECK(said.find(std::string(" are free; ") + save_memory) != std::string::npos);
    reset_driver();
    check_image(s.run(job), job, s.manifest);
    // An engine that runs out of memory inside a run: the other plans make room for a second attempt.
    const DenoiseJob next = job_of(1, 1);
    int runs = 0;
    s.backbone->before_enqueue = [&] {
        if (++runs == 1) throw Error(ARCFLOW_OUT_OF_MEMORY, "backbone: no memory");
    };
    check_image(s.run(next), next, s.manifest);
    CHECK(s.backbone->live_contexts == 1 && runs > 1);
}

// A text encoder, or a conditioner on the host, that finds no memory gets that of the plans.
void test_plans_make_room_for_a_host_engine() {
    Setup s(DType::bfloat16, DType::float32);
    const auto engine = make_trt_engine(s.lane, s.conditioner, "conditioner", s.manifest.parts.at("conditioner"));
    Tensors in;
    in["timesteps"] = random_tensor(1, {2});
    in["pooled_projections"] = random_tensor(2, {2, POOL});
    in["guidance"] = random_tensor(3, {2});
    reset_driver();
    fail("cuMemAlloc", 1, out_of_memory);
    CHECK(thrown<Error>([&] { engine->run(in); }).find("conditioner: inputs and outputs need ") == 0);
    const DenoiseJob job = job_of(1), next = job_of(2, 2);
    s.run(job);
    for (const int host : {0, 1}) {
        reset_driver();
        fail("cuMemAlloc", 1, out_of_memory);  // the host engine's buffers for a new shape
        if (host == 0) engine->run(in);
        else check_image(s.run(next), next, s.manifest);
        CHECK(failures_pending() == 0 && s.backbone->live_contexts == host);
        check_image(s.run(job), job, s.manifest);
    }
}

// The context is lost: the error says so, and so do all later ones; closing does not crash.
void test_work_that_fails_on_the_device() {
    for (const char *work : {"run:copy", "run:kernel", "run:engine", "run:graph"}) {
        {
            Setup s;
            for (int i = 0; i < 2; ++i) s.run(job_of(1));
            fail(work, 1, 719);
            for (int i = 0; i < 2; ++i) {
                const std::string said = thrown<Error>([&] { s.run(job_of(1)); });
                CHECK(said.find("CUDA_ERROR_LAUNCH_FAILED") != std::string::npos);
                CHECK(said.find("; start this process again") != std::string::npos);
            }
        }
        reset_driver();
    }
}

// After warm-up an image is one launch, and allocates nothing.
void test_a_warm_image() {
    Setup s;
    const DenoiseJob job = job_of(1);
    for (int i = 0; i < 3; ++i) s.run(job);
    reset_driver();
    for (int i = 0; i < 5; ++i) s.run(job);
    std::string log = control<const char *()>("host_cuda_log")(), wanted;
    for (int i = 0; i < 5; ++i) {
        wanted += "cuGraphLaunch\ncuEventRecordWithFlags\ncuEventSynchronize\n";
        for (int elapsed = 0; elapsed < 9; ++elapsed) wanted += "cuEventElapsedTime\n";
    }
    CHECK(log == wanted);
}

void test_times_of_stages() {
    Setup graph, plain;
    plain.backbone->obstacle = "it cannot";
    for (uint64_t seed = 1; seed < 4; ++seed) {
        for (Setup *s : {&graph, &plain}) {
            std::vector<std::string> names;
            for (const auto &[stage, ms] : s->run(job_of(seed)).stages_ms) {
                names.push_back(stage);
                CHECK(ms > 0 && ms < 10000);
            }
            CHECK((names == std::vector<std::string>{"copy", "noise", "condition", "backbone", "update", "decode"}));
            names.clear();
            for (const auto &[stage, ms] : s->run(job_of(seed, 1, false)).stages_ms) names.push_back(stage);
            CHECK((names == std::vector<std::string>{"copy", "noise", "condition", "backbone", "update"}));
        }
    }
}

// Plans are bounded, all share one workspace, and everything is given back at the end.
void test_plans_are_bounded() {
    size_t before[6];
    for (int kind = 0; kind < 6; ++kind) before[kind] = live(static_cast<Live>(kind));
    {
        Setup s(DType::float32, DType::float32, 4);
        size_t small = 0, most = 0;
        for (size_t steps = 1; steps < 12; ++steps) {
            const DenoiseJob job = job_of(steps, 1, true, even(steps));
            const Denoised out = s.run(job);
            CHECK(largest_difference(out.latents, expected(job, s.manifest).latents) <=
                  static_cast<float>(steps) * bound(DType::float32));
            most = std::max(most, live(device_bytes));
            if (steps == 1) small = live(device_bytes);
        }
        CHECK(s.backbone->most_contexts == 4 && s.decoder->most_contexts == 4);
        CHECK(most < 4 * small);  // one workspace, not four
        // A larger image replaces the workspace; the smaller ones' graphs are captured anew.
        const DenoiseJob job = job_of(1, 1, true, even(11)), large = job_of(1, 2, true, even(2), 4, 4, 4);
        s.run(job);
        check_image(s.run(large), large, s.manifest);
        for (int i = 0; i < 3; ++i) {
            CHECK(largest_difference(s.run(job).latents, expected(job, s.manifest).latents) <=
                  11 * bound(DType::float32));
        }
    }
    for (int kind = 0; kind < 6; ++kind) CHECK(live(static_cast<Live>(kind)) == before[kind]);
}

// The plan that was unused for longest makes room: after shapes 1, 2, 3, 4, again 1, and 5, shape 1 still has its plan.
void test_the_oldest_plan_makes_room() {
    Setup s(DType::float32, DType::float32, 4);
    const auto contexts_after = [&](size_t steps) {
        s.run(job_of(1, 1, false, even(steps)));
        return s.backbone->contexts;
    };
    for (size_t steps = 1; steps <= 4; ++steps) CHECK(contexts_after(steps) == static_cast<int>(steps));
    CHECK(contexts_after(1) == 4);
    CHECK(contexts_after(5) == 5);
    CHECK(contexts_after(1) == 5);
    CHECK(contexts_after(2) == 6);
}

// Jobs that differ in one part of their shape only get plans of their own.
void test_shapes_that_differ_in_one_part() {
    Setup s;
    const auto table = std::make_shared<const Tensor>(random_tensor(8, {2, M}));
    DenoiseJob baked = job_of(1);
    baked.table = table;
    const DenoiseJob jobs[] = {job_of(1),
                               job_of(1, 2),
                               job_of(1, 3, false),
                               job_of(1, 3, true, even(3)),
                               job_of(1, 3, true, {1, 0.7619, 0}, 9),
                               job_of(1, 3, true, {1, 0.7619, 0}, 4, 3, 2),
                               baked};
    for (int repeat = 0; repeat < 3; ++repeat)
        for (const DenoiseJob &job : jobs) check_image(s.run(job), job, s.manifest);
    CHECK(s.backbone->contexts == 7 && s.decoder->contexts == 6 && s.conditioner->contexts == 6);
}

// An image has the same bits whatever other threads ran before it and whichever plans were evicted.
void test_threads() {
    Setup s(DType::float16, DType::float16, 3);
    std::vector<DenoiseJob> jobs;
    std::vector<Denoised> alone;
    for (uint64_t seed = 0; seed < 8; ++seed) {
        jobs.push_back(job_of(seed, 1 + static_cast<int64_t>(seed % 4), seed % 3 != 0));
        alone.push_back(s.run(jobs.back()));
    }
    std::vector<std::thread> threads;
    std::vector<int> equal(8);
    for (uint64_t seed = 0; seed < 8; ++seed) {
        threads.emplace_back([&, seed] {
            for (int i = 0; i < 5; ++i) equal[seed] += same(s.run(jobs[seed]), alone[seed]);
        });
    }
    for (std::thread &thread : threads) thread.join();
    CHECK(equal == std::vector<int>(8, 5));
}

void test_jobs_that_do_not_fit() {
    Setup s;
    const auto refused = [&](void (*change)(DenoiseJob &)) {
        DenoiseJob job = job_of(1);
        change(job);
        try {
            s.run(job);
        } catch (const Error &e) {
            return e.status == ARCFLOW_INTERNAL_ERROR;
        }
        return false;
    };
    const auto text = [](std::vector<int64_t> states, std::vector<int64_t> pooled) {
        return std::make_shared<const Embeddings>(
            Embeddings{random_tensor(1, std::move(states)), random_tensor(2, std::move(pooled))});
    };
    static std::shared_ptr<const Embeddings> other;
    CHECK(refused([](DenoiseJob &job) { job.streams.pop_back(); }));
    CHECK(refused([](DenoiseJob &job) { job.texts.pop_back(); }));
    CHECK(refused([](DenoiseJob &job) { job.sigmas.pop_back(); }));
    CHECK(refused([](DenoiseJob &job) { job.height = 0; }));
    CHECK(refused([](DenoiseJob &job) { job.width = 4; }));  // the rotary table is for 3
    CHECK(refused([](DenoiseJob &job) { job.guidance.reset(); }));
    other = text({1, 7, TEXT}, {1, POOL});
    CHECK(refused([](DenoiseJob &job) { job.texts[1] = other; }));
    other = text({1, 4, TEXT}, {1, POOL + 1});
    CHECK(refused([](DenoiseJob &job) { job.texts[1] = other; }));
    const DenoiseJob job = job_of(1);
    check_image(s.run(job), job, s.manifest);
}

void test_an_engine_on_host_tensors() {
    const auto lane = std::make_shared<Lane>(std::make_shared<const cuda::Device>());
    const Part part = manifest_in(DType::float16, DType::float16).parts.at("backbone");
    const auto session = std::make_shared<Session>("backbone", DType::float16);
    const auto engine = make_trt_engine(lane, session, "backbone", part);
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
void test_a_conditioner_on_host_tensors_in_pieces() {
    const auto lane = std::make_shared<Lane>(std::make_shared<const cuda::Device>());
    const Part part = manifest_in(DType::float32, DType::float32).parts.at("conditioner");
    const auto session = std::make_shared<Session>("conditioner", DType::float32);
    const auto engine = make_trt_engine(lane, session, "conditioner", part);
    Tensors in;
    in["timesteps"] = Tensor(DType::float32, {19});
    for (int i = 0; i < 19; ++i) in["timesteps"].as<float>()[i] = static_cast<float>(i) * 1000;
    in["pooled_projections"] = Tensor(DType::float32, {2, POOL});
    in["pooled_projections"].as<float>()[POOL + 1] = 100;
    in["guidance"] = Tensor(DType::float32, {2});
    const Tensors out = engine->run(in);
    const Tensor &modulation = out.at("modulation");
    CHECK(modulation.describe() == "float32[19, 2, 5]");
    for (int64_t i = 0; i < modulation.count(); ++i) {
        const auto wanted = static_cast<float>(i / 10 + 100 * (i / 5 % 2)) + static_cast<float>(i % 5) / 8;
        CHECK(modulation.as<float>()[i] == wanted);
    }
}

// The host engine's calls fail one by one, too, and its buffers outlive the work that reads them.
void test_every_call_of_a_host_engine_may_fail() {
    const auto lane = std::make_shared<Lane>(std::make_shared<const cuda::Device>());
    const Part part = manifest_in(DType::float32, DType::float32).parts.at("conditioner");
    Tensors in;
    in["timesteps"] = random_tensor(1, {2});
    in["pooled_projections"] = random_tensor(2, {2, POOL});
    in["guidance"] = random_tensor(3, {2});
    Tensors right;
    for (long nth = 1;; ++nth) {
        const auto session = std::make_shared<Session>("conditioner", DType::float32);
        const auto engine = make_trt_engine(lane, session, "conditioner", part);
        if (right.empty()) right = engine->run(in);
        for (const bool prepared : {false, true}) {
            const auto fresh = prepared ? nullptr : make_trt_engine(lane, session, "conditioner", part);
            Engine &tried = prepared ? *engine : *fresh;
            reset_driver();
            fail("*", nth, unknown);
            try {
                CHECK(tried.run(in).at("modulation").data == right.at("modulation").data);
            } catch (const Error &e) {
                CHECK(e.status == ARCFLOW_ENGINE_ERROR);
            }
            const bool reached = failures_pending() == 0;
            reset_driver();
            CHECK(tried.run(in).at("modulation").data == right.at("modulation").data);
            if (!prepared && !reached) {
                CHECK(nth > 8);
                return;
            }
        }
    }
}

}  // namespace

// "threads" runs only the test with threads; "modes" those of LoRAs and memory modes; "failures" those in which each
// call fails once, which take longest; without an argument all others run.
int main(int count, char **arguments) {
    const std::string_view part = count > 1 ? arguments[1] : "";
    if (part == "threads") {
        test_threads();
        return 0;
    }
    if (part == "modes") {
        test_loras_and_modes();
        return 0;
    }
    if (part == "failures") {
        test_every_call_may_fail();
        test_every_allocation_may_fail();
        test_every_call_of_a_host_engine_may_fail();
        test_failures_with_loras_and_modes();
        return 0;
    }
    test_agrees_with_the_host();
    test_where_the_modulation_comes_from();
    test_a_conditioner_in_pieces();
    test_a_batch_in_pieces();
    test_graph_and_enqueue_give_equal_bits();
    test_a_refused_capture_falls_back();
    test_an_engine_that_throws_in_a_capture();
    test_a_job_that_fails_half_way();
    test_out_of_memory_is_a_sentence();
    test_plans_make_room_for_a_host_engine();
    test_work_that_fails_on_the_device();
    test_a_warm_image();
    test_times_of_stages();
    test_plans_are_bounded();
    test_the_oldest_plan_makes_room();
    test_shapes_that_differ_in_one_part();
    test_threads();
    test_jobs_that_do_not_fit();
    test_an_engine_on_host_tensors();
    test_a_conditioner_on_host_tensors_in_pieces();
    std::puts("ok");
    return 0;
}
