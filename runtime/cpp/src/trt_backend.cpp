// The TensorRT backend: finds the GPU, the library and the engines that fit them.
#include "trt_backend.h"

#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "error.h"
#include "trt_denoiser.h"
#include "trt_engine.h"
#include "trt_memory.h"
#include "trt_record.h"
#include "trt_session.h"

namespace arcflow {
namespace {

class TrtBackend : public Backend {
public:
    explicit TrtBackend(TrtFlavour flavour) : flavour_(flavour) {}

    // Looks for the GPU first, then the library, then the records (E4). Reads no engine.
    void check(const Bundle &bundle) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        start();
        for (const auto &[name, part] : bundle.manifest.parts) find_engine(bundle, name, host_);
    }

    std::unique_ptr<Engine> open(const Bundle &bundle, const std::string &part) override {
        const std::shared_ptr<Lane> shared = lane();
        return make_trt_engine(shared, shared->with_room([&] { return load(bundle, part); }), part,
                               bundle.manifest.parts.at(part));
    }

    std::unique_ptr<Denoiser> open_denoiser(const Bundle &bundle, PartSource &parts) override {
        std::map<std::string, std::vector<Profile>> profiles;
        const std::shared_ptr<Lane> shared = lane();
        for (const auto &[name, part] : bundle.manifest.parts)
            profiles[name] = find_engine(bundle, name, host_).record.key.profiles;
        const ShapeCheck check_shapes = [profiles](const std::string &part, const Shapes &inputs) {
            std::string wrong;
            fitting_profile(part, profiles.at(part), inputs, wrong);
            return wrong;
        };
        return make_trt_denoiser(shared, parts, check_shapes, bundle.manifest);
    }

    MemoryMode fitting_memory(const Bundle &bundle) override {
        const std::shared_ptr<Lane> shared = lane();
        std::map<std::string, EngineBytes> parts;
        for (const auto &[name, inputs] : part_inputs(bundle.manifest, usual_size(bundle.manifest)))
            parts[name] = engine_bytes(bundle, find_engine(bundle, name, host_).record, inputs);
        const Lane::Hold hold(*shared);
        std::string why;
        const MemoryMode mode = choose_memory(bundle.manifest, parts, cuda::free_bytes(), why);
        if (!why.empty()) std::fprintf(stderr, "arcflow: %s\n", why.c_str());
        return mode;
    }

private:
    std::shared_ptr<Lane> lane() {
        const std::lock_guard<std::mutex> lock(mutex_);
        start();
        return lane_;
    }

    // Find the GPU and open the library, once. The caller holds the mutex.
    void start() {
        if (runtime_) return;
        if (!cuda::find_gpu()) {
            throw engine_error(std::string(name_of(flavour_)) +
                               " engines run on an NVIDIA GPU, and the CUDA driver finds none here; "
                               "check that nvidia-smi lists one");
        }
        const TrtLibrary library = open_trt_library(flavour_, trt_headers_version());
        const auto device = std::make_shared<const cuda::Device>();
        host_ = {name_of(flavour_), library.version.text(), device->gpu.target, std::nullopt, this_platform()};
        if (flavour_ == TrtFlavour::tensorrt) host_.gpu = device->gpu.name;
        lane_ = std::make_shared<Lane>(device);
        const Lane::Hold hold(*lane_);
        runtime_ = make_trt_runtime(library, device->gpu);
    }

    std::shared_ptr<TrtSession> load(const Bundle &bundle, const std::string &part) {
        const BuiltEngine engine = find_engine(bundle, part, host_);
        check_engine(engine, false);
        const Lane::Hold hold(*lane_);
        // Keeps runtime and lane alive as long as the session, which needs them.
        struct Loaded {
            std::shared_ptr<Lane> lane;
            std::shared_ptr<TrtRuntime> runtime;
            std::unique_ptr<TrtSession> session;
            ~Loaded() {
                try {
                    const Lane::Hold during(*lane);
                    lane->settle();
                    session.reset();
                } catch (const Error &) {  // the device is lost, so there is nothing to free
                }
            }
        };
        const auto loaded = std::make_shared<Loaded>();
        loaded->lane = lane_;
        loaded->runtime = runtime_;
        loaded->session = runtime_->load(engine, bundle);
        return {loaded, loaded->session.get()};
    }

    TrtFlavour flavour_;
    std::mutex mutex_;  // of the next three, which `start` sets once
    std::shared_ptr<Lane> lane_;
    std::shared_ptr<TrtRuntime> runtime_;
    Host host_;
};

}  // namespace

std::unique_ptr<Backend> make_trt_backend(bool rtx) {
    const TrtFlavour wanted = rtx ? TrtFlavour::tensorrt_rtx : TrtFlavour::tensorrt, built = trt_headers_flavour();
    if (wanted != built) {
        throw engine_error(std::string("backend ") + name_of(wanted) + ": this library was built with the headers of " +
                           name_of(built) + " " + trt_headers_version().text() + "; build it with TRT_ROOT of " +
                           name_of(wanted));
    }
    return std::make_unique<TrtBackend>(wanted);
}

}  // namespace arcflow
