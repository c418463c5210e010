// Runs parts with OpenVINO on a CPU.
//
// Each operator computes in the dtype that the graph gives it, or in float32 where the CPU has no instructions for that
// dtype. OpenVINO calls this an inference precision of float32. Left to choose, it lowers float32 parts to bfloat16 on
// CPUs that have it, so images would depend on the machine.
#include "openvino_backend.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include <openvino/openvino.hpp>

#include "error.h"
#include "external_data.h"
#include "json_text.h"
#include "openvino_error.h"
#include "pool.h"

namespace arcflow {
namespace {

ov::element::Type type_of(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return ov::element::f32;
        case DType::float16:
            return ov::element::f16;
        case DType::bfloat16:
            return ov::element::bf16;
        case DType::int64:
            return ov::element::i64;
        case DType::uint8:
            return ov::element::u8;
    }
    throw engine_error("a part has a dtype that OpenVINO does not have; this is a bug in libarcflow");
}

// A tensor that shares memory with `tensor`. OpenVINO takes no pointer to const here, but it does not write to inputs.
ov::Tensor wrap(const Tensor &tensor) {
    static std::byte nothing{};
    const ov::Shape shape(tensor.shape.begin(), tensor.shape.end());
    void *data = tensor.data.empty() ? &nothing : const_cast<std::byte *>(tensor.data.data());
    return {type_of(tensor.dtype), shape, data};
}

Tensor copy_out(const ov::Tensor &found, const TensorSpec &spec) {
    const ov::Shape &shape = found.get_shape();
    Tensor tensor(spec.dtype, std::vector<int64_t>(shape.begin(), shape.end()));
    if (found.get_byte_size() != tensor.data.size())
        throw engine_error("output " + spec.name + " must have " + std::to_string(tensor.data.size()) + " bytes, got " +
                           std::to_string(found.get_byte_size()));
    if (!tensor.data.empty()) std::memcpy(tensor.data.data(), found.data(), tensor.data.size());
    return tensor;
}

// The sorted names as a list: ["a", "b"].
std::string listed(std::vector<std::string> names) {
    std::sort(names.begin(), names.end());
    return json_text(names);
}

std::vector<std::string> names_of(const std::vector<TensorSpec> &specs) {
    std::vector<std::string> names;
    for (const TensorSpec &spec : specs) names.push_back(spec.name);
    return names;
}

class OpenVinoEngine : public Engine {
public:
    OpenVinoEngine(std::string name, Part part, ov::CompiledModel model)
        : name_(std::move(name)), part_(std::move(part)), model_(std::move(model)) {
        for (const TensorSpec &spec : part_.slot_inputs()) empty_.emplace(spec.name, empty_slot(spec));
    }

    Tensors run(const Tensors &inputs) override { return run_with_slots(inputs, {}); }

    Tensors run_with_slots(const Tensors &inputs, const Tensors &slots) override {
        for (const TensorSpec &spec : part_.inputs)
            if (inputs.find(spec.name) == inputs.end())
                throw engine_error(name_ + ": input " + spec.name + " is missing");
        try {
            // A request that failed is destroyed, not returned to the pool.
            ov::InferRequest request = requests_.take([&] { return model_.create_infer_request(); });
            Tensors outputs;
            for (const TensorSpec &spec : part_.inputs) request.set_tensor(spec.name, wrap(inputs.at(spec.name)));
            for (const auto &[name, empty] : empty_) {
                const auto given = slots.find(name);
                request.set_tensor(name, wrap(given == slots.end() ? empty : given->second));
            }
            request.infer();
            for (const TensorSpec &spec : part_.outputs)
                outputs.emplace(spec.name, copy_out(request.get_tensor(spec.name), spec));
            requests_.give_back(std::move(request));
            return outputs;
        } catch (const ov::Exception &e) {
            throw engine_error(name_ + ": OpenVINO failed on inputs " + described(inputs) + ": " + useful_line(e));
        }
    }

private:
    static std::string described(const Tensors &inputs) {
        std::string text;
        for (const auto &[name, tensor] : inputs) text += (text.empty() ? "" : ", ") + name + ": " + tensor.describe();
        return "{" + text + "}";
    }

    // The input of a slot for a LoRA of rank 0.
    static Tensor empty_slot(const TensorSpec &spec) {
        std::vector<int64_t> shape;
        for (const Dimension &size : spec.shape) {
            const auto *number = std::get_if<int64_t>(&size);
            shape.push_back(number == nullptr ? 0 : *number);
        }
        return {spec.dtype, shape};
    }

    std::string name_;
    Part part_;
    Tensors empty_;  // the inputs of the LoRA slots
    ov::CompiledModel model_;
    // Each request has its own memory. OpenVINO runs their arithmetic one after the other, since the model has one
    // stream.
    Pool<ov::InferRequest> requests_;
};

class OpenVinoBackend : public Backend {
public:
    explicit OpenVinoBackend(int threads) : threads_(threads) {}

    void check(const Bundle &bundle) override {
        for (const auto &[name, part] : bundle.manifest.parts) {
            if (part.quantization && part.quantization->uses("fp8_e4m3")) {
                // OpenVINO rounds to FP8 through float16, so not always to the nearest value (B12).
                throw engine_error(name + " is quantised to FP8, which OpenVINO does not round correctly on a CPU; "
                                          "use the bundle that it was quantised from");
            }
            if (part.quantization && part.quantization->uses("nvfp4")) {
                throw engine_error(name + " is quantised to NVFP4, which runs on Blackwell GPUs only; "
                                          "use the bundle that it was quantised from");
            }
        }
    }

    std::unique_ptr<Engine> open(const Bundle &bundle, const std::string &part) override {
        const Part &spec = bundle.manifest.parts.at(part);
        check_external_data(bundle, part);
        try {
            const auto model = core_.read_model(bundle.path(spec.graph));
            std::vector<TensorSpec> inputs = spec.inputs;
            const std::vector<TensorSpec> slots = spec.slot_inputs();
            inputs.insert(inputs.end(), slots.begin(), slots.end());
            check_names(part, spec, "inputs", inputs, model->inputs());
            check_names(part, spec, "outputs", spec.outputs, model->outputs());
            return std::make_unique<OpenVinoEngine>(part, spec, core_.compile_model(model, "CPU", properties()));
        } catch (const ov::Exception &e) {
            throw engine_error(part + ": OpenVINO cannot load " + spec.graph + ": " + useful_line(e));
        }
    }

private:
    ov::AnyMap properties() const {
        ov::AnyMap map{
            ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
            ov::hint::execution_mode(ov::hint::ExecutionMode::ACCURACY),
            ov::hint::inference_precision(ov::element::f32),
            ov::num_streams(1),
            // Each part has its own threads. If they were pinned, those of all parts would share the first cores.
            ov::hint::enable_cpu_pinning(false),
        };
        if (threads_ > 0) map.emplace(ov::inference_num_threads(threads_));
        return map;
    }

    template <class Port>
    static void check_names(const std::string &part, const Part &spec, const std::string &kind,
                            const std::vector<TensorSpec> &said, const std::vector<Port> &found) {
        std::vector<std::string> names;
        for (const Port &port : found) {
            // OpenVINO may give a tensor several names; one of them must be the manifest's.
            const auto &own = port.get_names();
            const auto fits = [&](const TensorSpec &s) { return own.count(s.name) != 0; };
            const auto match = std::find_if(said.begin(), said.end(), fits);
            names.push_back(match != said.end() ? match->name : own.empty() ? "" : *own.begin());
            if (match != said.end() && port.get_element_type() != type_of(match->dtype)) {
                throw engine_error(part + ": " + match->name + " of " + spec.graph + " must be " +
                                   name_of(match->dtype) + ", as in the manifest, got " +
                                   port.get_element_type().to_string() + "; export the bundle again");
            }
        }
        const std::string expected = listed(names_of(said)), got = listed(names);
        if (expected != got) {
            throw engine_error(part + ": the " + kind + " of " + spec.graph + " must be " + expected +
                               ", as in the manifest, got " + got + "; export the bundle again");
        }
    }

    int threads_;
    ov::Core core_;
};

}  // namespace

std::unique_ptr<Backend> make_openvino_backend(int threads) {
    if (threads < 0) {
        throw request_error("options.threads must be at least 0, got " + std::to_string(threads) +
                            "; 0 uses every core");
    }
    try {
        return std::make_unique<OpenVinoBackend>(threads);
    } catch (const ov::Exception &e) {
        throw engine_error("OpenVINO cannot start: " + useful_line(e));
    }
}

}  // namespace arcflow
