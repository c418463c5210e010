// Runs a TensorRT engine on host tensors.
#include "trt_engine.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "error.h"

namespace arcflow {
namespace {

// A stream, and a context with its memory for one set of shapes. Used by one thread at a time.
struct Lane {
    cuda::Stream stream;
    Shapes shapes;
    std::unique_ptr<TrtContext> context;
    std::unique_ptr<cuda::Memory> scratch, tensors;
    std::map<std::string, cuda::Address> addresses;
    std::map<std::string, std::vector<int64_t>> outputs;
};

class TrtEngine : public Engine {
public:
    TrtEngine(std::shared_ptr<const cuda::Device> device, std::shared_ptr<TrtSession> session, std::string name,
              Part part)
        : device_(std::move(device)), session_(std::move(session)), name_(std::move(name)), part_(std::move(part)) {}

    ~TrtEngine() override {
        try {
            const cuda::Current current(*device_);
            lanes_.clear();
        } catch (const Error &) {  // the device is lost, so there is nothing to free
        }
    }

    Tensors run(const Tensors &inputs) override {
        const auto timesteps = inputs.find("timesteps");
        if (timesteps != inputs.end()) {
            const int64_t most = session_->largest("timesteps", 0);
            if (most > 0 && timesteps->second.count() > most) return run_in_pieces(inputs, most);
        }
        const cuda::Current current(*device_);
        std::unique_ptr<Lane> lane = take();
        // A lane that failed is destroyed, not returned to the list.
        Tensors outputs = run_on(*lane, inputs);
        const std::lock_guard<std::mutex> lock(mutex_);
        lanes_.push_back(std::move(lane));
        return outputs;
    }

private:
    // Run a conditioner in pieces of at most `most` timesteps, the limit of its engine, and join the modulation [S, U,
    // M] along its first axis.
    Tensors run_in_pieces(const Tensors &inputs, int64_t most) {
        const Tensor &timesteps = inputs.at("timesteps");
        Tensors joined;
        for (int64_t begin = 0; begin < timesteps.count(); begin += most) {
            const int64_t count = std::min(most, timesteps.count() - begin);
            Tensors piece = inputs;
            piece["timesteps"] = Tensor(timesteps.dtype, {count});
            std::memcpy(piece["timesteps"].data.data(), timesteps.as<float>() + begin,
                        static_cast<size_t>(count) * sizeof(float));
            for (auto &[name, part] : run(piece)) {
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

    std::unique_ptr<Lane> take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (lanes_.empty()) return std::make_unique<Lane>();
        std::unique_ptr<Lane> lane = std::move(lanes_.back());
        lanes_.pop_back();
        return lane;
    }

    void prepare(Lane &lane, const Shapes &shapes) {
        lane.context.reset();
        lane.context = session_->context(shapes, lane.stream);
        lane.addresses.clear();
        lane.outputs.clear();
        std::map<std::string, size_t> offsets;
        size_t total = 0;
        const auto place = [&](const TensorSpec &spec, const std::vector<int64_t> &shape) {
            offsets[spec.name] = total;
            total += aligned(bytes_of(shape, spec.dtype, name_ + ": " + spec.name));
        };
        for (const TensorSpec &spec : part_.inputs) place(spec, shapes.at(spec.name));
        for (const TensorSpec &spec : part_.outputs) {
            lane.outputs[spec.name] = lane.context->shape(spec.name);
            place(spec, lane.outputs[spec.name]);
        }
        grow(lane.tensors, total);
        for (const auto &[name, offset] : offsets) {
            lane.addresses[name] = lane.tensors->address + offset;
            lane.context->bind(name, lane.addresses[name]);
        }
        const size_t scratch = lane.context->scratch_bytes();
        grow(lane.scratch, scratch);
        lane.context->use_scratch(lane.scratch->address, lane.scratch->bytes);
        lane.shapes = shapes;
    }

    static void grow(std::unique_ptr<cuda::Memory> &memory, size_t bytes) {
        if (memory && memory->bytes >= bytes) return;
        memory.reset();
        memory = std::make_unique<cuda::Memory>(bytes);
    }

    Tensors run_on(Lane &lane, const Tensors &inputs) {
        for (const TensorSpec &spec : part_.inputs) {
            const auto given = inputs.find(spec.name);
            if (given == inputs.end() || given->second.dtype != spec.dtype) {
                throw Error(ARCFLOW_INTERNAL_ERROR,
                            name_ + ": input " + spec.name + " must be in " + name_of(spec.dtype));
            }
        }
        const Shapes shapes = shapes_of(inputs);
        if (!lane.context || shapes != lane.shapes) prepare(lane, shapes);
        for (const TensorSpec &spec : part_.inputs) {
            const Tensor &input = inputs.at(spec.name);
            lane.stream.to_device(lane.addresses.at(spec.name), input.data.data(), input.data.size());
        }
        lane.context->enqueue();
        Tensors outputs;
        for (const TensorSpec &spec : part_.outputs) {
            Tensor &output = outputs.emplace(spec.name, Tensor(spec.dtype, lane.outputs.at(spec.name))).first->second;
            lane.stream.to_host(output.data.data(), lane.addresses.at(spec.name), output.data.size());
        }
        lane.stream.wait();
        return outputs;
    }

    std::shared_ptr<const cuda::Device> device_;
    std::shared_ptr<TrtSession> session_;
    std::string name_;
    Part part_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Lane>> lanes_;  // idle lanes
};

}  // namespace

std::unique_ptr<Engine> make_trt_engine(std::shared_ptr<const cuda::Device> device, std::shared_ptr<TrtSession> session,
                                        std::string name, Part part) {
    return std::make_unique<TrtEngine>(std::move(device), std::move(session), std::move(name), std::move(part));
}

Shapes shapes_of(const Tensors &tensors) {
    Shapes shapes;
    for (const auto &[name, tensor] : tensors) shapes[name] = tensor.shape;
    return shapes;
}

const TensorSpec &spec_of(const std::vector<TensorSpec> &specs, const std::string &name, const std::string &part) {
    for (const TensorSpec &spec : specs)
        if (spec.name == name) return spec;
    throw bundle_error(part + " has no " + name + ", which B9 (docs/bundle.md) demands; export the bundle again");
}

size_t bytes_of(const std::vector<int64_t> &shape, DType dtype, const std::string &what) {
    size_t bytes = size_of(dtype);
    for (const int64_t size : shape)
        if (size < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes))
            throw engine_error(what + " has a shape that its inputs do not tell; build the engine again");
    return bytes;
}

size_t aligned(size_t bytes) {
    constexpr size_t alignment = 256;
    return (bytes + alignment - 1) / alignment * alignment;
}

}  // namespace arcflow
