// What the tests of the denoiser share: engines, lane and denoiser on the driver made of host memory, and the check of
// an image against the host.
#pragma once

#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "trt_denoiser.h"
#include "trt_engine.h"
#include "trt_parts.h"

namespace fake {

inline float largest_difference(const Tensor &a, const Tensor &b) {
    CHECK(a.shape == b.shape);
    float most = 0;
    for (int64_t i = 0; i < a.count(); ++i) most = std::fmax(most, std::fabs(a.as<float>()[i] - b.as<float>()[i]));
    return most;
}

// The parts of a manifest in a memory mode, with these sessions. `loads` has the parts that were loaded, in order.
class Source : public PartSource {
public:
    Source(const Manifest &manifest, std::shared_ptr<Lane> lane,
           std::map<std::string, std::shared_ptr<TrtSession>> sessions, MemoryMode mode)
        : manifest_(manifest), lane_(std::move(lane)), sessions_(std::move(sessions)), mode_(mode) {
        for (const auto &[part, session] : sessions_)
            if (arcflow::keeps(mode_, part)) kept_[part] = load(part);
    }

    bool keeps(const std::string &part) const override { return arcflow::keeps(mode_, part); }

    std::shared_ptr<Engine> borrow(const std::string &part) override {
        if (keeps(part)) return {std::shared_ptr<Engine>(), kept_.at(part).get()};
        struct Turn {
            std::unique_lock<std::mutex> lock;
            std::unique_ptr<Engine> engine;
        };
        const auto turn = std::make_shared<Turn>();
        turn->lock = std::unique_lock(turn_);
        turn->engine = load(part);
        return {turn, turn->engine.get()};
    }

    std::vector<std::string> loads;

private:
    std::unique_ptr<Engine> load(const std::string &part) {
        loads.push_back(part);
        return make_trt_engine(lane_, sessions_.at(part), part, manifest_.parts.at(part));
    }

    const Manifest &manifest_;
    std::shared_ptr<Lane> lane_;
    std::map<std::string, std::shared_ptr<TrtSession>> sessions_;
    MemoryMode mode_;
    std::mutex turn_;
    std::map<std::string, std::unique_ptr<Engine>> kept_;
};

// Engines, lane and denoiser. `conditioned`: dtype of the conditioner.
struct Setup {
    explicit Setup(DType dtype, DType conditioned, size_t max_plans = default_max_plans,
                   MemoryMode mode = MemoryMode::resident, int64_t max_rank = 0)
        : manifest(manifest_in(dtype, conditioned, max_rank)),
          lane(std::make_shared<Lane>(std::make_shared<const cuda::Device>())),
          conditioner(std::make_shared<Session>("conditioner", conditioned)),
          backbone(std::make_shared<Session>("backbone", dtype)),
          decoder(std::make_shared<Session>("vae_decoder", DType::float32)),
          source(manifest, lane, {{"conditioner", conditioner}, {"backbone", backbone}, {"vae_decoder", decoder}},
                 mode),
          denoiser(make_trt_denoiser(
              lane, source, [this](const std::string &part, const Shapes &inputs) { return of(part).misfit(inputs); },
              manifest, max_plans)) {}
    explicit Setup(DType dtype = DType::float32) : Setup(dtype, dtype) {}

    Denoised run(const DenoiseJob &job, const OnStep &on_step = {}) { return denoiser->run(job, on_step); }

    Session &of(const std::string &part) const {
        return part == "conditioner" ? *conditioner : part == "backbone" ? *backbone : *decoder;
    }

    Manifest manifest;
    std::shared_ptr<Lane> lane;
    std::shared_ptr<Session> conditioner, backbone, decoder;
    Source source;
    std::unique_ptr<Denoiser> denoiser;
};

// The kernels and the host's update differ by some units of 2^-24 in float32. A 16-bit input that was rounded the other
// way differs by an ulp, which changes the heads by about as much.
inline float bound(DType dtype) { return dtype == DType::float32 ? 1e-5f : dtype == DType::float16 ? 4e-3f : 4e-2f; }

inline void check_image(const Denoised &ours, const DenoiseJob &job, const Manifest &manifest) {
    const Denoised host = expected(job, manifest);
    const DType dtype = manifest.parts.at("backbone").inputs[0].dtype;
    CHECK(largest_difference(ours.latents, host.latents) <= bound(dtype));
    CHECK(ours.pixels.shape == host.pixels.shape);
    if (!job.pixels) return;
    Denoised again = expected(job, manifest);  // the pixels of exactly these latents
    decoder({{"latents", {ours.latents.shape[0], job.height, job.width, C}}},
            {{"latents", const_cast<std::byte *>(ours.latents.data.data())}, {"images", again.pixels.data.data()}});
    CHECK(ours.pixels.data == again.pixels.data);
}

inline bool same(const Denoised &a, const Denoised &b) {
    return a.latents.data == b.latents.data && a.pixels.data == b.pixels.data;
}

inline std::vector<double> even(size_t steps) {
    std::vector<double> sigmas;
    for (size_t i = 0; i <= steps; ++i) sigmas.push_back(1 - static_cast<double>(i) / static_cast<double>(steps));
    return sigmas;
}

}  // namespace fake

using namespace fake;

// The tests of trt_modes_test.cpp.
void test_loras_and_modes();
void test_failures_with_loras_and_modes();
