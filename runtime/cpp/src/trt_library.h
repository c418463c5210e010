// TensorRT's and TensorRT-RTX's libraries, opened at run time: a flavour -> its library, version checked, nothing
// called.
#pragma once

#include <cstdint>
#include <string>

namespace arcflow {

// The two libraries; their headers, names and engines differ.
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
    void *(*create_refitter)(void *engine, void *logger, int32_t version);  // null where the library has none
};

// Open the library that headers of `headers` version can be used with: of the same flavour and major version, and no
// older. The environment's ARCFLOW_TENSORRT_LIBRARY or ARCFLOW_TENSORRT_RTX_LIBRARY names its file; otherwise the usual
// names are looked up as dlopen does. Only the functions that tell its version are called, which need no driver.
// Throws Error.
TrtLibrary open_trt_library(TrtFlavour flavour, const TrtVersion &headers);

}  // namespace arcflow
