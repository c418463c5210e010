// The engines of a bundle. The memory mode says which stay loaded; the others are loaded for each use.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "stopwatch.h"

namespace arcflow {

// Safe to use from several threads. The constructor loads the parts that stay loaded.
class Parts : public PartSource {
public:
    // Without `mode`, the backend's fitting_memory. Throws Error if the backend cannot run the bundle or load a part.
    // `bundle` must outlive this object.
    Parts(const Bundle &bundle, std::unique_ptr<Backend> backend, std::optional<MemoryMode> mode);

    MemoryMode mode() const { return mode_; }
    bool keeps(const std::string &part) const override { return arcflow::keeps(mode_, part); }
    std::shared_ptr<Engine> borrow(const std::string &part) override;

    // A part that stays loaded while this object lives.
    class Use {
    public:
        // `tensor` converted to the dtype of this input (B9).
        Tensor cast(const std::string &input, Tensor tensor) const;

        // Run the part on inputs that `cast` returned. The time is added to "engines" in `watch`.
        Tensors run(const Tensors &inputs, Stopwatch &watch);

        // Move an output out of `outputs` and check its shape, where -1 stands for any size. Throws
        // Error(ARCFLOW_ENGINE_ERROR).
        Tensor take(Tensors &outputs, const std::string &name, const std::vector<int64_t> &shape) const;

    private:
        friend class Parts;
        Use(const std::string &name, const Part &part, const Tensors *slots, std::shared_ptr<Engine> engine)
            : name_(name), part_(part), slots_(slots), engine_(std::move(engine)) {}

        const std::string &name_;
        const Part &part_;
        const Tensors *slots_;
        std::shared_ptr<Engine> engine_;
    };

    // `slots` are inputs of the part's LoRA slots, which must outlive the Use; null for none. Throws as `borrow` does.
    Use use(const std::string &part, const Tensors *slots = nullptr);

    // The backend's Denoiser; null if it has none.
    Denoiser *denoiser() const { return denoiser_.get(); }

private:
    const Bundle &bundle_;
    std::unique_ptr<Backend> backend_;
    const MemoryMode mode_;
    std::map<std::string, std::unique_ptr<Engine>> engines_;  // those that stay loaded
    std::mutex turn_;                                         // held while a part that does not stay loaded is in use
    std::unique_ptr<Denoiser> denoiser_;
};

}  // namespace arcflow
