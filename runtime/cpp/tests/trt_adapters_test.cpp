// Tests of the adapters to TensorRT, with fakes that implement TensorRT's own classes.
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "error.h"
#include "trt_headers.h"

namespace {

using namespace arcflow;

// A refitter that records calls; `last` is the one made last.
class FakeRefitter : public nv::IRefitter, public nv::apiv::VRefitter {
public:
    explicit FakeRefitter(nv::ILogger *logger) : logger_(logger) {
        mImpl = this;
        ++alive;
        last = this;
    }
    ~FakeRefitter() override { --alive; }

    nv::IRefitter *getPImpl() noexcept override { return this; }
    bool refitCudaEngine() noexcept override {
        logger_->log(nv::ILogger::Severity::kERROR, "no memory");
        logger_->log(nv::ILogger::Severity::kINFO, "this is no error");
        return fits;
    }
    bool setNamedWeights(const char *name, nv::Weights weights) noexcept override {
        given[name] = weights;
        return fits;
    }
    int32_t getMissingWeights(int32_t size, const char **names) noexcept override { return list(1, size, names); }
    int32_t getAllWeights(int32_t size, const char **names) noexcept override { return list(2, size, names); }
    nv::Weights getWeightsPrototype(const char *name) const noexcept override {
        const std::string text = name;
        return {text == "a" ? nv::DataType::kBF16 : nv::DataType::kINT4, nullptr, text == "a" ? 6 : 2};
    }

    // Not called.
    bool setWeights(const char *, nv::WeightsRole, const nv::Weights) noexcept override { return false; }
    int32_t getMissing(int32_t, const char **, nv::WeightsRole *) noexcept override { return 0; }
    int32_t getAll(int32_t, const char **, nv::WeightsRole *) noexcept override { return 0; }
    void setErrorRecorder(nv::IErrorRecorder *) noexcept override {}
    nv::IErrorRecorder *getErrorRecorder() const noexcept override { return nullptr; }
    nv::ILogger *getLogger() const noexcept override { return logger_; }
    bool setMaxThreads(int32_t) noexcept override { return false; }
    int32_t getMaxThreads() const noexcept override { return 1; }
    bool setNamedWeightsWithLocation(const char *, nv::Weights, nv::TensorLocation) noexcept override { return false; }
    nv::Weights getNamedWeights(const char *) const noexcept override { return {}; }
    nv::TensorLocation getWeightsLocation(const char *) const noexcept override { return nv::TensorLocation::kHOST; }
    bool unsetNamedWeights(const char *) noexcept override { return false; }
    void setWeightsValidation(bool) noexcept override {}
    bool getWeightsValidation() const noexcept override { return true; }
    bool refitCudaEngineAsync(cudaStream_t) noexcept override { return false; }
    // In older headers only.
    virtual bool setDynamicRange(const char *, float, float) noexcept { return false; }
    virtual float getDynamicRangeMin(const char *) const noexcept { return 0; }
    virtual float getDynamicRangeMax(const char *) const noexcept { return 0; }
    virtual int32_t getTensorsWithDynamicRange(int32_t, const char **) const noexcept { return 0; }

    bool fits = true;
    std::map<std::string, nv::Weights> given;

    static int alive;
    static FakeRefitter *last;

private:
    static int32_t list(int32_t count, int32_t size, const char **names) {
        static const char *const all[] = {"a", "b"};
        for (int32_t i = 0; i < size && i < count; ++i) names[i] = all[i];
        return count;
    }

    nv::ILogger *logger_;
};
int FakeRefitter::alive = 0;
FakeRefitter *FakeRefitter::last = nullptr;

struct FakeEngine : nv::ICudaEngine {};

void *make_refitter(void *engine, void *logger, int32_t version) {
    CHECK(engine != nullptr && version == NV_TENSORRT_VERSION);
    return static_cast<nv::IRefitter *>(new FakeRefitter(static_cast<nv::ILogger *>(logger)));
}

void test_a_refitter() {
    FakeEngine engine;
    TrtLibrary library{"libnvinfer.so", trt_headers_version(), nullptr, make_refitter};
    {
        const auto refitter = make_trt_refitter(library, engine, "backbone", std::make_shared<TrtLogger>());
        FakeRefitter &asked = *FakeRefitter::last;
        CHECK((refitter->weights() == std::vector<std::string>{"a", "b"}));
        CHECK((refitter->missing() == std::vector<std::string>{"a"}));
        CHECK(refitter->spec("a").type == 16 && refitter->spec("a").count == 6);  // BFLOAT16
        CHECK(refitter->spec("b").type == 0 && refitter->spec("b").count == 2);   // one that bundles have not
        const int16_t data[6] = {};
        CHECK(refitter->set("a", {16, 6}, data) && !refitter->set("b", {0, 2}, data));
        CHECK(asked.given.size() == 1 && asked.given["a"].type == nv::DataType::kBF16);
        CHECK(asked.given["a"].values == data && asked.given["a"].count == 6);
        CHECK(refitter->refit());
        asked.fits = false;
        CHECK(!refitter->refit() && !refitter->set("a", {16, 6}, data));
        CHECK(refitter->said() == ": no memory" && refitter->said().empty());
    }
    CHECK(FakeRefitter::alive == 0);
    library.create_refitter = [](void *, void *logger, int32_t) -> void * {
        static_cast<nv::ILogger *>(logger)->log(nv::ILogger::Severity::kERROR, "not refittable");
        return nullptr;
    };
    const std::string said =
        thrown<Error>([&] { make_trt_refitter(library, engine, "backbone", std::make_shared<TrtLogger>()); });
    CHECK(said == std::string("backbone: ") + name_of(trt_flavour) +
                      " cannot fill in the engine's weights: not "
                      "refittable; build it again with `arcflow build`");
}

#ifdef TRT_MAJOR_RTX
int alive = 0;

class FakeBytes : public nv::IHostMemory, public nv::apiv::VHostMemory {
public:
    FakeBytes() {
        mImpl = this;
        ++alive;
    }
    ~FakeBytes() override { --alive; }
    void *data() const noexcept override { return const_cast<char *>("kernels and more"); }
    std::size_t size() const noexcept override { return std::strlen("kernels"); }
    nv::DataType type() const noexcept override { return nv::DataType::kUINT8; }
};

class FakeCache : public nv::IRuntimeCache, public nv::apiv::VRuntimeCache {
public:
    FakeCache(nv::ILogger &logger, bool empty) : logger_(logger), empty_(empty) {
        mImpl = this;
        ++alive;
    }
    ~FakeCache() override { --alive; }
    nv::IHostMemory *serialize() const noexcept override { return empty_ ? nullptr : new FakeBytes; }
    bool deserialize(const void *blob, size_t size) noexcept override {
        if (std::string(static_cast<const char *>(blob), size) == "kernels") return true;
        logger_.log(nv::ILogger::Severity::kERROR, "of another GPU");
        return false;
    }
    bool reset() noexcept override { return true; }

private:
    nv::ILogger &logger_;
    bool empty_;
};

void test_a_runtime_cache() {
    const auto logger = std::make_shared<TrtLogger>();
    for (const bool empty : {false, true}) {
        const auto kernels = make_trt_kernels(std::make_unique<FakeCache>(*logger, empty), logger);
        CHECK(kernels->take("kernels") && !kernels->take("others"));
        CHECK(logger->take().empty());  // a later error does not repeat the message
        CHECK(kernels->bytes() == (empty ? "" : "kernels"));
    }
    CHECK(alive == 0);
}
#else
void test_a_runtime_cache() {}
#endif

}  // namespace

int main() {
    test_a_refitter();
    test_a_runtime_cache();
    std::puts("ok");
    return 0;
}
