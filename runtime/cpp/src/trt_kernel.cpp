// Loads and launches the CUDA kernels.
#include "trt_kernel.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <system_error>
#include <type_traits>
#include <vector>

#include "error.h"
#include "geometry.h"
#include "kernels_embedded.h"
#include "sha256.h"
#include "trt_runtime_cache.h"

namespace arcflow {
namespace {

struct Nvrtc {
    int (*nvrtcVersion)(int *, int *);
    int (*nvrtcGetNumSupportedArchs)(int *);
    int (*nvrtcGetSupportedArchs)(int *);
    int (*nvrtcCreateProgram)(void **, const char *, const char *, int, const char *const *, const char *const *);
    int (*nvrtcCompileProgram)(void *, int, const char *const *);
    int (*nvrtcGetCUBINSize)(void *, size_t *);
    int (*nvrtcGetCUBIN)(void *, char *);
    int (*nvrtcGetPTXSize)(void *, size_t *);
    int (*nvrtcGetPTX)(void *, char *);
    int (*nvrtcGetProgramLogSize)(void *, size_t *);
    int (*nvrtcGetProgramLog)(void *, char *);
    int (*nvrtcDestroyProgram)(void **);

    Nvrtc() {
        void *library = nullptr;
        for (const char *name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"})
            if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            throw engine_error("NVRTC, which compiles the CUDA kernels, cannot be loaded; install the CUDA toolkit's "
                               "package cuda-nvrtc, or run `pip install nvidia-cuda-nvrtc` and name the folder of its "
                               "libnvrtc.so in LD_LIBRARY_PATH; or build this library after "
                               "runtime/kernels/build.py, which needs nvcc");
        }
        const auto find = [&](auto &function, const char *name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (function == nullptr) throw engine_error(std::string("NVRTC has no ") + name + "; update it");
        };
#define ARCFLOW_FIND(name) find(name, #name)
        ARCFLOW_FIND(nvrtcVersion);
        ARCFLOW_FIND(nvrtcGetNumSupportedArchs);
        ARCFLOW_FIND(nvrtcGetSupportedArchs);
        ARCFLOW_FIND(nvrtcCreateProgram);
        ARCFLOW_FIND(nvrtcCompileProgram);
        ARCFLOW_FIND(nvrtcGetCUBINSize);
        ARCFLOW_FIND(nvrtcGetCUBIN);
        ARCFLOW_FIND(nvrtcGetPTXSize);
        ARCFLOW_FIND(nvrtcGetPTX);
        ARCFLOW_FIND(nvrtcGetProgramLogSize);
        ARCFLOW_FIND(nvrtcGetProgramLog);
        ARCFLOW_FIND(nvrtcDestroyProgram);
#undef ARCFLOW_FIND
    }

    // "13.0".
    std::string version() const {
        int major = 0, minor = 0;
        if (nvrtcVersion(&major, &minor) != 0) throw engine_error("NVRTC does not tell its version; install it again");
        return std::to_string(major) + "." + std::to_string(minor);
    }

    // The newest architecture that NVRTC compiles for and that runs on `target`, such as 89.
    int architecture(const std::string &target) const {
        int count = 0, best = 0;
        if (nvrtcGetNumSupportedArchs(&count) != 0 || count < 0)
            throw engine_error("NVRTC does not list its architectures; install it again");
        std::vector<int> known(static_cast<size_t>(count));
        if (nvrtcGetSupportedArchs(known.data()) != 0)
            throw engine_error("NVRTC does not list its architectures; install it again");
        const int wanted = std::stoi(target.substr(2));
        for (const int one : known)
            if (one <= wanted) best = std::max(best, one);
        if (best == 0) {
            throw engine_error("NVRTC has no architecture up to " + target +
                               "; use a GPU of compute capability 7.5 or newer");
        }
        return best;
    }
};

constexpr size_t digest_bytes = 32, key_digits = 32;

// The SHA-256 of a text in binary form.
std::string digest(std::string_view text) {
    const std::string digits = sha256(text);
    std::string bytes;
    for (size_t i = 0; i < digits.size(); i += 2)
        bytes += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
    return bytes;
}

}  // namespace

KernelCode compile_with_nvrtc(const std::string &source, const std::string &target) {
    const Nvrtc nvrtc;
    const int known = nvrtc.architecture(target);
    const bool exact = target == "sm" + std::to_string(known);
    const std::string architecture = (exact ? "sm_" : "compute_") + std::to_string(known);
    const std::string option = "--gpu-architecture=" + architecture;
    const char *options[] = {option.c_str(), "--std=c++17"};
    void *program = nullptr;
    int result = nvrtc.nvrtcCreateProgram(&program, source.c_str(), "arcflow.cu", 0, nullptr, nullptr);
    if (result == 0) result = nvrtc.nvrtcCompileProgram(program, 2, options);
    size_t size = 0;
    KernelCode code{exact ? "cubin" : "ptx", {}};
    std::string log;
    if (result == 0) result = (exact ? nvrtc.nvrtcGetCUBINSize : nvrtc.nvrtcGetPTXSize)(program, &size);
    if (result == 0) {
        code.bytes.resize(size);
        result = (exact ? nvrtc.nvrtcGetCUBIN : nvrtc.nvrtcGetPTX)(program, code.bytes.data());
    }
    if (result != 0 && program != nullptr && nvrtc.nvrtcGetProgramLogSize(program, &size) == 0) {
        log.resize(size);
        nvrtc.nvrtcGetProgramLog(program, log.data());
        while (!log.empty() && log.back() == '\0') log.pop_back();
    }
    if (program != nullptr) nvrtc.nvrtcDestroyProgram(&program);
    if (result != 0) {
        throw engine_error("NVRTC cannot compile the kernels for " + architecture + " (error " +
                           std::to_string(result) + "): " + log);
    }
    return code;
}

KernelCode cached_code(const std::string &source, const std::string &target, const std::filesystem::path &folder) {
    const std::string key = sha256(Nvrtc().version() + "\n" + target.substr(2) + "\n" + source).substr(0, key_digits);
    const auto path = [&](const std::string &kind) { return folder / ("kernels-" + key + "." + kind); };
    for (const char *kind : {"cubin", "ptx"}) {
        const std::optional<std::string> data = read_whole(path(kind), max_runtime_cache_bytes);
        if (!data || data->size() <= digest_bytes) continue;
        std::string bytes = data->substr(digest_bytes);
        if (digest(bytes) == data->substr(0, digest_bytes)) return {kind, std::move(bytes)};
    }
    KernelCode code = compile_with_nvrtc(source, target);
    if (const int error = replace_whole(path(code.kind), digest(code.bytes) + code.bytes); error != 0) {
        std::fprintf(stderr, "arcflow: the compiled kernels cannot be kept in %s: %s\n", folder.c_str(),
                     std::generic_category().message(error).c_str());
    }
    return code;
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
        } catch (const Error &e) {  // the fatbin has no code for this GPU; NVRTC may
            if (e.status == ARCFLOW_OUT_OF_MEMORY) throw;
        }
    }
    if (!module_) {
        const std::optional<std::filesystem::path> folder = cache_folder();
        const KernelCode code =
            folder ? cached_code(kernels_source, target, *folder) : compile_with_nvrtc(kernels_source, target);
        module_ = std::make_unique<cuda::Module>(code.bytes.c_str());
    }
    const DType floats[] = {DType::float32, DType::float16, DType::bfloat16};
    for (const DType heads : floats) {
        noises_[heads] = module_->function((std::string("arcflow_noise_") + name_of(heads)).c_str());
        for (const DType input : floats) {
            const std::string types = std::string(name_of(heads)) + "_" + name_of(input);
            updates_[{heads, input}] = module_->function(("arcflow_update_" + types).c_str());
            eulers_[{heads, input}] = module_->function(("arcflow_euler_" + types).c_str());
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
    stream.launch(updates_.at({shape.heads, shape.engine_input}), geometry.grid, geometry.block, geometry.shared_bytes,
                  arguments);
}

void Kernels::euler(cuda::Stream &stream, const EulerShape &shape, EulerBuffers buffers, int32_t step) {
    if (shape.channels % 8 != 0) {
        throw engine_error("the kernel for a straight step takes a multiple of 8 channels, got " +
                           std::to_string(shape.channels));
    }
    const int64_t lanes = shape.velocity == DType::float32 ? ARCFLOW_UPDATE_LANES_32_BIT : ARCFLOW_UPDATE_LANES_16_BIT;
    const int64_t tokens_of_block = ARCFLOW_EULER_THREADS / lanes;
    long long tokens = shape.tokens;
    int32_t channels = shape.channels;
    void *arguments[] = {&buffers.velocity, &buffers.negative, &buffers.latents, &buffers.next, &buffers.input,
                         &buffers.sigmas,   &buffers.scale,    &tokens,          &step,         &channels};
    stream.launch(eulers_.at({shape.velocity, shape.engine_input}),
                  static_cast<unsigned>((tokens + tokens_of_block - 1) / tokens_of_block), ARCFLOW_EULER_THREADS, 0,
                  arguments);
}

void Kernels::noise(cuda::Stream &stream, const NoiseShape &shape, cuda::Address streams, cuda::Address latents,
                    cuda::Address input) {
    int32_t channels = shape.channels, height = shape.height, width = shape.width, patch = shape.patch;
    void *arguments[] = {&streams, &latents, &input, &channels, &height, &width, &patch};
    stream.launch(noises_.at(shape.engine_input), static_cast<unsigned>(shape.images), ARCFLOW_NOISE_THREADS,
                  ARCFLOW_NOISE_SHARED_BYTES, arguments);
}

}  // namespace arcflow
