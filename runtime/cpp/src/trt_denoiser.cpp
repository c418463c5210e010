// Runs jobs on the GPU, with one plan for each shape.
#include "trt_denoiser.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <list>
#include <mutex>
#include <set>
#include <utility>

#include "error.h"

namespace arcflow {
namespace {

void check_heads(const Part &backbone) {
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
    TrtDenoiser(std::shared_ptr<Lane> lane, Sessions sessions, std::unique_ptr<Engine> conditioner,
                const Manifest &manifest, size_t max_plans)
        : lane_(std::move(lane)),
          sessions_(std::move(sessions)),
          conditioner_(std::move(conditioner)),
          manifest_(manifest),
          max_plans_(max_plans) {
        check_heads(manifest_.parts.at("backbone"));
        const Lane::Hold hold(*lane_);
        kernels_ = std::make_unique<Kernels>(lane_->device->gpu.target);
        lane_->make_room = [this] { return make_room(); };
    }

    ~TrtDenoiser() override {
        plans_.clear();
        try {
            const Lane::Hold hold(*lane_);
            lane_->make_room = [] { return false; };
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
        const auto [most, steps_at_once] = fit(job);
        const auto batch = static_cast<int64_t>(job.texts.size());
        std::vector<Tensor> by_step(job.timesteps.size());
        Denoised all;
        for (int64_t begin = 0; begin < batch; begin += most) {
            const int64_t end = std::min(begin + most, batch);
            DenoiseJob piece = job;
            piece.streams.assign(job.streams.begin() + begin, job.streams.begin() + end);
            piece.texts.assign(job.texts.begin() + begin, job.texts.begin() + end);
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

private:
    DenoiseShape size_of_job(const DenoiseJob &job, int64_t batch) const {
        return {batch, job.height, job.width, job.texts.front()->states.shape[1],
                static_cast<int64_t>(job.timesteps.size())};
    }

    // The largest number of images per run, and of timesteps per run of the conditioner, that the engines take. Throws
    // Error if they do not take even one image of this size.
    std::pair<int64_t, int64_t> fit(const DenoiseJob &job) const {
        const auto steps = static_cast<int64_t>(job.timesteps.size());
        std::string wrong;
        for (auto batch = static_cast<int64_t>(job.texts.size()); batch > 0; --batch) {
            const DenoiseShape size = size_of_job(job, batch);
            wrong = sessions_.backbone->misfit(backbone_inputs(manifest_, size));
            if (wrong.empty() && job.pixels) wrong = sessions_.decoder->misfit(decoder_inputs(manifest_, size));
            if (!wrong.empty()) continue;
            if (source(job) != Modulation::conditioner) return {batch, steps};
            for (int64_t at_once = steps; at_once > 0; --at_once) {
                wrong = sessions_.conditioner->misfit(conditioner_inputs(manifest_, batch, at_once));
                if (wrong.empty()) return {batch, at_once};
            }
        }
        throw engine_error(wrong);
    }

    Modulation source(const DenoiseJob &job) const {
        if (job.table != nullptr) return Modulation::table;
        const DType made = spec_of(manifest_.parts.at("conditioner").outputs, "modulation", "conditioner").dtype;
        // Within a CUDA graph nothing casts between engines, so both must have the same dtype.
        return made == spec_of(manifest_.parts.at("backbone").inputs, "modulation", "backbone").dtype
                   ? Modulation::conditioner
                   : Modulation::given;
    }

    // Free the plans and the workspace. False if there is nothing to free, or another thread uses them.
    bool make_room() {
        const std::unique_lock<std::recursive_mutex> lock(mutex_, std::try_to_lock);  // its owner may wait for us
        if (!lock) return false;
        const size_t others = plans_.size();
        if (others > 0)
            std::fprintf(stderr, "arcflow: out of GPU memory: the CUDA graphs of %zu other shapes are dropped\n",
                         others);
        drop_plans(0);
        const Lane::Hold hold(*lane_);
        return lane_->release_workspace() || others > 0;
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
        const Tensor given = modulation == Modulation::given ? condition(job) : Tensor();
        const PlanKey key{size_of_job(job, static_cast<int64_t>(job.texts.size())), job.pixels, modulation};
        Plan &plan = plan_for(key, steps_at_once, job);
        try {
            plan.stage(job, modulation == Modulation::given ? &given : nullptr);
            plan.run(on_step);
            if (!plan.obstacle().empty() && logged_.insert(plan.obstacle()).second) {
                std::fprintf(stderr, "arcflow: images are generated without a CUDA graph: %s\n",
                             plan.obstacle().c_str());
            }
            return plan.take();
        } catch (...) {
            plans_.pop_front();  // half of its work may be enqueued; its destructor waits for the stream
            throw;
        }
    }

    // The modulation [S, b, M] or [S, 1, M], computed through the host because conditioner and backbone differ in
    // dtype.
    Tensor condition(const DenoiseJob &job) {
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
        Tensors outputs = conditioner_->run(inputs);
        return std::move(outputs.at("modulation"));
    }

    // The plan of a key, moved to the front of the list. A new plan replaces the least recently used one.
    Plan &plan_for(const PlanKey &key, int64_t steps_at_once, const DenoiseJob &job) {
        const auto found = std::find_if(plans_.begin(), plans_.end(), [&](const auto &p) { return p->key == key; });
        if (found != plans_.end()) {
            plans_.splice(plans_.begin(), plans_, found);
            return *plans_.front();
        }
        drop_plans(max_plans_ - 1);
        plans_.push_front(std::make_unique<Plan>(*lane_, manifest_, sessions_, *kernels_, key, steps_at_once, job));
        return *plans_.front();
    }

    void drop_plans(size_t keep) {
        while (plans_.size() > keep) plans_.pop_back();
    }

    std::shared_ptr<Lane> lane_;
    Sessions sessions_;
    std::unique_ptr<Engine> conditioner_;
    Manifest manifest_;
    size_t max_plans_;
    // One job at a time, since two would only share the GPU. Taken before the lane. Recursive, because the conditioner
    // that runs on the host may ask for room.
    std::recursive_mutex mutex_;
    std::unique_ptr<Kernels> kernels_;
    std::list<std::unique_ptr<Plan>> plans_;  // most recently used first
    std::set<std::string> logged_;
};

}  // namespace

std::unique_ptr<Denoiser> make_trt_denoiser(std::shared_ptr<Lane> lane, Sessions sessions,
                                            std::unique_ptr<Engine> conditioner, const Manifest &manifest,
                                            size_t max_plans) {
    return std::make_unique<TrtDenoiser>(std::move(lane), std::move(sessions), std::move(conditioner), manifest,
                                         max_plans);
}

}  // namespace arcflow
