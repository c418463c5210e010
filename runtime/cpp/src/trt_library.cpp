// Opens the shared library of TensorRT or TensorRT-RTX.
#include "trt_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <type_traits>
#include <vector>

#include "error.h"

namespace arcflow {
namespace {

std::vector<std::string> file_names(TrtFlavour flavour, int major) {
    const std::string suffix = ".so." + std::to_string(major);
    if (flavour == TrtFlavour::tensorrt_rtx) return {"libtensorrt_rtx" + suffix};
    return {"libnvinfer" + suffix, "libnvinfer_lean" + suffix};
}

const char *variable(TrtFlavour flavour) {
    return flavour == TrtFlavour::tensorrt_rtx ? "ARCFLOW_TENSORRT_RTX_LIBRARY" : "ARCFLOW_TENSORRT_LIBRARY";
}

void *open_first(TrtFlavour flavour, int major, std::string &opened) {
    std::vector<std::string> names = file_names(flavour, major);
    const char *named = std::getenv(variable(flavour));
    if (named != nullptr && *named != '\0') names = {named};
    std::string why;
    for (const std::string &name : names) {
        if (void *library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) {
            opened = name;
            return library;
        }
        const char *text = dlerror();
        why += (why.empty() ? "" : "; ") + std::string(text ? text : name + " cannot be opened");
    }
    throw engine_error(std::string(name_of(flavour)) + " cannot be loaded (" + why +
                       "); install it, and add its folder "
                       "to LD_LIBRARY_PATH or name its file in " +
                       variable(flavour));
}

template <class Function> Function *find(void *library, const std::string &file, const char *name) {
    void *found = dlsym(library, name);
    if (found == nullptr)
        throw engine_error(file + " has no function " + name + ", so it is not TensorRT's library; name the right one");
    return reinterpret_cast<Function *>(found);
}

}  // namespace

const char *name_of(TrtFlavour flavour) { return flavour == TrtFlavour::tensorrt_rtx ? "tensorrt-rtx" : "tensorrt"; }

std::string TrtVersion::text() const {
    return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch) + "." +
           std::to_string(build);
}

TrtLibrary open_trt_library(TrtFlavour flavour, const TrtVersion &headers) {
    std::string file;
    // Never closed, because it registers objects in the process that must stay.
    void *library = open_first(flavour, headers.major, file);
    const auto number = [&](const char *name) { return find<int32_t()>(library, file, name)(); };
    const TrtVersion version{number("getInferLibMajorVersion"), number("getInferLibMinorVersion"),
                             number("getInferLibPatchVersion"), number("getInferLibBuildVersion")};
    // TensorRT-RTX started with version 1, and TensorRT has these functions since version 10, so the major version
    // tells the two apart.
    const bool is_rtx = version.major < 10, wants_rtx = flavour == TrtFlavour::tensorrt_rtx;
    if (is_rtx != wants_rtx) {
        throw engine_error(file + " is " + name_of(is_rtx ? TrtFlavour::tensorrt_rtx : TrtFlavour::tensorrt) + " " +
                           version.text() + ", must be " + name_of(flavour) + "; name the right library in " +
                           variable(flavour));
    }
    if (version.major != headers.major || version.minor < headers.minor) {
        throw engine_error(file + " is " + name_of(flavour) + " " + version.text() +
                           ", and this library was built for " + headers.text() + "; install " +
                           std::to_string(headers.major) + "." + std::to_string(headers.minor) +
                           " or newer of that major version, or build this library "
                           "with TRT_ROOT of the one that is installed");
    }
    // The lean library has no refitter.
    void *refitter = dlsym(library, "createInferRefitter_INTERNAL");
    return {file, version, find<void *(void *, int32_t)>(library, file, "createInferRuntime_INTERNAL"),
            reinterpret_cast<void *(*)(void *, void *, int32_t)>(refitter)};
}

}  // namespace arcflow
