// Loads engines from their files, checks their inputs and outputs, and fills in missing weights.
#include <algorithm>
#include <set>
#include <utility>

#include "error.h"
#include "mapped_file.h"
#include "trt_headers.h"

namespace arcflow {
namespace {

nv::DataType data_type(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return nv::DataType::kFLOAT;
        case DType::float16:
            return nv::DataType::kHALF;
        case DType::bfloat16:
            return nv::DataType::kBF16;
        case DType::int64:
            return nv::DataType::kINT64;
        case DType::uint8:
            return nv::DataType::kUINT8;
    }
    throw Error(ARCFLOW_INTERNAL_ERROR, "a tensor's dtype is none of the known ones");
}

// Check names and dtypes of the engine's inputs or outputs against the manifest.
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
    Runtime(const TrtLibrary &library, const cuda::Gpu &gpu)
        : library_(library), gpu_(gpu), logger_(std::make_shared<TrtLogger>()) {
        runtime_.reset(static_cast<nv::IRuntime *>(library.create_runtime(logger_.get(), NV_TENSORRT_VERSION)));
        if (!runtime_) {
            throw engine_error(std::string(name_of(trt_flavour)) + " " + library_.version.text() + " cannot start" +
                               logger_->take());
        }
    }

    std::unique_ptr<TrtSession> load(const BuiltEngine &built, const Bundle &bundle) override {
        const std::string &part = built.record.key.part;
        const Part &spec = bundle.manifest.parts.at(part);
        const auto &flags = built.record.key.flags;
        const bool stripped = std::find(flags.begin(), flags.end(), "STRIP_PLAN") != flags.end();
        if (stripped) check_can_refit(library_, trt_flavour, part);
        std::unique_ptr<nv::ICudaEngine> engine = deserialize(built);
        std::vector<TensorSpec> inputs = spec.inputs;
        for (TensorSpec &slot : spec.slot_inputs()) inputs.push_back(std::move(slot));
        check_tensors(*engine, part, inputs, nv::TensorIOMode::kINPUT);
        check_tensors(*engine, part, spec.outputs, nv::TensorIOMode::kOUTPUT);
        if (stripped) {
            const auto refitter = make_trt_refitter(library_, *engine, part, logger_);
            refit(*refitter, bundle, part);
        }
        return make_trt_session(part, std::move(engine), built.record.allocates_when_run, cache_of(built.record),
                                logger_);
    }

private:
    std::unique_ptr<nv::ICudaEngine> deserialize(const BuiltEngine &built) {
        const MappedFile file(built.path, built.record.bytes);
        std::unique_ptr<nv::ICudaEngine> engine(runtime_->deserializeCudaEngine(file.data, file.bytes));
        if (engine) return engine;
        const Error error = logged_error(built.record.key.part + ": " + name_of(trt_flavour) + " " +
                                             library_.version.text() + " cannot load " + built.path.string(),
                                         logger_->take());
        if (error.status == ARCFLOW_OUT_OF_MEMORY) throw error;
        throw engine_error(std::string(error.what()) + "; build it again with `arcflow build`");
    }

    // The cache for what TensorRT-RTX compiles at run time; null for TensorRT, which compiles when it builds the
    // engine.
    std::shared_ptr<RuntimeCache> cache_of(const EngineRecord &record) const {
        const auto folder = cache_folder();
        if (trt_flavour != TrtFlavour::tensorrt_rtx || !folder) return nullptr;
        const std::vector<std::string> key = {record.sha256, record.key.builder_version, gpu_.driver, gpu_.name};
        return std::make_shared<RuntimeCache>(RuntimeCacheFile(key, *folder));
    }

    TrtLibrary library_;
    cuda::Gpu gpu_;
    std::shared_ptr<TrtLogger> logger_;
    std::unique_ptr<nv::IRuntime> runtime_;
};

}  // namespace

TrtFlavour trt_headers_flavour() { return trt_flavour; }

TrtVersion trt_headers_version() {
    return {NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH, NV_TENSORRT_BUILD};
}

std::unique_ptr<TrtRuntime> make_trt_runtime(const TrtLibrary &library, const cuda::Gpu &gpu) {
    return std::make_unique<Runtime>(library, gpu);
}

}  // namespace arcflow
