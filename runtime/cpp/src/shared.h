// A pipeline that several threads of a C program use and close.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "error.h"
#include "pipeline.h"

namespace arcflow {

// A pipeline, and the count of its running calls.
class Shared {
    std::unique_ptr<Pipeline> pipeline_;

public:
    Shared(const std::filesystem::path &bundle, const LoadOptions &options)
        : pipeline_(std::make_unique<Pipeline>(bundle, options)), memory(pipeline_->memory()) {}

    Images generate(const arcflow_request &request, const std::vector<ScaledLora> &loras) {
        const Call call(*this, "arcflow_generate");
        return pipeline_->generate(request, loras);
    }

    std::shared_ptr<const Lora> open_lora(const std::filesystem::path &path) {
        const Call call(*this, "arcflow_lora_open");
        return pipeline_->open_lora(path);
    }

    void forget_lora(const Lora &lora) {
        const std::lock_guard lock(lock_);
        if (pipeline_) pipeline_->forget_lora(lora);
    }

    // Refuse new calls, wait for running calls, then free the pipeline. Inside a callback this call is itself running
    // and would wait forever, so the running call frees the pipeline when it ends.
    void close() {
        std::unique_lock lock(lock_);
        closed_ = true;
        if (in_this_thread()) {
            abandoned_ = true;
            return;
        }
        idle_.wait(lock, [&] { return calls_ == 0; });
        pipeline_.reset();
    }

    const MemoryMode memory;

    static Error closed() {
        return {ARCFLOW_CLOSED, "pipeline was closed, or is not a pipeline; open it again with arcflow_open"};
    }

private:
    // Registers a running call. Throws Error if the pipeline is closed or this thread already runs a call on it.
    class Call {
    public:
        Call(Shared &shared, const std::string &function) : shared_(shared) {
            if (shared.in_this_thread()) {
                throw request_error(function + " must not be called by on_step on the pipeline that called it; call "
                                               "it after on_step has returned, or on another pipeline");
            }
            in_progress().reserve(in_progress().size() + 1);
            const std::lock_guard lock(shared.lock_);
            if (shared.closed_) throw closed();
            ++shared.calls_;
            in_progress().push_back(&shared);
        }
        Call(const Call &) = delete;
        Call &operator=(const Call &) = delete;
        ~Call() {
            in_progress().pop_back();
            const std::lock_guard lock(shared_.lock_);
            if (--shared_.calls_ > 0) return;
            if (shared_.abandoned_) shared_.pipeline_.reset();
            shared_.idle_.notify_all();
        }

    private:
        Shared &shared_;
    };

    static std::vector<const Shared *> &in_progress() {
        thread_local std::vector<const Shared *> calls;
        return calls;
    }
    bool in_this_thread() const {
        const auto &calls = in_progress();
        return std::find(calls.begin(), calls.end(), this) != calls.end();
    }

    std::mutex lock_;
    std::condition_variable idle_;
    int calls_ = 0;
    bool closed_ = false, abandoned_ = false;
};

}  // namespace arcflow
