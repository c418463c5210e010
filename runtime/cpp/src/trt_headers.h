// What the files that are compiled with TensorRT's headers share.
#pragma once

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <memory>
#include <mutex>
#include <string>

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

// Keeps what TensorRT said of a failure, for the error that follows it.
class TrtLogger : public nv::ILogger {
public:
    void log(Severity severity, const nv::AsciiChar *message) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            last_ = message;
        } catch (...) {  // the text is lost, the failure is not
        }
    }

    // ": <text>" of the last error and forget it, "" if there was none.
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

// An engine that was loaded and checked, with its weights. `cache` is null for none.
std::unique_ptr<TrtSession> make_trt_session(std::string part, std::unique_ptr<nv::ICudaEngine> engine,
                                             std::shared_ptr<RuntimeCache> cache, std::shared_ptr<TrtLogger> logger);

// The refitter of an engine of `part`, which must outlive it; the library has one. Throws Error where it makes none.
std::unique_ptr<TrtRefitter> make_trt_refitter(const TrtLibrary &library, nv::ICudaEngine &engine,
                                               const std::string &part, std::shared_ptr<TrtLogger> logger);

#ifdef TRT_MAJOR_RTX
std::unique_ptr<CompiledKernels> make_trt_kernels(std::unique_ptr<nv::IRuntimeCache> cache,
                                                  std::shared_ptr<TrtLogger> logger);
#endif

}  // namespace arcflow
