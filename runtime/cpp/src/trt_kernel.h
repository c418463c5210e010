// The kernels (runtime/kernels: update.cu and noise.cu), embedded in the library: a fatbin where one was made before
// the build, or their source, which NVRTC compiles when it is loaded.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "tensor.h"
#include "trt_cuda.h"

namespace arcflow {

// Addresses of one launch, all in device memory; update.cu has their shapes. `input` may be 0.
struct UpdateBuffers {
    cuda::Address means, logweights, loggammas, latents, next, input, sigmas;
};

// Sizes and dtypes: tokens is B*N, channels C*P; `heads` of means, logweights and loggammas, `engine_input` of `input`.
struct UpdateShape {
    int64_t tokens;
    int32_t modes, channels, sub_pixels;
    DType heads, engine_input;
};

// How the kernel is launched for a shape. Throws Error where a token's modes do not fit in shared memory.
struct UpdateGeometry {
    unsigned grid, block, shared_bytes;
};
UpdateGeometry update_geometry(const UpdateShape &shape);

// What a launch of the noise works on: images of `channels` C, `height` h and `width` w in patches of `patch`, where
// C*h*w is a multiple of noise_group; `engine_input` of `input`.
struct NoiseShape {
    int32_t images, channels, height, width, patch;
    DType engine_input;
};

// The kernels on one GPU; a device's context must be current for everything.
class Kernels {
public:
    // `target` is the GPU's compute capability, such as "sm89". Throws Error where there is neither a fatbin that runs
    // on it nor NVRTC.
    explicit Kernels(const std::string &target);

    // Enqueue the step from sigmas[step] to sigmas[step + 1].
    void update(cuda::Stream &stream, const UpdateShape &shape, UpdateBuffers buffers, int32_t step);

    // Enqueue the noise of a batch. `streams` [images, 2] int64, seeds and first numbers; `latents` [images, N, C*p*p]
    // float32; `input` the same in the engine's input type, or 0. All are addresses in device memory.
    void noise(cuda::Stream &stream, const NoiseShape &shape, cuda::Address streams, cuda::Address latents,
               cuda::Address input);

private:
    std::unique_ptr<cuda::Module> module_;
    std::map<std::pair<DType, DType>, cuda::Handle> updates_;
    std::map<DType, cuda::Handle> noises_;
};

// NVRTC's cubin of a source for a target, through libnvrtc, which needs no driver. Throws Error.
std::string compile_with_nvrtc(const char *source, const std::string &target);

}  // namespace arcflow
