// Prepares, enqueues and captures the GPU's work for one job.
#include "trt_plan.h"

#include <algorithm>

#include "error.h"
#include "trt_engine.h"
#include "trt_shapes.h"

namespace arcflow {
namespace {}  // namespace

Plan::Plan(Lane &lane, const Manifest &manifest, PartSource &parts, LoraArenas &arenas, Kernels &kernels,
           const PlanKey &key_, int64_t steps_at_once, const DenoiseJob &job)
    : key(key_), lane_(lane), parts_(parts), arenas_(arenas), kernels_(kernels), keeps_(parts.keeps("backbone")) {
    const Lane::Hold hold(lane_);
    try {
        prepare(manifest, steps_at_once, job);
    } catch (...) {  // free with the lane held; a member's destructor would run without
        lane_.settle();
        contexts_.clear();
        buffers_.reset();
        done_.reset();
        throw;
    }
}

Plan::~Plan() {
    try {
        const Lane::Hold hold(lane_);
        lane_.settle();
        graph_.reset();
        contexts_.clear();
        buffers_.reset();
        events_.clear();
        done_.reset();
    } catch (const std::exception &) {  // the device is lost, so there is nothing to free
    }
}

void Plan::prepare(const Manifest &manifest, int64_t steps_at_once, const DenoiseJob &job) {
    const Part &backbone = manifest.parts.at("backbone");
    const Latents &sizes = manifest.latents;
    const DType input = spec_of(backbone.inputs, "latents", "backbone").dtype;
    straight_ = manifest.sampler == Sampler::linear;
    const DType dtype = spec_of(backbone.outputs, straight_ ? "velocity" : "means", "backbone").dtype;
    const int64_t tokens = key.size.batch * key.size.image_tokens();
    const auto channels = static_cast<int32_t>(sizes.channels * sizes.patch_size * sizes.patch_size);
    noise_ = {static_cast<int32_t>(key.size.batch),
              static_cast<int32_t>(sizes.channels),
              static_cast<int32_t>(key.size.height * sizes.patch_size),
              static_cast<int32_t>(key.size.width * sizes.patch_size),
              static_cast<int32_t>(sizes.patch_size),
              input};
    update_ = {tokens,   static_cast<int32_t>(sizes.num_gaussians),
               channels, static_cast<int32_t>(sizes.logweights_channels),
               dtype,    input};
    euler_ = {tokens, channels, dtype, input};
    buffers_ = std::make_unique<Buffers>(lane_, manifest, key, steps_at_once, job);
    find_shapes(manifest, steps_at_once);
    for (const auto &[name, shapes] : shapes_) {
        if (!keeps_) break;
        const std::shared_ptr<Engine> engine = parts_.borrow(part_of(name));
        TrtContext &context = *(contexts_[name] = make_context(name, dynamic_cast<TrtEngine &>(*engine).session()));
        const size_t bytes = context.workspace_bytes();
        if (bytes > workspace_bytes_) {
            workspace_bytes_ = bytes;
            largest_ = part_of(name);
        }
    }
    done_ = std::make_unique<cuda::Event>();
    bind();
}

void Plan::find_shapes(const Manifest &manifest, int64_t steps_at_once) {
    if (key.modulation == Modulation::conditioner)
        shapes_["conditioner"] = {conditioner_inputs(manifest, key.size.batch, steps_at_once),
                                  conditioner_outputs(manifest, key.size.batch, steps_at_once)};
    shapes_["backbone"] = {backbone_inputs(manifest, key.size), backbone_outputs(manifest, key.size)};
    if (key.negative_text_tokens > 0)
        shapes_[negative] = {backbone_inputs(manifest, key.negative_size()), shapes_.at("backbone").outputs};
    if (key.pixels) shapes_["vae_decoder"] = {decoder_inputs(manifest, key.size), decoder_outputs(manifest, key.size)};
    for (auto &[name, shapes] : shapes_) shapes.inputs.merge(arenas_.shapes(part_of(name), key.lora_rank));
}

// Make a context, and give it the addresses that are the same in all of its runs. The caller holds the lane.
std::unique_ptr<TrtContext> Plan::make_context(const std::string &context_name, TrtSession &session) {
    const std::string part = part_of(context_name);
    const bool of_negative = context_name == negative;
    const PartShapes &shapes = shapes_.at(context_name);
    std::unique_ptr<TrtContext> context = session.context(shapes.inputs, lane_.stream());
    for (const auto &[name, expected] : shapes.outputs) {
        const std::vector<int64_t> found = context->shape(name);
        if (found != expected) {
            throw engine_error(part + ": output " + name + " must have shape " + text_of(expected) + ", got " +
                               text_of(found) + "; build the engine again with `arcflow build`");
        }
    }
    const Buffers &buffers = *buffers_;
    if (part == "backbone") {
        context->bind("latents", buffers["input"] ? buffers["input"] : buffers["latents"]);
        context->bind("encoder_hidden_states", buffers[of_negative ? "negative_states" : "states"]);
        context->bind("text_rotary", buffers[of_negative ? "negative_text_rotary" : "text_rotary"]);
        for (const char *name : {"modulation", "image_rotary"}) context->bind(name, buffers[name]);
        for (const auto &[name, shape] : shapes.outputs)
            context->bind(name, buffers[of_negative ? "negative_velocity" : name]);
    } else if (part == "conditioner") {
        for (const char *name : {"pooled_projections", "guidance"})
            if (shapes.inputs.count(name) != 0) context->bind(name, buffers[name]);
        context->bind("modulation", buffers["conditioned"]);
    } else {
        for (const char *name : {"latents", "images"}) context->bind(name, buffers[name]);
    }
    for (const auto &[name, address] : arenas_.addresses(part, key.lora_rank)) context->bind(name, address);
    return context;
}

// The contexts of a part for one stage.
std::shared_ptr<const Plan::Contexts> Plan::use(const std::string &part) {
    if (!keeps_) return open_for_a_stage(part);
    return {std::shared_ptr<const Contexts>(), &contexts_};  // this plan's, not counted
}

// Load a part for one stage. Its memory is freed with the last copy of the pointer, after the stream's work.
std::shared_ptr<const Plan::Contexts> Plan::open_for_a_stage(const std::string &part) {
    struct Opened {
        explicit Opened(Lane &of) : lane(of) {}
        Opened(const Opened &) = delete;
        Opened &operator=(const Opened &) = delete;
        ~Opened() {
            try {
                const Lane::Hold hold(lane);
                lane.settle();
                contexts.clear();
                lane.release_workspace();
            } catch (const std::exception &) {  // the device is lost, so there is nothing to free
            }
        }

        Lane &lane;
        std::shared_ptr<Engine> engine;
        Contexts contexts;
    };
    const auto opened = std::make_shared<Opened>(lane_);
    opened->engine = parts_.borrow(part);
    const Lane::Hold hold(lane_);
    size_t bytes = 0;
    for (const auto &[name, shapes] : shapes_) {
        if (part_of(name) != part) continue;
        std::unique_ptr<TrtContext> &context = opened->contexts[name];
        context = make_context(name, dynamic_cast<TrtEngine &>(*opened->engine).session());
        bytes = std::max(bytes, context->workspace_bytes());
    }
    if (bytes > 0) {
        const cuda::Memory &workspace = lane_.workspace(bytes, part);
        for (const auto &[name, context] : opened->contexts) context->use_workspace(workspace.address, workspace.bytes);
    }
    return {opened, &opened->contexts};
}

// Give the contexts the lane's workspace, and drop a graph that uses an older one. The caller holds the lane.
void Plan::bind() {
    if (workspace_bytes_ == 0) return;
    const cuda::Memory &workspace = lane_.workspace(workspace_bytes_, largest_);
    if (bound_ && generation_ == lane_.generation()) return;
    graph_.reset();
    for (const auto &[part, context] : contexts_) context->use_workspace(workspace.address, workspace.bytes);
    generation_ = lane_.generation();
    bound_ = true;
    warm_ = false;
}

void Plan::run(const OnStep &on_step) {
    if (keeps_) {
        // Held throughout, so that no other plan replaces the workspace meanwhile.
        const Lane::Hold hold(lane_);
        run_kept(on_step);
        lane_.stream().record(*done_);
    } else {
        // Held within each stage only, because loading a part takes locks that come before the lane's.
        enqueue(on_step);
        const Lane::Hold hold(lane_);
        lane_.stream().record(*done_);
    }
    done_->wait();
}

void Plan::run_kept(const OnStep &on_step) {
    bind();
    if (!on_step && warm_ && !graph_ && obstacle_.empty()) capture();
    if (!on_step && graph_) {
        graph_->launch(lane_.stream().handle);
    } else {
        enqueue(on_step);
        warm_ = true;
    }
}

// Capture the graph, or set `obstacle_` to the reason why it cannot be captured.
void Plan::capture() {
    for (const auto &[part, context] : contexts_) {
        if (const std::string why = context->obstacle(); !why.empty()) {
            obstacle_ = part + ": " + why;
            return;
        }
    }
    try {
        lane_.stream().begin_capture();
        try {
            enqueue({});
        } catch (...) {
            lane_.stream().abort_capture();
            throw;
        }
        graph_ = lane_.stream().end_capture();
    } catch (const std::exception &e) {
        obstacle_ = std::string("the capture failed: ") + e.what();
    }
}

// Enqueue the whole job, from the copy of the staged inputs to the copy of the results.
void Plan::enqueue(const OnStep &on_step) {
    cuda::Stream &stream = lane_.stream();
    const Buffers &buffers = *buffers_;
    marks_.clear();
    {
        const Lane::Hold hold(lane_);
        mark("start");
        stream.copy(buffers["streams"], buffers.staging(), buffers.arrays.staged.bytes());
        mark("copy");
        kernels_.noise(stream, noise_, buffers["streams"], buffers["latents"], buffers["input"]);
        mark("noise");
    }
    if (key.modulation == Modulation::conditioner) {
        const auto contexts = use("conditioner");
        const Lane::Hold hold(lane_);
        condition(*contexts->at("conditioner"));
        mark("condition");
    }
    enqueue_steps(on_step);
    if (key.pixels) {
        const auto contexts = use("vae_decoder");
        const Lane::Hold hold(lane_);
        contexts->at("vae_decoder")->enqueue();
        mark("decode");
    }
    const Lane::Hold hold(lane_);
    for (const auto &[name, region] : buffers.arrays.results.regions()) copy_result(name);
    mark("copy");
}

void Plan::enqueue_steps(const OnStep &on_step) {
    const auto contexts = use("backbone");
    for (int64_t index = 0; index < key.size.steps; ++index) {
        {
            const Lane::Hold hold(lane_);
            step(*contexts, index);
            if (!on_step) continue;
            copy_result("latents");
            lane_.stream().wait();
        }
        on_step(index, buffers_->read("latents", DType::float32));
    }
}

// Compute the modulation of every step, as many steps per run as the engine takes.
void Plan::condition(TrtContext &context) {
    const Buffers &buffers = *buffers_;
    const Layout::Region &target = buffers.region("modulations"), &made = buffers.region("conditioned");
    const size_t step_bytes = target.bytes / static_cast<size_t>(key.size.steps);
    for (size_t run = 0; run < buffers.arrays.starts.size(); ++run) {
        context.bind("timesteps", buffers["timesteps." + std::to_string(run)]);
        context.enqueue();
        lane_.stream().copy(buffers["modulations"] + static_cast<size_t>(buffers.arrays.starts[run]) * step_bytes,
                            buffers["conditioned"], made.bytes);
    }
}

// Run the backbone at one sigma, with guidance once more for the negative prompts, and the update to the next sigma.
void Plan::step(const Contexts &contexts, int64_t index) {
    cuda::Stream &stream = lane_.stream();
    const Buffers &buffers = *buffers_;
    // A step's rows of the modulation may start at an unaligned address, so they are copied to an aligned one.
    const Layout::Region &rows = buffers.region("modulations");
    const size_t bytes = rows.bytes / static_cast<size_t>(rows.shape[0]);
    for (int64_t copy = 0; copy < key.size.batch / rows.shape[1]; ++copy)
        stream.copy(buffers["modulation"] + static_cast<size_t>(copy) * bytes,
                    buffers["modulations"] + static_cast<size_t>(index) * bytes, bytes);
    contexts.at("backbone")->enqueue();
    if (const auto second = contexts.find(negative); second != contexts.end()) second->second->enqueue();
    mark("backbone");
    if (straight_) {
        // Addresses of what this plan does not have, such as negative_velocity without guidance, are 0.
        kernels_.euler(stream, euler_,
                       {buffers["velocity"], buffers["negative_velocity"], buffers["latents"], buffers["latents"],
                        buffers["input"], buffers["sigmas"], buffers["true_cfg_scale"]},
                       static_cast<int32_t>(index));
    } else {
        kernels_.update(stream, update_,
                        {buffers["means"], buffers["logweights"], buffers["loggammas"], buffers["latents"],
                         buffers["latents"], buffers["input"], buffers["sigmas"]},
                        static_cast<int32_t>(index));
    }
    mark("update");
}

void Plan::copy_result(const std::string &name) {
    lane_.stream().copy(buffers_->result(name), (*buffers_)[name], buffers_->arrays.results[name].bytes);
}

// Mark the end of `stage`.
void Plan::mark(const char *stage) {
    if (marks_.size() == events_.size()) events_.push_back(std::make_unique<cuda::Event>());
    lane_.stream().record(*events_[marks_.size()]);
    marks_.push_back(stage);
}

Denoised Plan::take() const {
    Denoised out;
    out.latents = buffers_->read("latents", DType::float32);
    if (key.pixels) out.pixels = buffers_->read("images", DType::uint8);
    out.stages_ms = times_ms();
    return out;
}

std::vector<std::pair<std::string, double>> Plan::times_ms() const {
    std::vector<std::pair<std::string, double>> times;
    for (size_t i = 1; i < marks_.size(); ++i) {
        const double ms = events_[i]->ms_since(*events_[i - 1]);
        const std::string stage = marks_[i];
        const auto known = std::find_if(times.begin(), times.end(), [&](const auto &t) { return t.first == stage; });
        if (known == times.end()) times.emplace_back(stage, ms);
        else known->second += ms;
    }
    return times;
}

}  // namespace arcflow
