// Finds the shared library of TensorRT or TensorRT-RTX at run time and checks its version.
#pragma once

#include <cstdint>
#include <string>

namespace arcflow {

// The two libraries. They have separate headers, file names and engines.
enum class TrtFlavour { tensorrt, tensorrt_rtx };

const char *name_of(TrtFlavour flavour);

struct TrtVersion {
    int major, minor, patch, build;

    std::string text() const;  // "11.1.0.106", as an engine's record has it
};

struct TrtLibrary {
    std::string file;
    TrtVersion version;
    void *(*create_runtime)(void *logger, int32_t version);
    void *(*create_refitter)(void *engine, void *logger, int32_t version);  // null if the library has none
};

// Open a library that fits headers of version `headers`: same flavour, same major version, not older. The environment
// variable ARCFLOW_TENSORRT_LIBRARY or ARCFLOW_TENSORRT_RTX_LIBRARY names its file; otherwise dlopen searches the usual
// names. Calls only functions that return the version, which need no driver. Throws Error.
TrtLibrary open_trt_library(TrtFlavour flavour, const TrtVersion &headers);

}  // namespace arcflow
