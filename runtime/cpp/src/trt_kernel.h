// Loads and launches the CUDA kernels of runtime/kernels, for the TensorRT denoiser. The library embeds their source,
// and their compiled code (a fatbin) if it existed when the library was built. Without code for this GPU, NVRTC
// compiles the source, once per machine: the result is kept in the user's cache folder, in the same files as the Python
// runtime's.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "tensor.h"
#include "trt_cuda.h"

namespace arcflow {

// Device addresses for one launch of the update; update.cu gives the shapes. `input` may be 0.
struct UpdateBuffers {
    cuda::Address means, logweights, loggammas, latents, next, input, sigmas;
};

// Sizes and dtypes of an update. `tokens` is B*N, `channels` is C*P. `heads` is the dtype of means, logweights and
// loggammas, `engine_input` that of `input`.
struct UpdateShape {
    int64_t tokens;
    int32_t modes, channels, sub_pixels;
    DType heads, engine_input;
};

// Device addresses for one launch of a straight student's step; euler.cu gives the shapes. `negative` and `scale` are 0
// without guidance, `input` may be 0.
struct EulerBuffers {
    cuda::Address velocity, negative, latents, next, input, sigmas, scale;
};

// Sizes and dtypes of a straight student's step. `tokens` is B*N, and `channels` C*P, a multiple of 8.
struct EulerShape {
    int64_t tokens;
    int32_t channels;
    DType velocity, engine_input;
};

// The launch configuration for a shape (geometry.h). Throws Error if one token's modes do not fit in shared memory.
struct UpdateGeometry {
    unsigned grid, block, shared_bytes;
};
UpdateGeometry update_geometry(const UpdateShape &shape);

// Sizes for one launch of the noise: images of C = `channels`, h = `height`, w = `width` in patches of `patch`. C*h*w
// must be a multiple of noise_group (maths.h), 16. `engine_input` is the dtype of `input`.
struct NoiseShape {
    int32_t images, channels, height, width, patch;
    DType engine_input;
};

// The kernels, loaded on one GPU. Every member function needs the device's context to be current.
class Kernels {
public:
    // `target`: compute capability, such as "sm89". Throws Error if there is neither a fatbin for it nor NVRTC.
    explicit Kernels(const std::string &target);

    // Enqueue the update from sigmas[step] to sigmas[step + 1].
    void update(cuda::Stream &stream, const UpdateShape &shape, UpdateBuffers buffers, int32_t step);

    // Enqueue a straight student's step from sigmas[step] to sigmas[step + 1]. Throws Error if the channels are no
    // multiple of 8.
    void euler(cuda::Stream &stream, const EulerShape &shape, EulerBuffers buffers, int32_t step);

    // Enqueue the noise of a batch. All arguments are device addresses. `streams`: [images, 2] int64: a seed, and how
    // many of its numbers belong to earlier images. `latents`: [images, N, C*p*p] float32. `input`: the same values in
    // `engine_input`, or 0 for none.
    void noise(cuda::Stream &stream, const NoiseShape &shape, cuda::Address streams, cuda::Address latents,
               cuda::Address input);

private:
    std::unique_ptr<cuda::Module> module_;
    std::map<std::pair<DType, DType>, cuda::Handle> updates_, eulers_;
    std::map<DType, cuda::Handle> noises_;
};

// Code for a GPU: a "cubin", or "ptx" that the driver compiles, for a GPU that is newer than NVRTC.
struct KernelCode {
    std::string kind, bytes;
};

// Compile a source with NVRTC, which needs no driver, for `target`. Throws Error.
KernelCode compile_with_nvrtc(const std::string &source, const std::string &target);

// As compile_with_nvrtc, but kept in files of `folder` under a key of source, NVRTC's version and `target`. A file
// starts with the SHA-256 of the code after it, and a damaged one is compiled again. A folder that cannot be written is
// a warning on stderr.
KernelCode cached_code(const std::string &source, const std::string &target, const std::filesystem::path &folder);

}  // namespace arcflow
