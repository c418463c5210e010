// Runs one step of opening a TensorRT engine, for tests/test_cpp_trt.py: prints its result, or its error and status.
//
//   trt_tool gpu
//   trt_tool library tensorrt|tensorrt-rtx MAJOR MINOR
//   trt_tool find BUNDLE PART BUILDER VERSION TARGET GPU|- PLATFORM fast|full
//   trt_tool platform
//   trt_tool nvrtc TARGET
//   trt_tool geometry TOKENS MODES SUB_PIXELS float32|float16
#include <cstdio>
#include <string>
#include <vector>

#include "error.h"
#include "trt_kernel.h"
#include "trt_library.h"
#include "trt_record.h"
#include "update_embedded.h"

namespace {

using namespace std::string_literals;

void find(const std::vector<std::string> &a) {
    const arcflow::Bundle bundle = arcflow::Bundle::open(a.at(1), false);
    const arcflow::Host host{a.at(3), a.at(4), a.at(5),
                             a.at(6) == "-" ? std::nullopt : std::optional<std::string>(a.at(6)), a.at(7)};
    const arcflow::BuiltEngine engine = arcflow::find_engine(bundle, a.at(2), host);
    arcflow::check_engine(engine, a.at(8) == "full");
    std::printf("%s %llu\n", engine.path.c_str(), static_cast<unsigned long long>(engine.record.bytes));
}

void run(const std::vector<std::string> &a) {
    if (a.at(0) == "gpu") {
        const arcflow::cuda::Device device;
        std::printf("%s %s\n", device.gpu.name.c_str(), device.gpu.target.c_str());
    } else if (a.at(0) == "library") {
        const auto flavour =
            a.at(1) == "tensorrt-rtx" ? arcflow::TrtFlavour::tensorrt_rtx : arcflow::TrtFlavour::tensorrt;
        const arcflow::TrtVersion headers{std::stoi(a.at(2)), std::stoi(a.at(3)), 0, 0};
        std::printf("%s\n", arcflow::open_trt_library(flavour, headers).version.text().c_str());
    } else if (a.at(0) == "find") {
        find(a);
    } else if (a.at(0) == "platform") {
        std::printf("%s\n", arcflow::this_platform().c_str());
    } else if (a.at(0) == "nvrtc") {
        std::fwrite(arcflow::compile_with_nvrtc(update_source, a.at(1)).data(), 1, 4, stdout);
    } else if (a.at(0) == "geometry") {
        const auto heads = a.at(4) == "float32" ? arcflow::DType::float32 : arcflow::DType::float16;
        const arcflow::UpdateGeometry g = arcflow::update_geometry(
            {std::stoll(a.at(1)), std::stoi(a.at(2)), 64, std::stoi(a.at(3)), heads, heads});
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
