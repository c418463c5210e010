// The noise that a Denoiser must generate for its inputs, by the library's own host function.
#pragma once

#include <cstring>

#include "engine.h"

inline arcflow::Tensor noise_of(const arcflow::DenoiseInputs &in, const arcflow::Latents &latents) {
    arcflow::Tensor noise(arcflow::DType::float32, in.shape);
    const int64_t numbers = in.shape[1] * in.shape[2];
    for (std::size_t i = 0; i < in.streams.size(); ++i) {
        // The last image of a batch with one seed is this image.
        const int64_t before = in.streams[i].first / numbers;
        const arcflow::Tensor batch =
            arcflow::packed_noise({in.streams[i].seed}, before + 1, latents, in.height_px / latents.vae_scale_factor,
                                  in.width_px / latents.vae_scale_factor);
        std::memcpy(noise.as<float>() + static_cast<int64_t>(i) * numbers, batch.as<float>() + before * numbers,
                    static_cast<std::size_t>(numbers) * sizeof(float));
    }
    return noise;
}
