// Tests of filling in weights, with a refitter that keeps what it is given.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "check.h"
#include "error.h"
#include "trt_refit.h"

namespace {

using namespace arcflow;
using Bytes = std::string;

constexpr int64_t float32 = 1, int64 = 7, float16 = 10, bfloat16 = 16;

// Writes protobuf: a graph needs only numbers and texts.
Bytes varint(uint64_t value) {
    Bytes bytes;
    for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
    return bytes + static_cast<char>(value);
}
Bytes field(uint64_t number, uint64_t value) { return varint(number << 3) + varint(value); }
Bytes field(uint64_t number, const Bytes &bytes) { return varint(number << 3 | 2) + varint(bytes.size()) + bytes; }

Bytes head(const Bytes &name, int64_t type, const std::vector<uint64_t> &dims) {
    Bytes tensor;
    for (const uint64_t size : dims) tensor += field(1, size);
    return tensor + field(2, static_cast<uint64_t>(type)) + field(8, name);
}
Bytes entry(const Bytes &key, const Bytes &value) { return field(13, field(1, key) + field(2, value)); }
Bytes outside(const Bytes &name, int64_t type, const std::vector<uint64_t> &dims, uint64_t offset, uint64_t length) {
    return field(5, head(name, type, dims) + entry("location", "backbone.safetensors") +
                        entry("offset", std::to_string(offset)) + entry("length", std::to_string(length)));
}
Bytes inside(const Bytes &name, int64_t type, const std::vector<uint64_t> &dims, const Bytes &raw) {
    return field(5, head(name, type, dims) + field(9, raw));
}

// A folder with the two files of a part.
struct Files {
    Files(const Bytes &initializers, const Bytes &weights) {
        char name[] = "/tmp/arcflow_refit_XXXXXX";
        bundle.root = mkdtemp(name);
        write("backbone.onnx", field(7, initializers));
        write("backbone.safetensors", weights);
        Part part{};
        part.graph = "backbone.onnx";
        part.weights = "backbone.safetensors";
        bundle.manifest.parts["backbone"] = part;
    }
    ~Files() { std::filesystem::remove_all(bundle.root); }
    Files(const Files &) = delete;
    Files &operator=(const Files &) = delete;

    void write(const Bytes &name, const Bytes &bytes) {
        std::ofstream(bundle.root / name, std::ios::binary) << bytes;
        bundle.manifest.files[name] = {bytes.size(), ""};
    }

    Bundle bundle{};
};

class FakeRefitter : public TrtRefitter {
public:
    explicit FakeRefitter(std::map<std::string, WeightSpec> wanted) : wanted_(std::move(wanted)) {}

    std::vector<std::string> weights() override {
        std::vector<std::string> names;
        for (const auto &[name, spec] : wanted_) names.push_back(name);
        return names;
    }
    WeightSpec spec(const std::string &name) override { return wanted_.at(name); }
    bool set(const std::string &name, const WeightSpec &spec, const void *data) override {
        CHECK(reinterpret_cast<uintptr_t>(data) % 8 == 0);
        CHECK(spec.type == wanted_.at(name).type && spec.count == wanted_.at(name).count);
        given_[name] = data;
        return name != refused;
    }
    std::vector<std::string> missing() override { return still_missing; }
    bool refit() override {
        // Reads the data now, so it must still be valid.
        static const std::map<int64_t, size_t> sizes = {{float32, 4}, {int64, 8}, {float16, 2}, {bfloat16, 2}};
        for (const auto &[name, data] : given_) {
            const WeightSpec &spec = wanted_.at(name);
            const size_t bytes = static_cast<size_t>(spec.count) * sizes.at(spec.type);
            filled[name] = Bytes(static_cast<const char *>(data), bytes);
        }
        return !fails;
    }
    std::string said() override { return ": it said so"; }

    std::string refused;
    std::vector<std::string> still_missing;
    bool fails = false;
    std::map<std::string, Bytes> filled;

private:
    std::map<std::string, WeightSpec> wanted_;
    std::map<std::string, const void *> given_;
};

// 64 bytes of weights: an 8-byte header, `a` [2, 3] float32, `b` [4] bfloat16 at an odd offset, `c` [3] float16.
Bytes some_bytes() {
    Bytes bytes;
    for (int i = 0; i < 64; ++i) bytes += static_cast<char>(i * 7 + 1);
    return bytes;
}
const Bytes scale("\x01\x02\x03\x04", 4), shape("\x05\0\0\0\0\0\0\x06", 8);
Bytes graph() {
    return outside("a", float32, {2, 3}, 8, 24) + outside("b", bfloat16, {4}, 33, 8) +
           outside("c", float16, {3}, 48, 6) + inside("scale", float32, {}, scale) +
           inside("shape", int64, {1}, shape) + inside("unused", float32, {1}, scale);
}
std::map<std::string, WeightSpec> engine() {
    return {
        {"a", {float32, 6}}, {"b", {bfloat16, 4}}, {"c", {float16, 3}}, {"scale", {float32, 1}}, {"shape", {int64, 1}}};
}

int open_files() {
    int count = 0;
    for ([[maybe_unused]] const auto &entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
    return count;
}

int mappings_of(const std::filesystem::path &path) {
    std::ifstream maps("/proc/self/maps");
    int count = 0;
    for (std::string line; std::getline(maps, line);) count += line.find(path.string()) != line.npos;
    return count;
}

void test_every_weight_is_filled_in() {
    const Bytes data = some_bytes();
    Files files(graph(), data);
    FakeRefitter refitter(engine());
    const int open = open_files();
    refit(refitter, files.bundle, "backbone");
    CHECK(refitter.filled == (std::map<std::string, Bytes>{{"a", data.substr(8, 24)},
                                                           {"b", data.substr(33, 8)},
                                                           {"c", data.substr(48, 6)},
                                                           {"scale", scale},
                                                           {"shape", shape}}));
    CHECK(open_files() == open && mappings_of(files.bundle.root) == 0);
}

// The error's text, after checking that no file is left open or mapped.
std::string error_of(Files &files, FakeRefitter &refitter) {
    const int open = open_files();
    std::string said;
    try {
        refit(refitter, files.bundle, "backbone");
    } catch (const Error &e) {
        said = e.what();
    }
    CHECK(open_files() == open && mappings_of(files.bundle.root) == 0);
    return said;
}

std::string error_with(const Bytes &initializers, std::map<std::string, WeightSpec> wanted = engine()) {
    Files files(initializers, some_bytes());
    FakeRefitter refitter(std::move(wanted));
    const std::string said = error_of(files, refitter);
    CHECK(refitter.filled.empty());
    return said;
}

void same(const std::string &got, const std::string &wanted) {
    if (got != wanted) std::fprintf(stderr, "got    %s\nwanted %s\n", got.c_str(), wanted.c_str());
    CHECK(got == wanted);
}

void test_weights_that_do_not_fit() {
    const std::string again = "; build the engine again with `arcflow build`";
    auto wanted = engine();
    wanted["d"] = {float32, 1};
    same(error_with(graph(), wanted),
         "backbone: backbone.onnx lacks weights of the engine, such as \"d\"; build it again with `arcflow build`, "
         "without --strip-weights");
    wanted = engine();
    wanted["a"].count = 5;
    same(error_with(graph(), wanted),
         "backbone: weight \"a\" must have 5 values of ONNX's type 1, got 6 of type 1 in backbone.onnx" + again);
    wanted = engine();
    wanted["b"].type = float16;
    same(error_with(graph(), wanted),
         "backbone: weight \"b\" must have 4 values of ONNX's type 10, got 4 of type 16 in backbone.onnx" + again);
    wanted["b"].type = 0;  // a type that TensorRT has and ONNX does not
    CHECK(error_with(graph(), wanted).find("of ONNX's type 0, got") != std::string::npos);

    const std::map<std::string, WeightSpec> one = {{"a", {float32, 6}}};
    same(error_with(outside("a", float32, {2, 3}, 8, 20), one),
         "backbone: weight \"a\" must have 24 bytes, got 20 bytes of type 1 in backbone.safetensors; export the bundle "
         "again");
    same(error_with(inside("a", float32, {2, 3}, scale), one),
         "backbone: weight \"a\" must have 24 bytes, got 4 bytes of type 1 in backbone.onnx; export the bundle again");
    // Values in float_data instead of raw_data.
    same(error_with(field(5, head("a", float32, {6}) + field(4, Bytes(24, 'x'))), one),
         "backbone: weight \"a\" must have 24 bytes, got 0 bytes of type 1 in backbone.onnx; export the bundle again");
    same(error_with(inside("a", 8, {6}, scale), {{"a", {8, 6}}}),
         "backbone: weight \"a\" must have a type that a bundle may have, got 4 bytes of type 8 in backbone.onnx; "
         "export "
         "the bundle again");
    // The file ends 16 bytes after the offset: without a length, and with one.
    const Bytes rest =
        field(5, head("a", float32, {6}) + entry("location", "backbone.safetensors") + entry("offset", "48"));
    same(error_with(rest, one), "backbone: weight \"a\" must have 24 bytes, got 16 bytes of type 1 in "
                                "backbone.safetensors; export the bundle again");
    CHECK(error_with(outside("a", float32, {2, 3}, 48, 24), one).find("must lie within the 64 bytes") !=
          std::string::npos);
}

void test_sizes_that_overflow() {
    const uint64_t huge = uint64_t{1} << 62;
    CHECK(error_with(outside("a", float32, {huge, huge}, 8, 24)).find("is not an ONNX graph") != std::string::npos);
    CHECK(error_with(outside("a", float32, {uint64_t{1} << 63}, 8, 24)).find("is not an ONNX graph") !=
          std::string::npos);
    CHECK(error_with(outside("a", float32, {huge}, 8, 24), {{"a", {float32, 1LL << 62}}})
              .find("must have a type that a bundle may have") != std::string::npos);
}

void test_packed_sizes() {
    Files files(field(5, field(1, varint(2) + varint(3)) + field(2, 1) + field(8, "a") +
                             entry("location", "backbone.safetensors") + entry("offset", "8")),
                some_bytes());
    FakeRefitter refitter({{"a", {float32, 6}}});
    refit(refitter, files.bundle, "backbone");
    CHECK(refitter.filled.at("a") == some_bytes().substr(8, 24));
}

void test_a_library_that_refuses() {
    Files files(graph(), some_bytes());
    const std::string again = "; build the engine again with `arcflow build`";
    FakeRefitter refusing(engine());
    refusing.refused = "c";
    same(error_of(files, refusing),
         "backbone: weight \"c\" of backbone.safetensors does not fit the engine: it said so" + again);
    FakeRefitter lacking(engine());
    lacking.still_missing = {"x", "y"};
    same(error_of(files, lacking), "backbone: backbone.safetensors lacks weights of the engine, such as \"x\"" + again);
    CHECK(refusing.filled.empty() && lacking.filled.empty());
    FakeRefitter failing(engine());
    failing.fails = true;
    same(error_of(files, failing), "backbone: the weights of backbone.safetensors cannot be filled in: it said so");
}

void test_files_that_changed() {
    Files files(graph(), some_bytes());
    FakeRefitter refitter(engine());
    std::filesystem::resize_file(files.bundle.root / "backbone.safetensors", 40);
    same(error_of(files, refitter),
         (files.bundle.root / "backbone.safetensors").string() + " was changed while it was loaded; load it again");
    std::filesystem::remove(files.bundle.root / "backbone.safetensors");
    same(error_of(files, refitter),
         (files.bundle.root / "backbone.safetensors").string() + " cannot be read; check its permissions");
}

void test_a_library_without_a_refitter() {
    TrtLibrary library{"libnvinfer_lean.so.11", {11, 1, 0, 0}, nullptr, nullptr};
    std::string said;
    try {
        check_can_refit(library, TrtFlavour::tensorrt, "backbone");
    } catch (const Error &e) {
        said = e.what();
        CHECK(e.status == ARCFLOW_ENGINE_ERROR);
    }
    same(said, "backbone: the engine has no weights, and libnvinfer_lean.so.11 has no function "
               "createInferRefitter_INTERNAL to fill them in, as lean libraries do not; install the whole library of "
               "tensorrt, or build the engine without --strip-weights");
    library.create_refitter = [](void *, void *, int32_t) -> void * { return nullptr; };
    check_can_refit(library, TrtFlavour::tensorrt, "backbone");
}

}  // namespace

int main() {
    test_every_weight_is_filled_in();
    test_weights_that_do_not_fit();
    test_sizes_that_overflow();
    test_packed_sizes();
    test_a_library_that_refuses();
    test_files_that_changed();
    test_a_library_without_a_refitter();
    std::puts("ok");
    return 0;
}
