// Runs one step of loading a TensorRT engine, for tests/test_cpp_trt*.py: prints the result, or status and error.
//
//   trt_tool gpu
//   trt_tool library tensorrt|tensorrt-rtx MAJOR MINOR
//   trt_tool refitter tensorrt|tensorrt-rtx MAJOR MINOR
//   trt_tool weights BUNDLE PART NAME TYPE COUNT...
//   trt_tool find BUNDLE PART BUILDER VERSION TARGET GPU|- PLATFORM fast|full
//   trt_tool platform
//   trt_tool cache ENGINE VERSION DRIVER GPU [TEXT]
//   trt_tool nvrtc TARGET [CACHE]
//   trt_tool source
//   trt_tool geometry TOKENS MODES SUB_PIXELS float32|float16
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "error.h"
#include "kernels_embedded.h"
#include "sha256.h"
#include "trt_kernel.h"
#include "trt_library.h"
#include "trt_record.h"
#include "trt_refit.h"
#include "trt_runtime_cache.h"

namespace {

using namespace std::string_literals;

void find(const std::vector<std::string> &a) {
    const arcflow::Bundle bundle = arcflow::Bundle::open(a.at(1), false);
    const arcflow::Host host{a.at(3), a.at(4), a.at(5),
                             a.at(6) == "-" ? std::nullopt : std::optional<std::string>(a.at(6)), a.at(7)};
    const arcflow::BuiltEngine engine = arcflow::find_engine(bundle, a.at(2), host);
    arcflow::check_engine(engine, a.at(8) == "full");
    std::printf("%s %llu %d", engine.path.c_str(), static_cast<unsigned long long>(engine.record.bytes),
                engine.record.allocates_when_run ? 1 : 0);
    for (const int64_t bytes : engine.record.activation_bytes) std::printf(" %lld", static_cast<long long>(bytes));
    std::printf("\n");
}

// Prints the SHA-256 of each weight; the arguments give their names, types and counts.
class Printer : public arcflow::TrtRefitter {
public:
    explicit Printer(const std::vector<std::string> &a) {
        for (size_t i = 3; i + 2 < a.size(); i += 3) wanted_[a[i]] = {std::stoll(a[i + 1]), std::stoll(a[i + 2])};
    }
    std::vector<std::string> weights() override {
        std::vector<std::string> names;
        for (const auto &[name, spec] : wanted_) names.push_back(name);
        return names;
    }
    arcflow::WeightSpec spec(const std::string &name) override { return wanted_.at(name); }
    bool set(const std::string &name, const arcflow::WeightSpec &, const void *data) override {
        given_[name] = static_cast<const char *>(data);
        return true;
    }
    std::vector<std::string> missing() override { return {}; }
    bool refit() override {
        static const std::map<int64_t, size_t> sizes = {{1, 4}, {7, 8}, {9, 1}, {10, 2}, {16, 2}, {17, 1}};
        for (const auto &[name, data] : given_) {
            const auto &[type, count] = wanted_.at(name);
            const std::string_view bytes(data, static_cast<size_t>(count) * sizes.at(type));
            std::printf("%s %s\n", name.c_str(), arcflow::sha256(bytes).c_str());
        }
        return true;
    }
    std::string said() override { return ""; }

private:
    std::map<std::string, arcflow::WeightSpec> wanted_;
    std::map<std::string, const char *> given_;
};

arcflow::TrtFlavour flavour_of(const std::string &name) {
    return name == "tensorrt-rtx" ? arcflow::TrtFlavour::tensorrt_rtx : arcflow::TrtFlavour::tensorrt;
}

arcflow::TrtLibrary open_library(const std::vector<std::string> &a) {
    return arcflow::open_trt_library(flavour_of(a.at(1)), {std::stoi(a.at(2)), std::stoi(a.at(3)), 0, 0});
}

void run(const std::vector<std::string> &a) {
    if (a.at(0) == "gpu") {
        const arcflow::cuda::Device device;
        std::printf("%s %s\n", device.gpu.name.c_str(), device.gpu.target.c_str());
    } else if (a.at(0) == "library") {
        std::printf("%s\n", open_library(a).version.text().c_str());
    } else if (a.at(0) == "refitter") {
        arcflow::check_can_refit(open_library(a), flavour_of(a.at(1)), "backbone");
    } else if (a.at(0) == "weights") {
        Printer printer(a);
        arcflow::refit(printer, arcflow::Bundle::open(a.at(1), false), a.at(2));
    } else if (a.at(0) == "find") {
        find(a);
    } else if (a.at(0) == "platform") {
        std::printf("%s\n", arcflow::this_platform().c_str());
    } else if (a.at(0) == "cache") {
        arcflow::RuntimeCacheFile file({a.at(1), a.at(2), a.at(3), a.at(4)}, arcflow::cache_folder().value());
        std::printf("%s %s\n", file.path.c_str(), file.read().value_or("nothing").c_str());
        if (a.size() > 5) file.write(a[5]);
    } else if (a.at(0) == "nvrtc") {
        const arcflow::KernelCode code = a.size() < 3 ? arcflow::compile_with_nvrtc(kernels_source, a.at(1))
                                                      : arcflow::cached_code(kernels_source, a.at(1), a.at(2));
        std::printf("%s %s\n", code.kind.c_str(), arcflow::sha256(code.bytes).c_str());
    } else if (a.at(0) == "source") {
        std::fputs(kernels_source, stdout);
    } else if (a.at(0) == "geometry") {
        const auto heads = a.at(4) == "float32" ? arcflow::DType::float32 : arcflow::DType::float16;
        const arcflow::UpdateGeometry g =
            arcflow::update_geometry({std::stoll(a.at(1)), std::stoi(a.at(2)), 64, std::stoi(a.at(3)), heads, heads});
        std::printf("%u %u %u\n", g.grid, g.block, g.shared_bytes);
    } else {
        throw std::invalid_argument(a.at(0));
    }
}

}  // namespace

int main(int count, char **arguments) {
    try {
        run(std::vector<std::string>(arguments + 1, arguments + count));
    } catch (const arcflow::Error &e) {
        std::fprintf(stderr, "%d %s\n", static_cast<int>(e.status), e.what());
        return 1;
    } catch (const std::exception &e) {
        std::fprintf(stderr, "usage: %s\n", e.what());
        return 2;
    }
    return 0;
}
