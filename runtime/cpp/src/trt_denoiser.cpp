// Runs requests on the GPU, with one plan for each request shape.
#include "trt_denoiser.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <list>
#include <mutex>
#include <utility>

#include "error.h"
#include "trt_kernel.h"
#include "trt_plan.h"

namespace arcflow {
namespace {

constexpr size_t max_plans = 4;  // request shapes whose buffers and graph are kept

class TrtDenoiser : public Denoiser {
public:
    TrtDenoiser(std::shared_ptr<const cuda::Device> device, std::shared_ptr<TrtSession> backbone,
                std::shared_ptr<TrtSession> decoder, const Manifest &manifest)
        : device_(std::move(device)),
          backbone_(std::move(backbone)),
          decoder_(std::move(decoder)),
          types_(manifest.parts.at("backbone")),
          latents_(manifest.latents) {
        const cuda::Current current(*device_);
        kernels_ = std::make_unique<Kernels>(device_->gpu.target);
        stream_ = std::make_unique<cuda::Stream>();
    }

    ~TrtDenoiser() override {
        try {
            const cuda::Current current(*device_);
            plans_.clear();
            stream_.reset();
            kernels_.reset();
        } catch (const Error &) {  // the device is lost, so there is nothing to free
        }
    }

    // One request at a time, since two would only share the GPU.
    Denoised run(const DenoiseInputs &inputs) override {
        check_inputs(inputs);
        const std::lock_guard<std::mutex> lock(mutex_);
        const cuda::Current current(*device_);
        Plan &plan = plan_for(inputs);
        plan.fill(inputs);
        try {
            plan.run(*stream_, *kernels_);
            stream_->wait();
        } catch (const Error &) {
            plans_.pop_front();  // its state is unknown after a failure
            throw;
        }
        Denoised out = plan.take(inputs);
        const std::string why = plan.capture(*stream_, *kernels_);
        if (!why.empty() && !logged_.exchange(true)) {
            std::fprintf(stderr, "arcflow: steps are enqueued one by one, since no CUDA graph can be made: %s\n",
                         why.c_str());
        }
        return out;
    }

private:
    // The plan for the request's shape, moved to the front of the list. A new plan replaces the least recently used
    // one.
    Plan &plan_for(const DenoiseInputs &inputs) {
        PlanShape shape(inputs, latents_);
        const auto found = std::find_if(plans_.begin(), plans_.end(), [&](const auto &p) { return p->shape == shape; });
        if (found != plans_.end()) {
            plans_.splice(plans_.begin(), plans_, found);
            return *plans_.front();
        }
        while (plans_.size() >= max_plans) plans_.pop_back();
        const auto make = [&] {
            return std::make_unique<Plan>(shape, inputs, types_, latents_, *backbone_, *decoder_, *stream_);
        };
        std::unique_ptr<Plan> plan;
        try {
            plan = make();
        } catch (const Error &e) {
            if (e.status != ARCFLOW_OUT_OF_MEMORY || plans_.empty()) throw;
            plans_.clear();
            plan = make();
        }
        plans_.push_front(std::move(plan));
        return *plans_.front();
    }

    std::shared_ptr<const cuda::Device> device_;
    std::shared_ptr<TrtSession> backbone_, decoder_;
    PlanTypes types_;
    Latents latents_;
    std::mutex mutex_;
    std::unique_ptr<Kernels> kernels_;
    std::unique_ptr<cuda::Stream> stream_;
    std::list<std::unique_ptr<Plan>> plans_;  // most recently used first
    std::atomic<bool> logged_{false};
};

}  // namespace

std::unique_ptr<Denoiser> make_trt_denoiser(std::shared_ptr<const cuda::Device> device,
                                            std::shared_ptr<TrtSession> backbone, std::shared_ptr<TrtSession> decoder,
                                            const Manifest &manifest) {
    return std::make_unique<TrtDenoiser>(std::move(device), std::move(backbone), std::move(decoder), manifest);
}

}  // namespace arcflow
