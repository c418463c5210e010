// Loads and launches the CUDA kernels.
#include "trt_kernel.h"

#include <dlfcn.h>

#include <type_traits>

#include "error.h"
#include "geometry.h"
#include "kernels_embedded.h"

namespace arcflow {
namespace {

struct Nvrtc {
    int (*nvrtcCreateProgram)(void **, const char *, const char *, int, const char *const *, const char *const *);
    int (*nvrtcCompileProgram)(void *, int, const char *const *);
    int (*nvrtcGetCUBINSize)(void *, size_t *);
    int (*nvrtcGetCUBIN)(void *, char *);
    int (*nvrtcGetProgramLogSize)(void *, size_t *);
    int (*nvrtcGetProgramLog)(void *, char *);
    int (*nvrtcDestroyProgram)(void **);

    Nvrtc() {
        void *library = nullptr;
        for (const char *name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"})
            if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            throw engine_error("the kernels are compiled by NVRTC, which cannot be loaded; install CUDA's NVRTC, or "
                               "run runtime/kernels/build.py before this library is built");
        }
        const auto find = [&](auto &function, const char *name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (function == nullptr) throw engine_error(std::string("NVRTC has no ") + name + "; update it");
        };
#define ARCFLOW_FIND(name) find(name, #name)
        ARCFLOW_FIND(nvrtcCreateProgram);
        ARCFLOW_FIND(nvrtcCompileProgram);
        ARCFLOW_FIND(nvrtcGetCUBINSize);
        ARCFLOW_FIND(nvrtcGetCUBIN);
        ARCFLOW_FIND(nvrtcGetProgramLogSize);
        ARCFLOW_FIND(nvrtcGetProgramLog);
        ARCFLOW_FIND(nvrtcDestroyProgram);
#undef ARCFLOW_FIND
    }
};

}  // namespace

std::string compile_with_nvrtc(const char *source, const std::string &target) {
    const Nvrtc nvrtc;
    void *program = nullptr;
    const std::string architecture = "--gpu-architecture=sm_" + target.substr(2);
    const char *options[] = {architecture.c_str(), "--std=c++17"};
    int result = nvrtc.nvrtcCreateProgram(&program, source, "arcflow.cu", 0, nullptr, nullptr);
    if (result == 0) result = nvrtc.nvrtcCompileProgram(program, 2, options);
    size_t size = 0;
    std::string cubin, log;
    if (result == 0) result = nvrtc.nvrtcGetCUBINSize(program, &size);
    if (result == 0) {
        cubin.resize(size);
        result = nvrtc.nvrtcGetCUBIN(program, cubin.data());
    }
    if (result != 0 && program != nullptr && nvrtc.nvrtcGetProgramLogSize(program, &size) == 0) {
        log.resize(size);
        nvrtc.nvrtcGetProgramLog(program, log.data());
        while (!log.empty() && log.back() == '\0') log.pop_back();
    }
    if (program != nullptr) nvrtc.nvrtcDestroyProgram(&program);
    if (result != 0) {
        throw engine_error("NVRTC cannot compile the kernels for " + target + " (error " + std::to_string(result) +
                           "): " + log);
    }
    return cubin;
}

UpdateGeometry update_geometry(const UpdateShape &shape) {
    const unsigned lanes = shape.heads == DType::float32 ? ARCFLOW_UPDATE_LANES_32_BIT : ARCFLOW_UPDATE_LANES_16_BIT;
    const uint64_t token_bytes =
        ARCFLOW_UPDATE_TOKEN_FLOATS(static_cast<uint64_t>(shape.modes), static_cast<uint64_t>(shape.sub_pixels)) *
        sizeof(float);
    for (unsigned threads = ARCFLOW_UPDATE_THREADS; threads >= ARCFLOW_UPDATE_MIN_THREADS; threads /= 2) {
        const unsigned tokens = threads / lanes;
        const uint64_t shared = ARCFLOW_UPDATE_BLOCK_BYTES + tokens * token_bytes;
        if (shared > ARCFLOW_MAX_SHARED_BYTES) continue;
        const uint64_t grid = (static_cast<uint64_t>(shape.tokens) + tokens - 1) / tokens;
        return {static_cast<unsigned>(grid), threads, static_cast<unsigned>(shared)};
    }
    const unsigned most = (ARCFLOW_MAX_SHARED_BYTES - ARCFLOW_UPDATE_BLOCK_BYTES) * lanes / ARCFLOW_UPDATE_MIN_THREADS;
    throw engine_error("the update kernel takes at most " + std::to_string(most) +
                       " bytes per token for its modes, got " + std::to_string(token_bytes) + " for " +
                       std::to_string(shape.modes) + " modes of " + std::to_string(shape.sub_pixels) + " sub-pixels");
}

Kernels::Kernels(const std::string &target) {
    if (kernels_fatbin_bytes > 0) {
        try {
            module_ = std::make_unique<cuda::Module>(kernels_fatbin);
        } catch (const Error &) {  // the fatbin has no code for this GPU; NVRTC may
        }
    }
    if (!module_) module_ = std::make_unique<cuda::Module>(compile_with_nvrtc(kernels_source, target).data());
    const DType floats[] = {DType::float32, DType::float16, DType::bfloat16};
    for (const DType heads : floats) {
        noises_[heads] = module_->function((std::string("arcflow_noise_") + name_of(heads)).c_str());
        for (const DType input : floats) {
            const std::string name = std::string("arcflow_update_") + name_of(heads) + "_" + name_of(input);
            updates_[{heads, input}] = module_->function(name.c_str());
        }
    }
}

void Kernels::update(cuda::Stream &stream, const UpdateShape &shape, UpdateBuffers buffers, int32_t step) {
    const UpdateGeometry geometry = update_geometry(shape);
    long long tokens = shape.tokens;
    int32_t modes = shape.modes, channels = shape.channels, sub_pixels = shape.sub_pixels;
    void *arguments[] = {&buffers.means,
                         &buffers.logweights,
                         &buffers.loggammas,
                         &buffers.latents,
                         &buffers.next,
                         &buffers.input,
                         &buffers.sigmas,
                         &tokens,
                         &step,
                         &modes,
                         &channels,
                         &sub_pixels};
    cuda::launch(updates_.at({shape.heads, shape.engine_input}), geometry.grid, geometry.block, geometry.shared_bytes,
                 stream.handle, arguments);
}

void Kernels::noise(cuda::Stream &stream, const NoiseShape &shape, cuda::Address streams, cuda::Address latents,
                    cuda::Address input) {
    int32_t channels = shape.channels, height = shape.height, width = shape.width, patch = shape.patch;
    void *arguments[] = {&streams, &latents, &input, &channels, &height, &width, &patch};
    cuda::launch(noises_.at(shape.engine_input), static_cast<unsigned>(shape.images), ARCFLOW_NOISE_THREADS,
                 ARCFLOW_NOISE_SHARED_BYTES, stream.handle, arguments);
}

}  // namespace arcflow
