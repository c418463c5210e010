// Runs a TensorRT engine on host tensors.
#include "trt_engine.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <utility>
#include <vector>

#include "error.h"
#include "trt_buffers.h"
#include "trt_loras.h"
#include "trt_shapes.h"

namespace arcflow {
namespace {

constexpr size_t max_shapes = 4;  // text length varies with Qwen-Image; with FLUX it is fixed

// The context and buffers for one set of shapes. Pinned memory and device memory have the same layout: inputs first.
// Made and freed by a thread that holds the lane.
class Prepared {
public:
    Prepared(Lane &lane, TrtSession &session, const std::string &name, const Part &part, const Shapes &inputs)
        : shapes(inputs), lane_(lane), name_(name), context_(session.context(inputs, lane.stream())) {
        const auto add = [&](const TensorSpec &spec, const std::vector<int64_t> &shape) {
            layout_.add(spec.name, bytes_of(shape, spec.dtype, name + ": " + spec.name), shape);
        };
        for (const TensorSpec &spec : part.inputs) add(spec, inputs.at(spec.name));
        input_bytes_ = layout_.bytes();
        for (const TensorSpec &spec : part.outputs) add(spec, context_->shape(spec.name));
        workspace_bytes_ = context_->workspace_bytes();
        memory_ = lane.allocate(layout_.bytes(), name + ": inputs and outputs");
        pinned_ = lane.allocate_pinned(layout_.bytes(), name);
        done_ = std::make_unique<cuda::Event>();
        for (const auto &[tensor, region] : layout_.regions()) context_->bind(tensor, memory_->address + region.offset);
    }

    void fill(const Part &part, const Tensors &inputs) {
        for (const TensorSpec &spec : part.inputs) {
            const Layout::Region &region = layout_[spec.name];
            if (region.bytes)
                std::memcpy(pinned_->data + region.offset, inputs.at(spec.name).data.data(), region.bytes);
        }
    }

    // The caller holds the lane.
    void enqueue() {
        if (workspace_bytes_ > 0) {
            const cuda::Memory &workspace = lane_.workspace(workspace_bytes_, name_);
            if (!bound_ || generation_ != lane_.generation()) {
                context_->use_workspace(workspace.address, workspace.bytes);
                generation_ = lane_.generation();
                bound_ = true;
            }
        }
        cuda::Stream &stream = lane_.stream();
        const size_t output_bytes = layout_.bytes() - input_bytes_;
        stream.copy(memory_->address, pinned_->address(), input_bytes_);
        context_->enqueue();
        stream.copy(pinned_->address() + input_bytes_, memory_->address + input_bytes_, output_bytes);
        stream.record(*done_);
    }

    // The caller does not hold the lane, so that other threads enqueue meanwhile.
    Tensors wait(const Part &part) {
        done_->wait();
        Tensors outputs;
        for (const TensorSpec &spec : part.outputs) {
            const Layout::Region &region = layout_[spec.name];
            Tensor &output = outputs.emplace(spec.name, Tensor(spec.dtype, region.shape)).first->second;
            if (region.bytes) std::memcpy(output.data.data(), pinned_->data + region.offset, region.bytes);
        }
        return outputs;
    }

    const Shapes shapes;

private:
    Lane &lane_;
    std::string name_;
    Layout layout_;
    size_t input_bytes_ = 0, workspace_bytes_ = 0;
    uint64_t generation_ = 0;
    bool bound_ = false;
    // Declared before the context, which is freed first.
    std::unique_ptr<cuda::Memory> memory_;
    std::unique_ptr<cuda::Pinned> pinned_;
    std::unique_ptr<cuda::Event> done_;
    std::unique_ptr<TrtContext> context_;
};

class HostEngine : public TrtEngine {
public:
    HostEngine(std::shared_ptr<Lane> lane, std::shared_ptr<TrtSession> session, std::string name, Part part)
        : lane_(std::move(lane)), session_(std::move(session)), name_(std::move(name)), part_(std::move(part)) {
        for (TensorSpec &slot : part_.slot_inputs()) part_.inputs.push_back(std::move(slot));
        const Lane::Hold hold(*lane_);
        lane_->add_engine();
    }

    ~HostEngine() override {
        try {
            const Lane::Hold hold(*lane_);
            lane_->settle();
            prepared_.clear();
            session_.reset();
            lane_->remove_engine();
        } catch (const std::exception &) {  // the device is lost, so there is nothing to free
        }
    }

    TrtSession &session() override { return *session_; }

    Tensors run(const Tensors &inputs) override { return run_with_slots(inputs, {}); }

    // One thread at a time, others wait.
    Tensors run_with_slots(const Tensors &given, const Tensors &slots) override {
        Tensors inputs = given;
        if (part_.lora) inputs.merge(pad_inputs(*part_.lora, slots));
        return run_checked(inputs);
    }

private:
    Tensors run_checked(const Tensors &inputs) {
        for (const TensorSpec &spec : part_.inputs) {
            const auto given = inputs.find(spec.name);
            if (given == inputs.end() || given->second.dtype != spec.dtype) {
                throw Error(ARCFLOW_INTERNAL_ERROR,
                            name_ + ": input " + spec.name + " must be in " + name_of(spec.dtype));
            }
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        return run_in_pieces(inputs);
    }

    // Run a conditioner in pieces of as many timesteps as its engine takes, and join the modulation [S, U, M] along its
    // first axis.
    Tensors run_in_pieces(const Tensors &inputs) {
        const auto timesteps = inputs.find("timesteps");
        const int64_t steps = timesteps == inputs.end() ? 1 : timesteps->second.count();
        Shapes shapes = shapes_of(inputs);
        int64_t most = steps;
        for (; most > 1 && !session_->misfit(shapes).empty(); --most) shapes["timesteps"] = {most - 1};
        if (most == steps) return run_whole(inputs);
        Tensors joined;
        for (int64_t begin = 0; begin < steps; begin += most) {
            const int64_t count = std::min(most, steps - begin);
            Tensors piece = inputs;
            piece["timesteps"] = Tensor(DType::float32, {count});
            std::memcpy(piece["timesteps"].data.data(), timesteps->second.as<float>() + begin,
                        static_cast<size_t>(count) * sizeof(float));
            for (auto &[name, part] : run_whole(piece)) {
                const auto found = joined.find(name);
                if (found == joined.end()) {
                    joined.emplace(name, std::move(part));
                } else {
                    found->second.shape[0] += part.shape[0];
                    found->second.data.insert(found->second.data.end(), part.data.begin(), part.data.end());
                }
            }
        }
        return joined;
    }

    Tensors run_whole(const Tensors &inputs) {
        return lane_->with_room([&] { return try_whole(inputs); });
    }

    Tensors try_whole(const Tensors &inputs) {
        try {
            Prepared &prepared = prepare(shapes_of(inputs));
            prepared.fill(part_, inputs);
            {
                const Lane::Hold hold(*lane_);
                prepared.enqueue();
            }
            const cuda::Current current(*lane_->device);
            return prepared.wait(part_);
        } catch (...) {
            // What was enqueued may still run, and its buffers are freed after it only.
            drop(0);
            throw;
        }
    }

    Prepared &prepare(const Shapes &shapes) {
        const auto found =
            std::find_if(prepared_.begin(), prepared_.end(), [&](const auto &p) { return p->shapes == shapes; });
        if (found != prepared_.end()) {
            prepared_.splice(prepared_.begin(), prepared_, found);
        } else {
            drop(max_shapes - 1);
            const Lane::Hold hold(*lane_);
            prepared_.push_front(std::make_unique<Prepared>(*lane_, *session_, name_, part_, shapes));
        }
        return *prepared_.front();
    }

    // Free all but the `keep` most recently used shapes, after the stream's work.
    void drop(size_t keep) noexcept {
        if (prepared_.size() <= keep) return;
        try {
            const Lane::Hold hold(*lane_);
            lane_->settle();
            while (prepared_.size() > keep) prepared_.pop_back();
        } catch (const std::exception &) {  // the device is lost, so there is nothing to free
        }
    }

    std::shared_ptr<Lane> lane_;
    std::shared_ptr<TrtSession> session_;
    std::string name_;
    Part part_;
    std::mutex mutex_;
    std::list<std::unique_ptr<Prepared>> prepared_;  // most recently used first
};

}  // namespace

std::unique_ptr<TrtEngine> make_trt_engine(std::shared_ptr<Lane> lane, std::shared_ptr<TrtSession> session,
                                           std::string name, Part part) {
    return std::make_unique<HostEngine>(std::move(lane), std::move(session), std::move(name), std::move(part));
}

Shapes shapes_of(const Tensors &tensors) {
    Shapes shapes;
    for (const auto &[name, tensor] : tensors) shapes[name] = tensor.shape;
    return shapes;
}

}  // namespace arcflow
