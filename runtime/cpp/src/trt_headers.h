// Shared declarations of the files that are compiled with TensorRT's headers.
#pragma once

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <memory>
#include <mutex>
#include <string>

#include "error.h"
#include "trt_refit.h"
#include "trt_runtime_cache.h"
#include "trt_session.h"

namespace arcflow {

namespace nv = nvinfer1;

#ifdef TRT_MAJOR_RTX
inline constexpr TrtFlavour trt_flavour = TrtFlavour::tensorrt_rtx;
#else
inline constexpr TrtFlavour trt_flavour = TrtFlavour::tensorrt;
#endif

// Keeps TensorRT's last error message for the text of our error.
class TrtLogger : public nv::ILogger {
public:
    void log(Severity severity, const nv::AsciiChar *message) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            last_ = message;
        } catch (...) {  // only the text is lost; the call that failed still reports it
        }
    }

    // Return ": <text>" of the last error and forget it; "" if there is none.
    std::string take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        const std::string text = last_.empty() ? "" : ": " + last_;
        last_.clear();
        return text;
    }

private:
    std::mutex mutex_;
    std::string last_;
};

// The error `text` with what the logger returned. Where that tells of memory, its status is ARCFLOW_OUT_OF_MEMORY.
inline Error logged_error(const std::string &text, const std::string &logged) {
    if (logged.find("emory") == std::string::npos) return engine_error(text + logged);
    return {ARCFLOW_OUT_OF_MEMORY, text + logged + "; " + save_memory};
}

// A session for a loaded and checked engine that has its weights. `allocates`: its record says that runs allocate
// memory. `cache` may be null.
std::unique_ptr<TrtSession> make_trt_session(std::string part, std::unique_ptr<nv::ICudaEngine> engine, bool allocates,
                                             std::shared_ptr<RuntimeCache> cache, std::shared_ptr<TrtLogger> logger);

// A refitter for `engine`, which must outlive it. The library must have one. Throws Error if it cannot make one.
std::unique_ptr<TrtRefitter> make_trt_refitter(const TrtLibrary &library, nv::ICudaEngine &engine,
                                               const std::string &part, std::shared_ptr<TrtLogger> logger);

#ifdef TRT_MAJOR_RTX
std::unique_ptr<CompiledKernels> make_trt_kernels(std::unique_ptr<nv::IRuntimeCache> cache,
                                                  std::shared_ptr<TrtLogger> logger);
#endif

}  // namespace arcflow
