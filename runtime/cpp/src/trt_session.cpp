#include "trt_session.h"

#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <set>

#include "error.h"

namespace arcflow {
namespace {

namespace nv = nvinfer1;

#ifdef TRT_MAJOR_RTX
constexpr TrtFlavour flavour = TrtFlavour::tensorrt_rtx;
#else
constexpr TrtFlavour flavour = TrtFlavour::tensorrt;
#endif

// Keeps what TensorRT said of a failure, for the error that follows it.
class Logger : public nv::ILogger {
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

nv::Dims to_dims(const std::vector<int64_t> &shape) {
    nv::Dims dims{};
    dims.nbDims = static_cast<int32_t>(std::min<size_t>(shape.size(), nv::Dims::MAX_DIMS));
    for (int32_t i = 0; i < dims.nbDims; ++i) dims.d[i] = shape[static_cast<size_t>(i)];
    return dims;
}

std::vector<int64_t> from_dims(const nv::Dims &dims) {
    return std::vector<int64_t>(dims.d, dims.d + std::max(dims.nbDims, 0));
}

std::string text_of(const std::vector<int64_t> &shape) {
    std::string text = "[";
    for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

nv::DataType data_type(DType dtype) {
    switch (dtype) {
        case DType::float32: return nv::DataType::kFLOAT;
        case DType::float16: return nv::DataType::kHALF;
        case DType::bfloat16: return nv::DataType::kBF16;
        case DType::int64: return nv::DataType::kINT64;
        case DType::uint8: return nv::DataType::kUINT8;
    }
    throw Error(ARCFLOW_INTERNAL_ERROR, "a tensor's dtype is none of the known ones");
}

class Context : public TrtContext {
public:
    Context(std::string part, std::unique_ptr<nv::IExecutionContext> context, cuda::Stream &stream,
            bool streams_weights, std::shared_ptr<Logger> logger)
        : part_(std::move(part)),
          context_(std::move(context)),
          stream_(static_cast<cudaStream_t>(stream.handle)),
          streams_weights_(streams_weights),
          logger_(std::move(logger)) {}

    size_t scratch_bytes() override { return context_->updateDeviceMemorySizeForShapes(); }

    void use_scratch(cuda::Address address, size_t bytes) override {
        context_->setDeviceMemoryV2(reinterpret_cast<void *>(address), static_cast<int64_t>(bytes));
    }

    std::vector<int64_t> shape(const std::string &tensor) override {
        return from_dims(context_->getTensorShape(tensor.c_str()));
    }

    void bind(const std::string &tensor, cuda::Address address) override {
        if (!context_->setTensorAddress(tensor.c_str(), reinterpret_cast<void *>(address))) fail("bind " + tensor);
    }

    bool capturable() override {
#if defined(TRT_MAJOR_RTX) && (TRT_MAJOR_RTX > 1 || TRT_MINOR_RTX >= 5)
        // Before 1.5 only the attempt tells.
        if (!context_->isStreamCapturable(stream_)) return false;
#endif
        return !streams_weights_;
    }

    void enqueue() override {
        if (!context_->enqueueV3(stream_)) fail("run");
    }

private:
    [[noreturn]] void fail(const std::string &what) {
        throw engine_error(part_ + ": " + name_of(flavour) + " cannot " + what + logger_->take());
    }

    std::string part_;
    std::unique_ptr<nv::IExecutionContext> context_;
    cudaStream_t stream_;
    bool streams_weights_;
    std::shared_ptr<Logger> logger_;
};

class Session : public TrtSession {
public:
    Session(std::string part, std::unique_ptr<nv::ICudaEngine> engine, std::shared_ptr<Logger> logger)
        : part_(std::move(part)), engine_(std::move(engine)), logger_(std::move(logger)) {
        streams_weights_ = engine_->getStreamableWeightsSize() > 0;
        if (streams_weights_ && !engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget())) {
            throw engine_error(part_ + ": no memory is left to stream weights through" + logger_->take());
        }
    }

    std::unique_ptr<TrtContext> context(const Shapes &inputs, cuda::Stream &stream) override {
        const int32_t profile = profile_for(inputs);
        const std::lock_guard<std::mutex> lock(mutex_);
        std::unique_ptr<nv::IExecutionContext> context = make_context();
        const auto handle = static_cast<cudaStream_t>(stream.handle);
        bool set = context != nullptr && context->setOptimizationProfileAsync(profile, handle);
        if (set) stream.wait();
        for (const auto &[name, shape] : inputs) set = set && context->setInputShape(name.c_str(), to_dims(shape));
        if (!set) {
            throw engine_error(part_ + ": " + name_of(flavour) + " cannot make an execution context" + logger_->take());
        }
        return std::make_unique<Context>(part_, std::move(context), stream, streams_weights_, logger_);
    }

    int64_t largest(const std::string &input, size_t axis) override {
        int64_t found = 0;
        for (int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
            const auto most = profile_shape(input, profile, nv::OptProfileSelector::kMAX);
            if (axis < most.size()) found = std::max(found, most[axis]);
        }
        return found;
    }

private:
    std::vector<int64_t> profile_shape(const std::string &input, int32_t profile, nv::OptProfileSelector which) const {
        return from_dims(engine_->getProfileShape(input.c_str(), profile, which));
    }

    bool takes(int32_t profile, const std::string &input, const std::vector<int64_t> &shape) const {
        const auto least = profile_shape(input, profile, nv::OptProfileSelector::kMIN);
        const auto most = profile_shape(input, profile, nv::OptProfileSelector::kMAX);
        bool fits = shape.size() == least.size() && shape.size() == most.size();
        for (size_t i = 0; fits && i < shape.size(); ++i) fits = least[i] <= shape[i] && shape[i] <= most[i];
        return fits;
    }

    int32_t profile_for(const Shapes &inputs) const {
        std::string misfit;
        for (int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
            const auto bad = std::find_if(inputs.begin(), inputs.end(), [&](const auto &input) {
                return !takes(profile, input.first, input.second);
            });
            if (bad == inputs.end()) return profile;
            misfit += std::string(misfit.empty() ? "" : "; ") + bad->first + " of " + text_of(bad->second) +
                      " is not " + text_of(profile_shape(bad->first, profile, nv::OptProfileSelector::kMIN)) + " to " +
                      text_of(profile_shape(bad->first, profile, nv::OptProfileSelector::kMAX));
        }
        throw engine_error(part_ + ": the engine was not built for these shapes (" + misfit +
                           "); build it with `arcflow build --resolutions` and `--batch` that hold them");
    }

    std::unique_ptr<nv::IExecutionContext> make_context() {
        const auto scratch = nv::ExecutionContextAllocationStrategy::kUSER_MANAGED;
#ifdef TRT_MAJOR_RTX
        // Kernels for a shape are compiled before it runs, so that a captured graph has them; graphs are our own.
        const std::unique_ptr<nv::IRuntimeConfig> config(engine_->createRuntimeConfig());
        if (config == nullptr) return nullptr;
        config->setExecutionContextAllocationStrategy(scratch);
        config->setDynamicShapesKernelSpecializationStrategy(nv::DynamicShapesKernelSpecializationStrategy::kEAGER);
        config->setCudaGraphStrategy(nv::CudaGraphStrategy::kDISABLED);
        return std::unique_ptr<nv::IExecutionContext>(engine_->createExecutionContext(config.get()));
#else
        return std::unique_ptr<nv::IExecutionContext>(engine_->createExecutionContext(scratch));
#endif
    }

    std::string part_;
    std::unique_ptr<nv::ICudaEngine> engine_;
    std::shared_ptr<Logger> logger_;
    bool streams_weights_ = false;
    std::mutex mutex_;  // contexts are made one at a time
};

// A file mapped for reading.
class Mapped {
public:
    explicit Mapped(const BuiltEngine &engine) : bytes(engine.record.bytes) {
        const int file = ::open(engine.path.c_str(), O_RDONLY | O_CLOEXEC);
        void *found = file < 0 ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
        if (file >= 0) ::close(file);
        if (found == MAP_FAILED) throw engine_error(engine.path.string() + " cannot be read; check its permissions");
        data = found;
    }
    ~Mapped() { munmap(data, bytes); }
    Mapped(const Mapped &) = delete;
    Mapped &operator=(const Mapped &) = delete;

    size_t bytes;
    void *data = nullptr;
};

// The manifest's inputs or outputs, by name and dtype, against the engine's.
void check_tensors(const nv::ICudaEngine &engine, const std::string &part, const std::vector<TensorSpec> &specs,
                   nv::TensorIOMode mode) {
    const char *kind = mode == nv::TensorIOMode::kINPUT ? "inputs" : "outputs";
    std::set<std::string> wanted, found;
    for (const TensorSpec &spec : specs) wanted.insert(spec.name);
    for (int32_t i = 0; i < engine.getNbIOTensors(); ++i) {
        const char *name = engine.getIOTensorName(i);
        if (engine.getTensorIOMode(name) == mode) found.insert(name);
    }
    const auto list = [](const std::set<std::string> &names) {
        std::string text;
        for (const std::string &name : names) text += (text.empty() ? "" : ", ") + name;
        return text;
    };
    if (wanted != found) {
        throw engine_error(part + ": the " + kind + " of the engine must be " + list(wanted) +
                           ", as in the manifest, got " + list(found) + "; build it again with `arcflow build`");
    }
    for (const TensorSpec &spec : specs) {
        if (engine.getTensorDataType(spec.name.c_str()) != data_type(spec.dtype)) {
            throw engine_error(part + ": " + spec.name + " of the engine must be in " + name_of(spec.dtype) +
                               ", as in the manifest; build it again with `arcflow build`");
        }
    }
}

class Runtime : public TrtRuntime {
public:
    explicit Runtime(const TrtLibrary &library) : version_(library.version), logger_(std::make_shared<Logger>()) {
        runtime_.reset(static_cast<nv::IRuntime *>(library.create_runtime(logger_.get(), NV_TENSORRT_VERSION)));
        if (!runtime_) {
            throw engine_error(std::string(name_of(flavour)) + " " + version_.text() + " cannot start" +
                               logger_->take());
        }
    }

    std::unique_ptr<TrtSession> load(const BuiltEngine &built, const Part &spec) override {
        const std::string &part = built.record.key.part;
        const auto &flags = built.record.key.flags;
        if (std::find(flags.begin(), flags.end(), "STRIP_PLAN") != flags.end()) {
            throw engine_error(part + ": the engine has no weights, and this library does not refit it (E6); build it "
                               "again with `arcflow build` without --strip-weights");
        }
        const Mapped file(built);
        std::unique_ptr<nv::ICudaEngine> engine(runtime_->deserializeCudaEngine(file.data, file.bytes));
        if (!engine) {
            throw engine_error(part + ": " + name_of(flavour) + " " + version_.text() + " cannot load " +
                               built.path.string() + logger_->take() + "; build it again with `arcflow build`");
        }
        check_tensors(*engine, part, spec.inputs, nv::TensorIOMode::kINPUT);
        check_tensors(*engine, part, spec.outputs, nv::TensorIOMode::kOUTPUT);
        return std::make_unique<Session>(part, std::move(engine), logger_);
    }

private:
    TrtVersion version_;
    std::shared_ptr<Logger> logger_;
    std::unique_ptr<nv::IRuntime> runtime_;
};

}  // namespace

TrtFlavour trt_headers_flavour() { return flavour; }

TrtVersion trt_headers_version() {
    return {NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH, NV_TENSORRT_BUILD};
}

std::unique_ptr<TrtRuntime> make_trt_runtime(const TrtLibrary &library) { return std::make_unique<Runtime>(library); }

}  // namespace arcflow
