// The library's backends in the tests' library that runs on the driver made of host memory (tests/host_cuda):
// "host-cuda" runs real bundles through lane, plans and kernels, with OpenVINO in the place of a GPU's engines, and
// "openvino" is the CPU's own backend, to compare with. tests/host_cuda/cpp_images.py uses it.
#include <dlfcn.h>

#include <cstring>
#include <mutex>
#include <variant>

#include "engine.h"
#include "error.h"
#include "openvino_backend.h"
#include "trt_denoiser.h"
#include "trt_engine.h"
#include "trt_shapes.h"

namespace host_backends {
namespace {

using namespace arcflow;

// What tests set.
struct {
    size_t max_plans = default_max_plans;
    int64_t max_batch = 64;
    void (*before_enqueue)(const char *part, void *stream) = nullptr;
} settings;

// A function of host_cuda.h.
template <class Function> Function *control(const char *name) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *found = library == nullptr ? nullptr : dlsym(library, name);
    if (found == nullptr) throw engine_error("libcuda.so.1 is not the driver made of host memory");
    return reinterpret_cast<Function *>(found);
}

// A part with OpenVINO, and how its outputs' shapes follow from its inputs'.
struct Loaded {
    std::string name;
    Part part;
    int64_t token_px;
    std::unique_ptr<Engine> engine;

    Shapes outputs(const Shapes &inputs) const {
        std::map<std::string, int64_t> sizes;
        for (const TensorSpec &spec : part.inputs)
            for (size_t i = 0; i < spec.shape.size(); ++i)
                if (const auto *symbol = std::get_if<std::string>(&spec.shape[i]))
                    sizes[*symbol] = inputs.at(spec.name)[i];
        for (const char *side : {"height", "width"})
            if (const auto found = sizes.find(std::string("latent_") + side); found != sizes.end())
                sizes[side] = found->second * token_px;
        Shapes made;
        for (const TensorSpec &spec : part.outputs) {
            for (const Dimension &size : spec.shape) {
                const auto *symbol = std::get_if<std::string>(&size);
                made[spec.name].push_back(symbol ? sizes.at(*symbol) : std::get<int64_t>(size));
            }
        }
        return made;
    }
};

// One run, with the addresses of its call, as a captured engine keeps them.
struct Call {
    std::shared_ptr<const Loaded> loaded;
    Shapes shapes;
    std::map<std::string, cuda::Address> at;
    cuda::Address workspace;
    size_t workspace_bytes;

    void run() const {
        std::memset(host(workspace, workspace_bytes), 0xff, workspace_bytes);
        Tensors inputs;
        for (const TensorSpec &spec : loaded->part.inputs) {
            Tensor tensor(spec.dtype, shapes.at(spec.name));
            if (!tensor.data.empty())
                std::memcpy(tensor.data.data(), host(at.at(spec.name), tensor.data.size()), tensor.data.size());
            inputs[spec.name] = std::move(tensor);
        }
        for (const auto &[name, tensor] : loaded->engine->run(inputs)) {
            if (tensor.shape != shapes.at(name)) throw engine_error(name + " has another shape: " + tensor.describe());
            if (!tensor.data.empty())
                std::memcpy(host(at.at(name), tensor.data.size()), tensor.data.data(), tensor.data.size());
        }
    }

    static void *host(cuda::Address address, size_t bytes) {
        void *found = control<void *(cuda::Address, size_t)>("host_cuda_at")(address, bytes);
        if (found == nullptr) throw engine_error(control<const char *()>("host_cuda_fault")());
        return found;
    }
};

int run_call(void *user) {
    try {
        static_cast<const Call *>(user)->run();
        return 0;
    } catch (const std::exception &e) {
        std::fprintf(stderr, "an engine failed: %s\n", e.what());
        return 1;
    }
}

class Context : public TrtContext {
public:
    Context(std::shared_ptr<const Loaded> loaded, Shapes shapes, cuda::Stream &stream)
        : loaded_(std::move(loaded)), shapes_(std::move(shapes)), stream_(stream) {
        int64_t count = 64;  // larger images need more
        for (const int64_t size : shapes_.at(loaded_->part.inputs.front().name)) count *= size;
        workspace_bytes_ = static_cast<size_t>(count);
        for (const auto &[name, shape] : loaded_->outputs(shapes_)) shapes_[name] = shape;
    }

    size_t workspace_bytes() override { return workspace_bytes_; }
    void use_workspace(cuda::Address address, size_t bytes) override {
        workspace_ = address;
        given_ = bytes;
    }
    std::vector<int64_t> shape(const std::string &tensor) override { return shapes_.at(tensor); }
    void bind(const std::string &tensor, cuda::Address address) override { at_[tensor] = address; }
    std::string obstacle() override { return ""; }
    void enqueue() override {
        if (given_ < workspace_bytes_) throw engine_error(loaded_->name + ": no workspace was given");
        if (settings.before_enqueue != nullptr) settings.before_enqueue(loaded_->name.c_str(), stream_.handle);
        calls_.push_back(std::make_unique<Call>(Call{loaded_, shapes_, at_, workspace_, given_}));
        const int failed = control<int(void *, int (*)(void *), void *)>("host_cuda_enqueue")(stream_.handle, run_call,
                                                                                              calls_.back().get());
        if (failed) throw engine_error(loaded_->name + ": the run failed with error " + std::to_string(failed));
    }

private:
    std::shared_ptr<const Loaded> loaded_;
    Shapes shapes_;
    cuda::Stream &stream_;
    size_t workspace_bytes_ = 0, given_ = 0;
    cuda::Address workspace_ = 0;
    std::map<std::string, cuda::Address> at_;
    std::vector<std::unique_ptr<Call>> calls_;  // graphs run them again
};

class Session : public TrtSession {
public:
    explicit Session(std::shared_ptr<const Loaded> loaded) : loaded_(std::move(loaded)) {}

    std::unique_ptr<TrtContext> context(const Shapes &inputs, cuda::Stream &stream) override {
        return std::make_unique<Context>(loaded_, inputs, stream);
    }
    std::string misfit(const Shapes &inputs) override {
        const int64_t batch = inputs.begin()->second.front();
        if (loaded_->name != "backbone" || batch <= settings.max_batch) return "";
        return loaded_->name + ": the engine takes at most " + std::to_string(settings.max_batch) + " images";
    }

private:
    std::shared_ptr<const Loaded> loaded_;
};

class HostCudaBackend : public Backend {
public:
    explicit HostCudaBackend(int threads)
        : plain_(make_openvino_backend(threads)), lane_(std::make_shared<Lane>(std::make_shared<cuda::Device>())) {}

    void check(const Bundle &bundle) override { plain_->check(bundle); }

    std::unique_ptr<Engine> open(const Bundle &bundle, const std::string &part) override {
        return make_trt_engine(lane_, session(bundle, part), part, bundle.manifest.parts.at(part));
    }

    std::unique_ptr<Denoiser> open_denoiser(const Bundle &bundle) override {
        Sessions sessions{nullptr, session(bundle, "backbone"), session(bundle, "vae_decoder")};
        std::unique_ptr<Engine> conditioner;
        if (bundle.manifest.parts.count("conditioner") != 0) {
            sessions.conditioner = session(bundle, "conditioner");
            conditioner = open(bundle, "conditioner");
        }
        return make_trt_denoiser(lane_, std::move(sessions), std::move(conditioner), bundle.manifest,
                                 settings.max_plans);
    }

private:
    std::shared_ptr<TrtSession> session(const Bundle &bundle, const std::string &part) {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::weak_ptr<TrtSession> &known = sessions_[part];
        if (std::shared_ptr<TrtSession> loaded = known.lock()) return loaded;
        const Latents &sizes = bundle.manifest.latents;
        auto loaded =
            std::make_shared<Loaded>(Loaded{part, bundle.manifest.parts.at(part),
                                            sizes.patch_size * sizes.vae_scale_factor, plain_->open(bundle, part)});
        auto made = std::make_shared<Session>(std::move(loaded));
        known = made;
        return made;
    }

    std::unique_ptr<Backend> plain_;
    std::shared_ptr<Lane> lane_;
    std::mutex mutex_;
    std::map<std::string, std::weak_ptr<TrtSession>> sessions_;
};

}  // namespace
}  // namespace host_backends

namespace arcflow {

const char *backend_names() { return "host-cuda,openvino"; }

std::unique_ptr<Backend> make_backend(const std::string &name, int threads) {
    if (name == "host-cuda") return std::make_unique<host_backends::HostCudaBackend>(threads);
    return make_openvino_backend(threads);
}

}  // namespace arcflow

extern "C" {

// Settings for pipelines that are opened later: plans that are kept, and images that the backbone takes at once.
__attribute__((visibility("default"))) void host_backends_limits(size_t plans, int64_t batch) {
    host_backends::settings.max_plans = plans;
    host_backends::settings.max_batch = batch;
}

// Called before each run of a part, to do what an engine's library might do there; null for nothing.
__attribute__((visibility("default"))) void host_backends_before_enqueue(void (*act)(const char *, void *)) {
    host_backends::settings.before_enqueue = act;
}
}
