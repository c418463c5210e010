// The noise that a denoiser draws of its inputs, by way of the library's own.
#pragma once

#include <cstring>

#include "engine.h"

inline arcflow::Tensor noise_of(const arcflow::DenoiseInputs &in, const arcflow::Latents &latents) {
    arcflow::Tensor noise(arcflow::DType::float32, in.shape);
    const int64_t numbers = in.shape[1] * in.shape[2];
    for (std::size_t i = 0; i < in.streams.size(); ++i) {
        // A batch of one seed, whose last image is this one.
        const int64_t before = in.streams[i].first / numbers;
        const arcflow::Tensor batch =
            arcflow::packed_noise({in.streams[i].seed}, before + 1, latents, in.height_px / latents.vae_scale_factor,
                                  in.width_px / latents.vae_scale_factor);
        std::memcpy(noise.as<float>() + static_cast<int64_t>(i) * numbers, batch.as<float>() + before * numbers,
                    static_cast<std::size_t>(numbers) * sizeof(float));
    }
    return noise;
}
