// Runs jobs on the GPU, with one plan for each shape.
#include "trt_denoiser.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <list>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "error.h"
#include "lora.h"
#include "modulations.h"
#include "trt_loras.h"

namespace arcflow {
namespace {

void check_heads(const Manifest &manifest) {
    if (manifest.sampler == Sampler::linear) return;  // one output
    const Part &backbone = manifest.parts.at("backbone");
    const auto dtype = [&](const char *name) { return spec_of(backbone.outputs, name, "backbone").dtype; };
    if (dtype("logweights") != dtype("means") || dtype("loggammas") != dtype("means"))
        throw engine_error("backbone: means, logweights and loggammas must be in one dtype; export the bundle again");
}

// Check that a job's tensors fit together. Sizes that depend on the plan are checked when they are staged.
void check_job(const DenoiseJob &job) {
    const auto fits = [](bool ok, const char *what) {
        if (!ok) throw Error(ARCFLOW_INTERNAL_ERROR, std::string("denoiser: ") + what + " does not fit the job");
    };
    fits(!job.texts.empty() && job.streams.size() == job.texts.size(), "noise");
    for (const auto &text : job.texts)
        fits(text->states.shape.size() == 3 && text->states.shape == job.texts.front()->states.shape,
             "a text's states");
    if (job.negative) {
        const auto &negative = job.negative->texts;
        fits(negative.size() == job.texts.size(), "the number of negative texts");
        for (const auto &text : negative)
            fits(text->states.shape.size() == 3 && text->states.shape == negative.front()->states.shape,
                 "a negative text's states");
    }
    fits(job.height > 0 && job.width > 0, "the grid");
    fits(!job.timesteps.empty() && job.sigmas.size() == job.timesteps.size() + 1, "sigmas");
}

// Append along the first axis.
void append(Tensor &all, Tensor more) {
    if (all.shape.empty()) {
        all = std::move(more);
    } else if (!more.shape.empty()) {
        all.shape[0] += more.shape[0];
        all.data.insert(all.data.end(), more.data.begin(), more.data.end());
    }
}

class TrtDenoiser : public Denoiser {
public:
    TrtDenoiser(std::shared_ptr<Lane> lane, PartSource &parts, ShapeCheck check_shapes, const Manifest &manifest,
                size_t max_plans)
        : lane_(std::move(lane)),
          parts_(parts),
          check_shapes_(std::move(check_shapes)),
          manifest_(manifest),
          max_plans_(max_plans),
          arenas_(*lane_, manifest_, {"backbone", "conditioner"}) {
        check_heads(manifest_);
        const Lane::Hold hold(*lane_);
        kernels_ = std::make_unique<Kernels>(lane_->device->gpu.target);
        lane_->make_room = [this] { return make_room(); };
    }

    ~TrtDenoiser() override {
        plans_.clear();
        try {
            const Lane::Hold hold(*lane_);
            lane_->make_room = [] { return false; };
            arenas_.release();
            lane_->release_workspace();
            kernels_.reset();
        } catch (const std::exception &) {  // the device is lost, so there is nothing to free
        }
    }

    // Runs in several pieces if the engines take fewer images at once. The pieces run one after the other, and
    // `on_step` gets the whole batch, so it is called while the last piece runs.
    Denoised run(const DenoiseJob &job, const OnStep &on_step) override {
        check_job(job);
        const std::lock_guard<std::recursive_mutex> lock(mutex_);
        const cuda::Current current(*lane_->device);
        drop_forgotten();
        const auto [most, steps_at_once] = fit(job);
        const auto batch = static_cast<int64_t>(job.texts.size());
        std::vector<Tensor> by_step(job.timesteps.size());
        Denoised all;
        for (int64_t begin = 0; begin < batch; begin += most) {
            const int64_t end = std::min(begin + most, batch);
            DenoiseJob piece = job;
            piece.streams.assign(job.streams.begin() + begin, job.streams.begin() + end);
            piece.texts.assign(job.texts.begin() + begin, job.texts.begin() + end);
            if (job.negative) {
                const auto &negative = job.negative->texts;
                piece.negative->texts.assign(negative.begin() + begin, negative.begin() + end);
            }
            OnStep after;
            if (on_step) {
                after = [&, last = end == batch](int64_t step, const Tensor &latents) {
                    Tensor &so_far = by_step[static_cast<size_t>(step)];
                    append(so_far, latents);
                    if (last) on_step(step, so_far);
                };
            }
            Denoised part = run_piece(piece, steps_at_once, after);
            append(all.latents, std::move(part.latents));
            append(all.pixels, std::move(part.pixels));
            for (const auto &[stage, ms] : part.stages_ms) {
                const auto known = std::find_if(all.stages_ms.begin(), all.stages_ms.end(),
                                                [&, &name = stage](const auto &t) { return t.first == name; });
                if (known == all.stages_ms.end()) all.stages_ms.emplace_back(stage, ms);
                else known->second += ms;
            }
        }
        return all;
    }

    void forget(const Lora &lora) override {
        {
            const std::lock_guard<std::mutex> lock(forgotten_mutex_);
            forgotten_.push_back(lora.number);
        }
        // A running job drops it later: to wait here for a job whose callback closes a LoRA would be a deadlock.
        if (const std::unique_lock<std::recursive_mutex> lock(mutex_, std::try_to_lock); lock) drop_forgotten();
    }

private:
    void drop_forgotten() {
        std::vector<uint64_t> numbers;
        {
            const std::lock_guard<std::mutex> lock(forgotten_mutex_);
            numbers.swap(forgotten_);
        }
        if (numbers.empty()) return;
        const Lane::Hold hold(*lane_);
        for (const uint64_t number : numbers) arenas_.drop(number);
    }

    DenoiseShape size_of_job(const DenoiseJob &job, int64_t batch) const {
        return {batch, job.height, job.width, job.texts.front()->states.shape[1],
                static_cast<int64_t>(job.timesteps.size())};
    }

    // The text tokens of the negative prompts; 0 if the job has none.
    static int64_t negative_tokens(const DenoiseJob &job) {
        return job.negative ? job.negative->texts.front()->states.shape[1] : 0;
    }

    // The largest number of images per run, and of timesteps per run of the conditioner, that the engines take. Throws
    // Error if they do not take even one image of this size.
    std::pair<int64_t, int64_t> fit(const DenoiseJob &job) const {
        const auto steps = static_cast<int64_t>(job.timesteps.size());
        std::string wrong;
        for (auto batch = static_cast<int64_t>(job.texts.size()); batch > 0; --batch) {
            const DenoiseShape size = size_of_job(job, batch);
            wrong = check_shapes_("backbone", backbone_inputs(manifest_, size));
            if (wrong.empty() && job.negative) {
                DenoiseShape negative = size;
                negative.text_tokens = negative_tokens(job);
                wrong = check_shapes_("backbone", backbone_inputs(manifest_, negative));
            }
            if (wrong.empty() && job.pixels) wrong = check_shapes_("vae_decoder", decoder_inputs(manifest_, size));
            if (!wrong.empty()) continue;
            if (job.table != nullptr) return {batch, steps};
            for (int64_t at_once = steps; at_once > 0; --at_once) {
                wrong = check_shapes_("conditioner", conditioner_inputs(manifest_, batch, at_once));
                if (wrong.empty()) return {batch, at_once};
            }
        }
        throw engine_error(wrong);
    }

    Modulation source(const DenoiseJob &job) const {
        // A plan has the bundle's table built in, but not one that LoRAs changed.
        if (job.table != nullptr && loras_of(job).of(modulation_name) != nullptr) return Modulation::given;
        return modulation_source(manifest_, job.table != nullptr, parts_.keeps("conditioner"));
    }

    static const PreparedLoras &loras_of(const DenoiseJob &job) {
        static const PreparedLoras none;
        return job.loras ? *job.loras : none;
    }

    // Free the plans, the LoRAs and the workspace, except what a job that is running in this thread uses. False if
    // there is nothing to free, or another thread uses them.
    bool make_room() {
        const std::unique_lock<std::recursive_mutex> lock(mutex_, std::try_to_lock);  // its owner may wait for us
        if (!lock) return false;
        const size_t running = running_ ? 1 : 0, others = plans_.size() - running;
        if (others > 0)
            std::fprintf(stderr, "arcflow: out of GPU memory: the CUDA graphs of %zu other shapes are dropped\n",
                         others);
        drop_plans(running);
        if (running_) return others > 0;
        const Lane::Hold hold(*lane_);
        const bool loras = arenas_.release();
        return lane_->release_workspace() || loras || others > 0;
    }

    // If memory runs out, free the other plans and the workspace, and try once more.
    Denoised run_piece(const DenoiseJob &job, int64_t steps_at_once, const OnStep &on_step) {
        bool reported = false;  // a step must not be reported twice
        const OnStep after = [&](int64_t step, const Tensor &latents) {
            reported = true;
            on_step(step, latents);
        };
        const OnStep given = on_step ? after : on_step;
        try {
            return try_piece(job, steps_at_once, given);
        } catch (const Error &e) {
            if (e.status != ARCFLOW_OUT_OF_MEMORY || reported || !make_room()) throw;
        }
        return try_piece(job, steps_at_once, given);
    }

    Denoised try_piece(const DenoiseJob &job, int64_t steps_at_once, const OnStep &on_step) {
        const Modulation modulation = source(job);
        std::shared_ptr<const Tensor> given;
        if (modulation == Modulation::given) given = job.table ? job.table : condition(job, steps_at_once);
        const PreparedLoras &loras = loras_of(job);
        const DenoiseShape size = size_of_job(job, static_cast<int64_t>(job.texts.size()));
        const PlanKey key{size, job.pixels, modulation, arenas_.rank(loras), negative_tokens(job)};
        Plan &plan = plan_for(key, steps_at_once, job);
        try {
            plan.stage(job, given.get());
            if (key.lora_rank > 0) {
                const Lane::Hold hold(*lane_);
                arenas_.put(loras, key.lora_rank);
            }
            running_ = true;
            plan.run(on_step);
            running_ = false;
            if (!plan.obstacle().empty() && logged_.insert(plan.obstacle()).second) {
                std::fprintf(stderr, "arcflow: images are generated without a CUDA graph: %s\n",
                             plan.obstacle().c_str());
            }
            return plan.take();
        } catch (...) {
            running_ = false;
            plans_.pop_front();  // half of its work may be enqueued; its destructor waits for the stream
            arenas_.forget();
            throw;
        }
    }

    // The modulation [S, b, M] or [S, 1, M], computed through the host; the results for the last inputs are cached. The
    // runs of the conditioner are those that a graph would make, so that the modulation has the same bits.
    std::shared_ptr<const Tensor> condition(const DenoiseJob &job, int64_t steps_at_once) {
        const auto steps = static_cast<int64_t>(job.timesteps.size());
        const PreparedLoras &loras = loras_of(job);
        Tensors inputs = conditioner_inputs_of(job);
        const ModulationKey key = modulation_key(loras, inputs);
        if (auto kept = modulations_.get(key)) return kept;
        const Tensors none, *const slots = loras.of("conditioner");
        const std::shared_ptr<Engine> conditioner = parts_.borrow("conditioner");
        Tensor all;
        for (const int64_t start : conditioner_starts(steps, steps_at_once)) {
            Tensor &seen = inputs["timesteps"] = Tensor(DType::float32, {steps_at_once});
            std::copy_n(job.timesteps.begin() + start, steps_at_once, seen.as<float>());
            const Tensor made = conditioner->run_with_slots(inputs, slots ? *slots : none).at("modulation");
            if (all.shape.empty()) all = Tensor(made.dtype, {steps, made.shape[1], made.shape[2]});
            const size_t step_bytes = made.data.size() / static_cast<size_t>(steps_at_once);
            std::copy(made.data.begin(), made.data.end(),
                      all.data.begin() + start * static_cast<std::ptrdiff_t>(step_bytes));
        }
        auto shared = std::make_shared<const Tensor>(std::move(all));
        modulations_.put(key, shared, shared->data.size());
        return shared;
    }

    // The conditioner's inputs for all steps.
    Tensors conditioner_inputs_of(const DenoiseJob &job) const {
        Tensors inputs;
        for (const TensorSpec &spec : manifest_.parts.at("conditioner").inputs) {
            Tensor tensor;
            if (spec.name == "timesteps") {
                tensor = Tensor(DType::float32, {static_cast<int64_t>(job.timesteps.size())});
                std::copy(job.timesteps.begin(), job.timesteps.end(), tensor.as<float>());
            } else if (spec.name == "guidance" && job.guidance) {
                tensor = Tensor(DType::float32, {static_cast<int64_t>(job.texts.size())});
                std::fill_n(tensor.as<float>(), tensor.count(), *job.guidance);
            } else {
                for (const auto &text : job.texts) append(tensor, text->pooled);
            }
            inputs[spec.name] = cast(std::move(tensor), spec.dtype);
        }
        return inputs;
    }

    // The plan of a key, moved to the front of the list. A new plan replaces the least recently used one.
    Plan &plan_for(const PlanKey &key, int64_t steps_at_once, const DenoiseJob &job) {
        const auto found = std::find_if(plans_.begin(), plans_.end(), [&](const auto &p) { return p->key == key; });
        if (found != plans_.end()) {
            plans_.splice(plans_.begin(), plans_, found);
            return *plans_.front();
        }
        drop_plans(max_plans_ - 1);
        plans_.push_front(
            std::make_unique<Plan>(*lane_, manifest_, parts_, arenas_, *kernels_, key, steps_at_once, job));
        return *plans_.front();
    }

    void drop_plans(size_t keep) {
        while (plans_.size() > keep) plans_.pop_back();
    }

    std::shared_ptr<Lane> lane_;
    PartSource &parts_;
    ShapeCheck check_shapes_;
    Manifest manifest_;
    size_t max_plans_;
    // One job at a time, since two would only share the GPU. Taken before the lane. Recursive, because loading or
    // running a part during a job may ask for room.
    std::recursive_mutex mutex_;
    std::unique_ptr<Kernels> kernels_;
    LoraArenas arenas_;                       // declared before the plans, which use its addresses
    std::list<std::unique_ptr<Plan>> plans_;  // most recently used first
    bool running_ = false;                    // the first of them
    ModulationCache modulations_{cached_modulations, cached_modulation_bytes};
    std::mutex forgotten_mutex_;
    std::vector<uint64_t> forgotten_;  // LoRAs whose sets are no longer needed
    std::set<std::string> logged_;
};

}  // namespace

std::unique_ptr<Denoiser> make_trt_denoiser(std::shared_ptr<Lane> lane, PartSource &parts, ShapeCheck check_shapes,
                                            const Manifest &manifest, size_t max_plans) {
    return std::make_unique<TrtDenoiser>(std::move(lane), parts, std::move(check_shapes), manifest, max_plans);
}

}  // namespace arcflow
