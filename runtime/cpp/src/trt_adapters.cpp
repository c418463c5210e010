// Adapts TensorRT's refitter and TensorRT-RTX's runtime cache to the library's interfaces.
#include <algorithm>
#include <utility>
#include <vector>

#include "error.h"
#include "trt_headers.h"

namespace arcflow {
namespace {

// TensorRT's types of weights, and their numbers in onnx.proto.
constexpr std::pair<nv::DataType, int64_t> weight_types[] = {
    {nv::DataType::kFLOAT, 1}, {nv::DataType::kUINT8, 2}, {nv::DataType::kINT8, 3},
    {nv::DataType::kINT32, 6}, {nv::DataType::kINT64, 7}, {nv::DataType::kBOOL, 9},
    {nv::DataType::kHALF, 10}, {nv::DataType::kBF16, 16}, {nv::DataType::kFP8, 17},
};

class Refitter : public TrtRefitter {
public:
    Refitter(const TrtLibrary &library, nv::ICudaEngine &engine, const std::string &part,
             std::shared_ptr<TrtLogger> logger)
        : logger_(std::move(logger)) {
        void *made = library.create_refitter(&engine, logger_.get(), NV_TENSORRT_VERSION);
        refitter_.reset(static_cast<nv::IRefitter *>(made));
        if (!refitter_) {
            throw engine_error(part + ": " + name_of(trt_flavour) + " cannot fill in the engine's weights" +
                               logger_->take() + "; build it again with `arcflow build`");
        }
    }

    std::vector<std::string> weights() override {
        return names([&](int32_t size, const char **out) { return refitter_->getAllWeights(size, out); });
    }

    WeightSpec spec(const std::string &name) override {
        const nv::Weights wanted = refitter_->getWeightsPrototype(name.c_str());
        for (const auto &[theirs, ours] : weight_types)
            if (theirs == wanted.type) return {ours, wanted.count};
        return {0, wanted.count};
    }

    bool set(const std::string &name, const WeightSpec &spec, const void *data) override {
        for (const auto &[theirs, ours] : weight_types)
            if (ours == spec.type) return refitter_->setNamedWeights(name.c_str(), {theirs, data, spec.count});
        return false;
    }

    std::vector<std::string> missing() override {
        return names([&](int32_t size, const char **out) { return refitter_->getMissingWeights(size, out); });
    }

    bool refit() override { return refitter_->refitCudaEngine(); }

    std::string said() override { return logger_->take(); }

private:
    // TensorRT returns the number of names; called with room for them it fills them in.
    template <class Get> static std::vector<std::string> names(Get get) {
        std::vector<const char *> found(static_cast<size_t>(std::max(get(0, nullptr), 0)));
        if (!found.empty()) get(static_cast<int32_t>(found.size()), found.data());
        return std::vector<std::string>(found.begin(), found.end());
    }

    std::shared_ptr<TrtLogger> logger_;
    std::unique_ptr<nv::IRefitter> refitter_;
};

#ifdef TRT_MAJOR_RTX
class Kernels : public CompiledKernels {
public:
    Kernels(std::unique_ptr<nv::IRuntimeCache> cache, std::shared_ptr<TrtLogger> logger)
        : cache_(std::move(cache)), logger_(std::move(logger)) {}

    bool take(std::string_view data) override {
        const bool fits = cache_->deserialize(data.data(), data.size());
        if (!fits) logger_->take();  // forget TensorRT's message, so that a later error does not repeat it
        return fits;
    }

    std::string bytes() override {
        const std::unique_ptr<nv::IHostMemory> data(cache_->serialize());
        return data ? std::string(static_cast<const char *>(data->data()), data->size()) : std::string();
    }

private:
    std::unique_ptr<nv::IRuntimeCache> cache_;
    std::shared_ptr<TrtLogger> logger_;
};
#endif

}  // namespace

std::unique_ptr<TrtRefitter> make_trt_refitter(const TrtLibrary &library, nv::ICudaEngine &engine,
                                               const std::string &part, std::shared_ptr<TrtLogger> logger) {
    return std::make_unique<Refitter>(library, engine, part, std::move(logger));
}

#ifdef TRT_MAJOR_RTX
std::unique_ptr<CompiledKernels> make_trt_kernels(std::unique_ptr<nv::IRuntimeCache> cache,
                                                  std::shared_ptr<TrtLogger> logger) {
    return std::make_unique<Kernels>(std::move(cache), std::move(logger));
}
#endif

}  // namespace arcflow
