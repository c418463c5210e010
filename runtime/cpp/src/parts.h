// The engines of a bundle: all kept open, or each opened only while it is used.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"
#include "stopwatch.h"

namespace arcflow {

// Safe to use from several threads. With `keep` the constructor opens all parts. Without, `use` opens a part each time,
// and only one part is in memory at a time: other threads wait.
class Parts {
public:
    // Throws Error if the backend cannot run the bundle or open a part. `bundle` must outlive this object.
    Parts(const Bundle &bundle, std::unique_ptr<Backend> backend, bool keep);

    // A part that stays open while this object lives.
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
        Use(const std::string &name, const Part &part, const Tensors *slots)
            : name_(name), part_(part), slots_(slots) {}

        const std::string &name_;
        const Part &part_;
        const Tensors *slots_;
        std::unique_lock<std::mutex> alone_;
        std::unique_ptr<Engine> opened_;  // declared after alone_, so it is closed before the lock is released
        Engine *engine_ = nullptr;
    };

    // Open a part, or use the open one. `slots` are inputs of its LoRA slots, which must outlive the Use; null for
    // none. Throws Error if it cannot be opened.
    Use use(const std::string &part, const Tensors *slots = nullptr);

    // The backend's Denoiser; null if it has none or parts are not kept open.
    Denoiser *denoiser() const { return denoiser_.get(); }

private:
    const Bundle &bundle_;
    std::unique_ptr<Backend> backend_;
    bool keep_;
    std::map<std::string, std::unique_ptr<Engine>> engines_;
    std::unique_ptr<Denoiser> denoiser_;
    std::mutex alone_;
};

}  // namespace arcflow
