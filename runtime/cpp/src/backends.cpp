// Makes a backend from its name; this build's options decide which names there are.
#include "engine.h"
#include "error.h"
#include "json_text.h"
#ifdef ARCFLOW_WITH_OPENVINO
#include "openvino_backend.h"
#endif
#ifdef ARCFLOW_WITH_TENSORRT
#include "trt_backend.h"
#endif

namespace arcflow {
namespace {

// The first is the default.
constexpr const char *known[] = {
#ifdef ARCFLOW_WITH_OPENVINO
    "openvino",
#endif
#ifdef ARCFLOW_WITH_TENSORRT
    "tensorrt",
    "tensorrt-rtx",
#endif
    nullptr,
};

std::string joined_names() {
    std::string joined;
    for (const char *const *name = known; *name != nullptr; ++name)
        joined += (joined.empty() ? "" : ",") + std::string(*name);
    return joined;
}

}  // namespace

const char *backend_names() {
    static const std::string joined = joined_names();
    return joined.c_str();
}

std::unique_ptr<Backend> make_backend(const std::string &name, [[maybe_unused]] int threads) {
    [[maybe_unused]] const std::string wanted = name.empty() && known[0] != nullptr ? known[0] : name;
#ifdef ARCFLOW_WITH_OPENVINO
    if (wanted == "openvino") return make_openvino_backend(threads);
#endif
#ifdef ARCFLOW_WITH_TENSORRT
    if (wanted == "tensorrt" || wanted == "tensorrt-rtx") return make_trt_backend(wanted == "tensorrt-rtx");
#endif
    if (known[0] == nullptr) {
        throw engine_error("this library was built without backends; build it with -DARCFLOW_OPENVINO=ON or "
                           "-DARCFLOW_TENSORRT=ON");
    }
    throw engine_error("options.backend must be one of " + std::string(backend_names()) + ", got " + json_text(name));
}

}  // namespace arcflow
