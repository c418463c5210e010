// Every part of the bundles in ARCFLOW_TEST_BUNDLES (paths separated by ':') runs on OpenVINO: outputs have the
// manifest's shapes and are finite, inputs stay as they were, and 4 threads at once get the bits that one gets.
// tests/test_cpp_openvino.py compares the values with ONNX Runtime's. Returns 77, "skipped", without bundles.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <thread>

#include "engine.h"
#include "error.h"
#include "tokenizer.h"

namespace {

int failures = 0;

void expect(bool ok, const std::string &what) {
    if (!ok) {
        std::fprintf(stderr, "FAILED: %s\n", what.c_str());
        ++failures;
    }
}

// The size that each named dimension gets.
int64_t size_of_dimension(const arcflow::Dimension &dimension) {
    if (const auto *fixed = std::get_if<int64_t>(&dimension)) return *fixed;
    const std::string &name = std::get<std::string>(dimension);
    return name == "batch" ? 2 : name == "steps" ? 3 : 4;
}

// Fill a tensor with numbers between -1 and 1 from a linear congruential generator, or with small ids.
arcflow::Tensor filled(const arcflow::TensorSpec &spec, uint32_t seed) {
    std::vector<int64_t> shape;
    for (const arcflow::Dimension &dimension : spec.shape) shape.push_back(size_of_dimension(dimension));
    const bool is_float = spec.dtype != arcflow::DType::int64;
    arcflow::Tensor tensor(is_float ? arcflow::DType::float32 : arcflow::DType::int64, shape);
    uint32_t state = seed;
    for (int64_t i = 0; i < tensor.count(); ++i) {
        state = state * 1664525u + 1013904223u;
        if (is_float) tensor.as<float>()[i] = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
        else tensor.as<int64_t>()[i] = state >> 28;
    }
    return is_float ? arcflow::cast(std::move(tensor), spec.dtype) : tensor;
}

arcflow::Tensors inputs_of(const arcflow::Part &part, uint32_t seed) {
    arcflow::Tensors inputs;
    for (const arcflow::TensorSpec &spec : part.inputs) inputs.emplace(spec.name, filled(spec, seed += 7));
    return inputs;
}

bool same(const arcflow::Tensors &a, const arcflow::Tensors &b) {
    for (const auto &[name, tensor] : a) {
        const arcflow::Tensor &other = b.at(name);
        if (tensor.shape != other.shape || tensor.data != other.data) return false;
    }
    return a.size() == b.size();
}

void test_part(arcflow::Backend &backend, const arcflow::Bundle &bundle, const std::string &name) {
    constexpr uint32_t callers = 4;
    const arcflow::Part &part = bundle.manifest.parts.at(name);
    const auto engine = backend.open(bundle, name);
    std::vector<arcflow::Tensors> inputs, expected, got(callers);
    for (uint32_t i = 0; i < callers; ++i) {
        inputs.push_back(inputs_of(part, i));
        expected.push_back(engine->run(inputs[i]));
        expect(same(inputs[i], inputs_of(part, i)), name + ": inputs stay as they were");
        for (const arcflow::TensorSpec &spec : part.outputs) {
            const arcflow::Tensor &output = expected[i].at(spec.name);
            expect(output.dtype == spec.dtype && output.shape.size() == spec.shape.size(), name + ": " + spec.name);
            if (output.dtype == arcflow::DType::float32) {
                for (int64_t k = 0; k < output.count(); ++k) {
                    if (!std::isfinite(output.as<float>()[k])) {
                        expect(false, name + ": " + spec.name + " is finite");
                        break;
                    }
                }
            }
        }
    }
    expect(!same(expected[0], expected[1]), name + ": other inputs give other outputs");
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < callers; ++i) threads.emplace_back([&, i] { got[i] = engine->run(inputs[i]); });
    for (std::thread &thread : threads) thread.join();
    for (uint32_t i = 0; i < callers; ++i)
        expect(same(got[i], expected[i]), name + ": the same bits from several threads");
    try {
        engine->run({});
        expect(false, name + ": missing inputs are refused");
    } catch (const arcflow::Error &e) {
        expect(e.status == ARCFLOW_ENGINE_ERROR && std::strstr(e.what(), "is missing") != nullptr, e.what());
    }
}

void test_bundle(const std::string &path) {
    const arcflow::Bundle bundle = arcflow::Bundle::open(path, true);
    const auto backend = arcflow::make_backend("openvino", 2);
    backend->check(bundle);
    for (const auto &[name, part] : bundle.manifest.parts) {
        test_part(*backend, bundle, name);
        std::printf("%s: %s\n", path.c_str(), name.c_str());
    }
}

}  // namespace

int main() {
    const char *paths = std::getenv("ARCFLOW_TEST_BUNDLES");
    if (paths == nullptr || *paths == '\0') {
        std::puts("ARCFLOW_TEST_BUNDLES names no bundles");
        return 77;
    }
    try {
        arcflow::make_backend("abacus", 0);
        expect(false, "an unknown backend is refused");
    } catch (const arcflow::Error &e) {
        expect(std::strstr(e.what(), "backend must be one of openvino") == e.what(), e.what());
    }
    try {
        std::istringstream list(paths);
        for (std::string path; std::getline(list, path, ':');) test_bundle(path);
    } catch (const std::exception &e) {
        expect(false, e.what());
    }
    return failures == 0 ? 0 : 1;
}
