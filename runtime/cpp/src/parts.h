// Keeps a bundle's parts open, or opens each only while it is used.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"
#include "stopwatch.h"

namespace arcflow {

// The engines of one bundle; safe to use from several threads. With `keep`, all are opened by the constructor and stay
// open. Without, a part is opened for each use, and one is in memory at a time: other threads wait.
class Parts {
public:
    // Throws Error if the backend cannot run the bundle or open a part. `bundle` must outlive the object.
    Parts(const Bundle &bundle, std::unique_ptr<Backend> backend, bool keep);

    // One part, open as long as this lives.
    class Use {
    public:
        // `tensor` in the dtype that the part takes under this name (B9).
        Tensor cast(const std::string &input, Tensor tensor) const;

        // Runs the part on inputs that `cast` gave. Its time counts as "engines" of `watch`.
        Tensors run(const Tensors &inputs, Stopwatch &watch);

        // The output of this name, which must have this shape, where -1 is any size. Throws Error(ENGINE_ERROR).
        Tensor take(Tensors &outputs, const std::string &name, const std::vector<int64_t> &shape) const;

    private:
        friend class Parts;
        Use(const std::string &name, const Part &part) : name_(name), part_(part) {}

        const std::string &name_;
        const Part &part_;
        std::unique_lock<std::mutex> alone_;
        std::unique_ptr<Engine> opened_;  // after alone_, so that it is closed before another part may open
        Engine *engine_ = nullptr;
    };

    // Throws Error if the part cannot be opened.
    Use use(const std::string &part);

private:
    const Bundle &bundle_;
    std::unique_ptr<Backend> backend_;
    bool keep_;
    std::map<std::string, std::unique_ptr<Engine>> engines_;
    std::mutex alone_;
};

}  // namespace arcflow
