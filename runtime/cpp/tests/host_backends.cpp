// The library's backends in the tests' library that runs on the driver made of host memory (tests/host_cuda):
// "host-cuda" runs real bundles through lane, plans and kernels, with OpenVINO in the place of a GPU's engines, and
// "openvino" is the CPU's own backend, to compare with. tests/host_cuda/cpp_images.py uses it.
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <memory>
#include <variant>

#include "engine.h"
#include "error.h"
#include "openvino_backend.h"
#include "trt_denoiser.h"
#include "trt_engine.h"
#include "trt_memory.h"
#include "trt_shapes.h"

namespace host_backends {
namespace {

using namespace arcflow;

// What tests set.
struct {
    size_t max_plans = default_max_plans;
    int64_t max_batch = 64;
    bool weights = false;  // engines have weights on the device
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
    std::shared_ptr<Engine> engine;

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
        Tensors slots;
        for (const TensorSpec &spec : loaded->part.slot_inputs()) {
            Tensor tensor(spec.dtype, shapes.at(spec.name));
            std::memcpy(tensor.data.data(), host(at.at(spec.name), tensor.data.size()), tensor.data.size());
            slots[spec.name] = std::move(tensor);
        }
        for (const auto &[name, tensor] : loaded->engine->run_with_slots(inputs, slots)) {
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

// Bytes of a run's workspace; larger images need more.
size_t workspace_of(const Part &part, const Shapes &inputs) {
    int64_t count = 64;
    for (const int64_t size : inputs.at(part.inputs.front().name)) count *= size;
    return static_cast<size_t>(count);
}

std::string misfit_of(const std::string &part, const Shapes &inputs) {
    const int64_t batch = inputs.begin()->second.front();
    if (part != "backbone" || batch <= settings.max_batch) return "";
    return part + ": the engine takes at most " + std::to_string(settings.max_batch) + " images";
}

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
        workspace_bytes_ = workspace_of(loaded_->part, shapes_);
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
    Session(std::shared_ptr<const Loaded> loaded, std::unique_ptr<cuda::Memory> weights)
        : loaded_(std::move(loaded)), weights_(std::move(weights)) {}

    std::unique_ptr<TrtContext> context(const Shapes &inputs, cuda::Stream &stream) override {
        return std::make_unique<Context>(loaded_, inputs, stream);
    }
    std::string misfit(const Shapes &inputs) override { return misfit_of(loaded_->name, inputs); }

private:
    std::shared_ptr<const Loaded> loaded_;
    std::unique_ptr<cuda::Memory> weights_;
};

class HostCudaBackend : public Backend {
public:
    explicit HostCudaBackend(int threads)
        : plain_(make_openvino_backend(threads)), lane_(std::make_shared<Lane>(std::make_shared<cuda::Device>())) {}

    void check(const Bundle &bundle) override { plain_->check(bundle); }

    std::unique_ptr<Engine> open(const Bundle &bundle, const std::string &part) override {
        return make_trt_engine(lane_, lane_->with_room([&] { return load(bundle, part); }), part,
                               bundle.manifest.parts.at(part));
    }

    std::unique_ptr<Denoiser> open_denoiser(const Bundle &bundle, PartSource &parts) override {
        const auto check = [](const std::string &part, const Shapes &inputs) { return misfit_of(part, inputs); };
        return make_trt_denoiser(lane_, parts, check, bundle.manifest, settings.max_plans);
    }

    MemoryMode fitting_memory(const Bundle &bundle) override {
        std::map<std::string, EngineBytes> parts;
        for (const auto &[name, inputs] : part_inputs(bundle.manifest, usual_size(bundle.manifest)))
            parts[name] = {weight_bytes(bundle, name), workspace_of(bundle.manifest.parts.at(name), inputs)};
        const Lane::Hold hold(*lane_);
        std::string why;
        const MemoryMode mode = choose_memory(bundle.manifest, parts, cuda::free_bytes(), why);
        if (!why.empty()) std::fprintf(stderr, "arcflow: %s\n", why.c_str());
        return mode;
    }

private:
    // As many bytes as the weights' file has.
    static uint64_t weight_bytes(const Bundle &bundle, const std::string &part) {
        return bundle.manifest.files.at(bundle.manifest.parts.at(part).weights).bytes;
    }

    std::shared_ptr<TrtSession> load(const Bundle &bundle, const std::string &part) {
        const Latents &sizes = bundle.manifest.latents;
        const Lane::Hold hold(*lane_);
        std::unique_ptr<cuda::Memory> weights;
        if (settings.weights) weights = lane_->allocate(weight_bytes(bundle, part), part + ": weights");
        // OpenVINO's model is kept, since compiling it takes long.
        std::shared_ptr<Engine> &engine = engines_[part];
        if (!engine) engine = plain_->open(bundle, part);
        return std::make_shared<Session>(
            std::make_shared<Loaded>(
                Loaded{part, bundle.manifest.parts.at(part), sizes.patch_size * sizes.vae_scale_factor, engine}),
            std::move(weights));
    }

    std::unique_ptr<Backend> plain_;
    std::shared_ptr<Lane> lane_;
    std::map<std::string, std::shared_ptr<Engine>> engines_;  // used with the lane
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

// Whether engines of pipelines that are opened later take device memory for their weights.
__attribute__((visibility("default"))) void host_backends_weights(int take) {
    host_backends::settings.weights = take != 0;
}

// Called before each run of a part, to do what an engine's library might do there; null for nothing.
__attribute__((visibility("default"))) void host_backends_before_enqueue(void (*act)(const char *, void *)) {
    host_backends::settings.before_enqueue = act;
}
}
