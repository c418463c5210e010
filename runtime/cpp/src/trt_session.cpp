// Makes execution contexts of a TensorRT engine, and runs them.
#include "trt_session.h"

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "error.h"
#include "trt_headers.h"
#include "trt_shapes.h"

namespace arcflow {
namespace {

nv::Dims to_dims(const std::vector<int64_t> &shape) {
    nv::Dims dims{};
    dims.nbDims = static_cast<int32_t>(std::min<size_t>(shape.size(), nv::Dims::MAX_DIMS));
    for (int32_t i = 0; i < dims.nbDims; ++i) dims.d[i] = shape[static_cast<size_t>(i)];
    return dims;
}

std::vector<int64_t> from_dims(const nv::Dims &dims) {
    return std::vector<int64_t>(dims.d, dims.d + std::max(dims.nbDims, 0));
}

class Context : public TrtContext {
public:
    Context(std::string part, std::unique_ptr<nv::IExecutionContext> context, cuda::Stream &stream,
            const char *obstacle, std::shared_ptr<RuntimeCache> cache, std::shared_ptr<TrtLogger> logger)
        : part_(std::move(part)),
          context_(std::move(context)),
          stream_(static_cast<cudaStream_t>(stream.handle)),
          obstacle_(obstacle),
          cache_(std::move(cache)),
          logger_(std::move(logger)) {}

    size_t workspace_bytes() override { return context_->updateDeviceMemorySizeForShapes(); }

    void use_workspace(cuda::Address address, size_t bytes) override {
        context_->setDeviceMemoryV2(reinterpret_cast<void *>(address), static_cast<int64_t>(bytes));
    }

    std::vector<int64_t> shape(const std::string &tensor) override {
        return from_dims(context_->getTensorShape(tensor.c_str()));
    }

    void bind(const std::string &tensor, cuda::Address address) override {
        if (!context_->setTensorAddress(tensor.c_str(), reinterpret_cast<void *>(address))) fail("bind " + tensor);
    }

    std::string obstacle() override {
        if (*obstacle_ != '\0') return obstacle_;
#if defined(TRT_MAJOR_RTX) && (TRT_MAJOR_RTX > 1 || TRT_MINOR_RTX >= 5)
        // Versions before 1.5 lack this function; with them, the capture itself fails.
        if (!context_->isStreamCapturable(stream_))
            return std::string(name_of(trt_flavour)) + " says that its work cannot be captured";
#endif
        return "";
    }

    void enqueue() override {
        if (!cache_) return run();
        // The first run compiles kernels, so it needs the cache's lock.
        const std::shared_ptr<RuntimeCache> cache = std::move(cache_);
        const std::lock_guard<std::mutex> lock(cache->mutex);
        run();
        cache->save();
    }

private:
    void run() {
        if (!context_->enqueueV3(stream_)) fail("run");
    }

    [[noreturn]] void fail(const std::string &what) {
        throw logged_error(part_ + ": " + name_of(trt_flavour) + " cannot " + what, logger_->take());
    }

    std::string part_;
    std::unique_ptr<nv::IExecutionContext> context_;
    cudaStream_t stream_;
    const char *obstacle_;                 // of every run of this engine
    std::shared_ptr<RuntimeCache> cache_;  // null after the first run
    std::shared_ptr<TrtLogger> logger_;
};

class Session : public TrtSession {
public:
    Session(std::string part, std::unique_ptr<nv::ICudaEngine> engine, bool allocates,
            std::shared_ptr<RuntimeCache> cache, std::shared_ptr<TrtLogger> logger)
        : part_(std::move(part)),
          engine_(std::move(engine)),
          allocates_(allocates),
          cache_(std::move(cache)),
          logger_(std::move(logger)) {
        profiles_ = read_profiles();
        streams_weights_ = engine_->getStreamableWeightsSize() > 0;
        if (streams_weights_ && !engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget()))
            throw engine_error(part_ + ": no memory is left to stream weights through" + logger_->take());
    }

    ~Session() override {
        if (!cache_) return;
        try {
            const std::lock_guard<std::mutex> lock(cache_->mutex);
            cache_->save();
            cache_->close();
        } catch (const std::exception &) {  // what was compiled is lost, and the next run compiles again
        }
    }

    std::unique_ptr<TrtContext> context(const Shapes &inputs, cuda::Stream &stream) override {
        std::string wrong;
        const int32_t profile = fitting_profile(part_, profiles_, inputs, wrong);
        if (profile < 0) throw engine_error(wrong);
        const std::lock_guard<std::mutex> lock(cache_ ? cache_->mutex : mutex_);
        std::unique_ptr<nv::IExecutionContext> context = make_context();
        const auto handle = static_cast<cudaStream_t>(stream.handle);
        bool set = context != nullptr && context->setOptimizationProfileAsync(profile, handle);
        if (set) stream.wait();
        for (const auto &[name, shape] : inputs) set = set && context->setInputShape(name.c_str(), to_dims(shape));
        if (!set) {
            throw logged_error(part_ + ": " + name_of(trt_flavour) + " cannot make an execution context",
                               logger_->take());
        }
        const char *const obstacle = streams_weights_ ? "its weights are streamed from the host"
                                     : allocates_     ? "it allocates memory in each run"
                                                      : "";
        return std::make_unique<Context>(part_, std::move(context), stream, obstacle, cache_, logger_);
    }

    std::string misfit(const Shapes &inputs) override {
        std::string wrong;
        fitting_profile(part_, profiles_, inputs, wrong);
        return wrong;
    }

private:
    // The shapes that each of the engine's profiles takes.
    std::vector<Profile> read_profiles() const {
        std::vector<Profile> profiles(static_cast<size_t>(engine_->getNbOptimizationProfiles()));
        for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char *name = engine_->getIOTensorName(i);
            if (engine_->getTensorIOMode(name) != nv::TensorIOMode::kINPUT) continue;
            for (size_t profile = 0; profile < profiles.size(); ++profile) {
                const auto shape = [&](nv::OptProfileSelector which) {
                    return from_dims(engine_->getProfileShape(name, static_cast<int32_t>(profile), which));
                };
                profiles[profile][name] = {shape(nv::OptProfileSelector::kMIN), shape(nv::OptProfileSelector::kOPT),
                                           shape(nv::OptProfileSelector::kMAX)};
            }
        }
        return profiles;
    }

    std::unique_ptr<nv::IExecutionContext> make_context() {
        const auto scratch = nv::ExecutionContextAllocationStrategy::kUSER_MANAGED;
#ifdef TRT_MAJOR_RTX
        // Compile the kernels for a shape before it runs, so that they are in the captured graph. This library makes
        // its own graphs.
        const std::unique_ptr<nv::IRuntimeConfig> config(engine_->createRuntimeConfig());
        if (config == nullptr) return nullptr;
        config->setExecutionContextAllocationStrategy(scratch);
        config->setDynamicShapesKernelSpecializationStrategy(nv::DynamicShapesKernelSpecializationStrategy::kEAGER);
        config->setCudaGraphStrategy(nv::CudaGraphStrategy::kDISABLED);
        if (cache_) use_cache(*config);
        return std::unique_ptr<nv::IExecutionContext>(engine_->createExecutionContext(config.get()));
#else
        return std::unique_ptr<nv::IExecutionContext>(engine_->createExecutionContext(scratch));
#endif
    }

#ifdef TRT_MAJOR_RTX
    // If the cache cannot be used, the context compiles everything itself.
    void use_cache(nv::IRuntimeConfig &config) {
        if (kernels_ == nullptr) {
            std::unique_ptr<nv::IRuntimeCache> made(config.createRuntimeCache());
            kernels_ = made.get();
            cache_->open(made ? make_trt_kernels(std::move(made), logger_) : nullptr);
        }
        if (kernels_ == nullptr || !config.setRuntimeCache(*kernels_)) logger_->take();
    }

    const nv::IRuntimeCache *kernels_ = nullptr;  // owned by cache_
#endif

    std::string part_;
    std::unique_ptr<nv::ICudaEngine> engine_;
    std::vector<Profile> profiles_;
    bool allocates_, streams_weights_ = false;
    std::shared_ptr<RuntimeCache> cache_;
    std::shared_ptr<TrtLogger> logger_;
    std::mutex mutex_;  // makes contexts one at a time if there is no cache, which has its own mutex
};

}  // namespace

std::unique_ptr<TrtSession> make_trt_session(std::string part, std::unique_ptr<nv::ICudaEngine> engine, bool allocates,
                                             std::shared_ptr<RuntimeCache> cache, std::shared_ptr<TrtLogger> logger) {
    return std::make_unique<Session>(std::move(part), std::move(engine), allocates, std::move(cache),
                                     std::move(logger));
}

}  // namespace arcflow
