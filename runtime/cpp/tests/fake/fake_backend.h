// A backend whose engines record their inputs, and a denoiser, for tests of the pipeline.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "../noise_of.h"
#include "fake_outputs.h"
#include "pipeline.h"

// What the engines were asked, and how they answer.
struct Log {
    std::vector<std::string> opens, runs;
    std::vector<arcflow::Tensors> inputs;  // of each run
    std::set<std::string> open;
    std::size_t most_open = 0;
    float mean = 0.5f;
    uint8_t colour_step = 1;  // difference from each byte to the next
    std::function<void(const std::string &, arcflow::Tensors &)> spoil;
    bool has_denoiser = false;
    std::vector<arcflow::DenoiseJob> denoised;

    std::vector<arcflow::Tensors> of(const std::string &part) const {
        std::vector<arcflow::Tensors> out;
        for (std::size_t i = 0; i < runs.size(); ++i)
            if (runs[i] == part) out.push_back(inputs[i]);
        return out;
    }
};

class FakeEngine : public arcflow::Engine {
public:
    FakeEngine(Log &log, const arcflow::Bundle &bundle, const std::string &part)
        : log_(log), manifest_(bundle.manifest), part_(part) {
        log_.opens.push_back(part);
        log_.open.insert(part);
        log_.most_open = std::max(log_.most_open, log_.open.size());
    }
    ~FakeEngine() override { log_.open.erase(part_); }

    arcflow::Tensors run(const arcflow::Tensors &inputs) override {
        CHECK(log_.open.count(part_) == 1);
        log_.runs.push_back(part_);
        log_.inputs.push_back(inputs);
        arcflow::Tensors out = fake_outputs(manifest_, part_, inputs, log_.mean, log_.colour_step);
        if (log_.spoil) log_.spoil(part_, out);
        return out;
    }

private:
    Log &log_;
    const arcflow::Manifest &manifest_;
    std::string part_;
};

// Times of a device so fast that the host takes longer.
inline const std::vector<std::pair<std::string, double>> device_ms = {
    {"copy", 1e-6}, {"backbone", 4e-6}, {"update", 2e-6}, {"decode", 3e-6}};

// Changes the noise by the same constant velocity as FakeEngine.
class FakeDenoiser : public arcflow::Denoiser {
public:
    FakeDenoiser(Log &log, const arcflow::Latents &latents) : log_(log), latents_(latents) {}

    arcflow::Denoised run(const arcflow::DenoiseJob &job, const arcflow::OnStep &on_step) override {
        log_.denoised.push_back(job);
        arcflow::Denoised out{noise_of(job, latents_), {}, device_ms};
        const auto steps = static_cast<int64_t>(job.timesteps.size());
        for (int64_t step = 0; step < steps; ++step) {
            const auto place = static_cast<std::size_t>(step);
            const auto fall = static_cast<float>(job.sigmas[place] - job.sigmas[place + 1]);
            for (int64_t i = 0; i < out.latents.count(); ++i) out.latents.as<float>()[i] -= log_.mean * fall;
            if (on_step) on_step(step, out.latents);
        }
        if (job.pixels) {
            out.pixels =
                arcflow::Tensor(arcflow::DType::uint8, {out.latents.shape[0], job.height * 16, job.width * 16, 3});
            for (int64_t i = 0; i < out.pixels.count(); ++i)
                out.pixels.as<uint8_t>()[i] = static_cast<uint8_t>(i * log_.colour_step);
        }
        return out;
    }

private:
    Log &log_;
    const arcflow::Latents latents_;
};

class FakeBackend : public arcflow::Backend {
public:
    explicit FakeBackend(Log &log) : log_(log) {}
    void check(const arcflow::Bundle &) override {}
    std::unique_ptr<arcflow::Engine> open(const arcflow::Bundle &bundle, const std::string &part) override {
        return std::make_unique<FakeEngine>(log_, bundle, part);
    }
    std::unique_ptr<arcflow::Denoiser> open_denoiser(const arcflow::Bundle &bundle, arcflow::PartSource &) override {
        if (!log_.has_denoiser) return nullptr;
        return std::make_unique<FakeDenoiser>(log_, bundle.manifest.latents);
    }

private:
    Log &log_;
};

inline std::unique_ptr<arcflow::Pipeline> open(const char *root, Log &log,
                                               std::optional<arcflow::MemoryMode> memory = {}) {
    return std::make_unique<arcflow::Pipeline>(arcflow::Bundle::open(root, false), std::make_unique<FakeBackend>(log),
                                               memory);
}
