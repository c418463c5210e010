// Tests of LoRAs and memory modes of the denoiser; trt_denoiser_test.cpp runs them.
#include <cstring>
#include <map>

#include "trt_loras.h"
#include "trt_setup.h"

namespace {

// LoRAs ------------------------------------------------------------------------------------------------------------

using Loras = std::vector<ScaledLora>;

// A setup whose backbone and conditioner have slots.
Setup slotted(MemoryMode mode = MemoryMode::resident, DType dtype = DType::float32) {
    return Setup(dtype, dtype, default_max_plans, mode, 32);
}

DenoiseJob with(DenoiseJob job, const Loras &loras, const Manifest &manifest) {
    job.loras = std::make_shared<const PreparedLoras>(prepare_loras(manifest, loras));
    return job;
}

// Images with LoRAs are those of the host, in any order, and their bits do not depend on what ran before. A rank of 16
// has an arena and a graph of its own, and so have two LoRAs of rank 8 that are joined.
void test_loras() {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
        Setup s = slotted(MemoryMode::resident, dtype);
        const Manifest &m = s.manifest;
        const Loras a{lora_of(1, 8, 0.25f, m)}, b{lora_of(2, 8, -0.5f, m)}, wide{lora_of(3, 16, 0.125f, m)};
        const Loras both{a[0], b[0]};
        std::map<const Loras *, Denoised> first;
        const Loras none;
        for (const Loras *loras : {&none, &a, &b, &a, &wide, &both, &none, &wide, &b, &both, &a}) {
            const DenoiseJob job = with(job_of(1), *loras, m);
            Denoised found = s.run(job);
            check_image(found, job, m);
            const auto [place, is_new] = first.emplace(loras, found);
            CHECK(is_new || same(found, place->second));
        }
        CHECK(!same(first.at(&a), first.at(&b)) && !same(first.at(&a), first.at(&none)));
        CHECK(same(first.at(&none), s.run(job_of(1))));  // a job that names none
        CHECK(s.backbone->contexts == 2);
    }
}

// A switch to a set that was used before is one copy and one launch, and allocates nothing; the same set again is none.
void test_a_switch_is_one_copy() {
    Setup s = slotted();
    const DenoiseJob jobs[] = {with(job_of(1), {lora_of(1, 8, 0.25f, s.manifest)}, s.manifest),
                               with(job_of(1), {lora_of(2, 8, -0.5f, s.manifest)}, s.manifest)};
    const Denoised images[] = {s.run(jobs[0]), s.run(jobs[1])};
    s.run(jobs[0]);
    reset_driver();
    const long copies[] = {0, 1, 1, 0};
    const int order[] = {0, 1, 0, 0};
    long before = 0;
    for (int i = 0; i < 4; ++i) {
        CHECK(same(s.run(jobs[order[i]]), images[order[i]]));
        CHECK(calls("cuMemcpyAsync") - before == copies[i]);
        before = calls("cuMemcpyAsync");
    }
    CHECK(calls("cuGraphLaunch") == 4 && calls("cuStreamBeginCapture") == 0);
    CHECK(calls("cuMemAlloc") == 0 && calls("cuMemHostAlloc") == 0);
}

// Every allocation and every call of a job with LoRAs fails once; the error is a sentence or the image right, and the
// next image is right, with these LoRAs and with others.
void test_every_failure_with_loras() {
    for (const char *function : {"cuMemAlloc", "cuMemHostAlloc", "*"}) {
        for (long nth = 1;; ++nth) {
            Setup s = slotted();
            const Manifest &m = s.manifest;
            const DenoiseJob a = with(job_of(1, 1), {lora_of(1, 8, 0.25f, m)}, m);
            const DenoiseJob b = with(job_of(1, 1), {lora_of(2, 8, -0.5f, m)}, m);
            s.run(b);
            reset_driver();
            fail(function, nth, *function == '*' ? unknown : out_of_memory);
            try {
                check_image(s.run(a), a, m);
            } catch (const Error &e) {
                CHECK(*function == '*' && std::string(e.what()).find('\n') == std::string::npos);
            }
            const bool reached = failures_pending() == 0;
            reset_driver();
            check_image(s.run(a), a, m);
            check_image(s.run(b), b, m);
            if (reached) continue;
            CHECK(nth > (*function == '*' ? 30 : 1));
            break;
        }
    }
}

// Sets of LoRA inputs are kept up to a limit, and freed when one of their LoRAs is closed; none is left at the end.
void test_kept_sets() {
    Setup s = slotted();
    const size_t before = live(device_bytes);
    {
        LoraArenas arenas(*s.lane, s.manifest, {"backbone"}, 2);
        const Lane::Hold hold(*s.lane);
        std::vector<size_t> sets;
        for (const uint64_t number : std::initializer_list<uint64_t>{1, 2, 3, 1}) {
            const PreparedLoras loras = prepare_loras(s.manifest, {lora_of(number, 8, 1, s.manifest)});
            CHECK(arenas.rank(loras) == 8);
            arenas.put(loras, 8);
            s.lane->stream().wait();
            sets.push_back((live(device_bytes) - before) / 512 - 1);  // less the arena; each has two regions
            const Tensor wanted =
                pad_inputs(*s.manifest.parts.at("backbone").lora, *loras.of("backbone")).at("to_q.lora_a");
            void *found = control<void *(cuda::Address, size_t)>("host_cuda_at")(
                arenas.addresses("backbone", 8).at("to_q.lora_a"), wanted.data.size());
            CHECK(std::memcmp(found, wanted.data.data(), wanted.data.size()) == 0);
        }
        CHECK((sets == std::vector<size_t>{1, 2, 2, 2}));
        arenas.drop(3);
        arenas.drop(7);
        CHECK((live(device_bytes) - before) / 512 == 2);
        CHECK(arenas.release() && !arenas.release());
    }
    CHECK(live(device_bytes) == before);
    // A LoRA is closed in the callback of the job that uses it.
    const ScaledLora lora = lora_of(1, 8, 0.25f, s.manifest);
    const DenoiseJob job = with(job_of(1), {lora}, s.manifest);
    const Denoised right = s.run(job);
    const size_t with_set = live(device_bytes);
    CHECK(same(right, s.run(job, [&](int64_t, const Tensor &) { s.denoiser->forget(*lora.lora); })));
    CHECK(live(device_bytes) < with_set);
    CHECK(same(right, s.run(job)));
}

// A text encoder's or conditioner's slots on host tensors: padded with zeros, and zeros where no LoRA is given.
void test_slots_on_host_tensors() {
    Setup s = slotted();
    const auto engine = s.source.borrow("conditioner");
    Tensors in;
    in["timesteps"] = random_tensor(1, {2});
    in["pooled_projections"] = random_tensor(2, {2, POOL});
    in["guidance"] = random_tensor(3, {2});
    const PreparedLoras loras = prepare_loras(s.manifest, {lora_of(1, 24, 0.25f, s.manifest)});
    for (const Tensors *slots : {static_cast<const Tensors *>(nullptr), loras.of("conditioner")}) {
        const Tensor found =
            slots ? engine->run_with_slots(in, *slots).at("modulation") : engine->run(in).at("modulation");
        Tensors wanted = in;
        if (slots) wanted.insert(slots->begin(), slots->end());
        wanted["modulation"] = Tensor(DType::float32, {2, 2, M});
        std::map<std::string, std::byte *> at;
        for (auto &[name, tensor] : wanted) at[name] = tensor.data.data();
        conditioner(shapes_of(wanted), at, DType::float32);
        CHECK(found.data == wanted.at("modulation").data);
    }
}

// Memory modes -------------------------------------------------------------------------------------------------------

constexpr MemoryMode all_modes[] = {MemoryMode::resident, MemoryMode::balanced, MemoryMode::low};

// Images have the same bits in all modes: plain, captured and replayed, after another prompt, with and without LoRAs,
// also where the conditioner takes fewer steps at once, and with a callback.
void test_modes_give_equal_bits() {
    const auto table = std::make_shared<const Tensor>(random_tensor(8, {2, M}));
    std::vector<Denoised> first;
    for (const MemoryMode mode : all_modes) {
        Setup s = slotted(mode);
        const Loras lora{lora_of(1, 16, 0.25f, s.manifest)};
        DenoiseJob baked = job_of(3);
        baked.table = table;
        const DenoiseJob jobs[] = {job_of(1), job_of(2, 7), with(job_of(1), lora, s.manifest), baked,
                                   job_of(4, 1, true, even(19))};
        size_t place = 0;
        for (const DenoiseJob &job : jobs) {
            for (int repeat = 0; repeat < 3; ++repeat) {
                std::vector<Tensor> steps;
                const OnStep on_step = [&](int64_t, const Tensor &latents) { steps.push_back(latents); };
                const Denoised found = s.run(job, repeat < 2 ? OnStep() : on_step);
                CHECK(repeat < 2 || (steps.size() == job.timesteps.size() && steps.back().data == found.latents.data));
                if (mode == MemoryMode::resident && repeat == 0) first.push_back(found);
                CHECK(same(found, first.at(place)));
            }
            ++place;
        }
    }
}

// In balanced, a new modulation loads the conditioner and keeps the graph. In low, every part is loaded for each use,
// and only the buffers stay.
void test_what_each_mode_loads() {
    using Names = std::vector<std::string>;
    Setup balanced = slotted(MemoryMode::balanced), low = slotted(MemoryMode::low);
    reset_driver();
    CHECK((balanced.source.loads == Names{"backbone", "vae_decoder"}) && low.source.loads.empty());
    for (const uint64_t seed : std::initializer_list<uint64_t>{1, 1, 2, 1, 2}) balanced.run(job_of(seed));
    CHECK((balanced.source.loads == Names{"backbone", "vae_decoder", "conditioner", "conditioner"}));
    CHECK(calls("cuStreamBeginCapture") == 1 && calls("cuGraphLaunch") == 4);
    const size_t before = live(device_bytes);
    for (const uint64_t seed : std::initializer_list<uint64_t>{1, 1}) low.run(job_of(seed));
    CHECK((low.source.loads == Names{"conditioner", "backbone", "vae_decoder", "backbone", "vae_decoder"}));
    CHECK(low.backbone->live_contexts == 0 && low.decoder->live_contexts == 0 && low.backbone->most_contexts == 1);
    CHECK(calls("cuStreamBeginCapture") == 1);
    const DenoiseJob job = job_of(1);
    const size_t buffers = live(device_bytes) - before;
    low.run(job);
    CHECK(live(device_bytes) - before == buffers);  // no workspace is left
}

// In the modes that load parts during a job, each driver call and each allocation fails once, as in the test of
// resident.
void test_every_failure_in_other_modes() {
    for (const MemoryMode mode : {MemoryMode::balanced, MemoryMode::low}) {
        for (const char *function : {"cuMemAlloc", "cuMemHostAlloc", "*"}) {
            for (long nth = 1;; ++nth) {
                Setup s(DType::float32, DType::float32, default_max_plans, mode);
                const DenoiseJob job = job_of(1, 1), other = job_of(2, 2);
                s.run(other);
                reset_driver();
                fail(function, nth, *function == '*' ? unknown : out_of_memory);
                try {
                    check_image(s.run(job), job, s.manifest);
                } catch (const Error &e) {
                    CHECK(*function == '*' && std::string(e.what()).find('\n') == std::string::npos);
                }
                const bool reached = failures_pending() == 0;
                reset_driver();
                check_image(s.run(job), job, s.manifest);
                check_image(s.run(other), other, s.manifest);
                if (reached) continue;
                CHECK(nth > (*function == '*' ? 30 : 2));
                break;
            }
        }
    }
}

}  // namespace

void test_loras_and_modes() {
    test_loras();
    test_a_switch_is_one_copy();
    test_kept_sets();
    test_slots_on_host_tensors();
    test_modes_give_equal_bits();
    test_what_each_mode_loads();
}

void test_failures_with_loras_and_modes() {
    test_every_failure_with_loras();
    test_every_failure_in_other_modes();
}
