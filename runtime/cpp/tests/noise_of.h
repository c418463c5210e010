// The noise of a job, as the pipeline makes it.
#pragma once

#include <cstring>

#include "engine.h"

// [b, N, C] float32.
inline arcflow::Tensor noise_of(const arcflow::DenoiseJob &job, const arcflow::Latents &latents) {
    const int64_t tokens = job.height * job.width, patch = latents.patch_size;
    const int64_t channels = latents.channels * patch * patch, numbers = tokens * channels;
    arcflow::Tensor noise(arcflow::DType::float32, {static_cast<int64_t>(job.streams.size()), tokens, channels});
    for (std::size_t i = 0; i < job.streams.size(); ++i) {
        // The last image of a batch with one seed is this image.
        const int64_t before = job.streams[i].first / numbers;
        const arcflow::Tensor batch =
            arcflow::packed_noise({job.streams[i].seed}, before + 1, latents, job.height * patch, job.width * patch);
        std::memcpy(noise.as<float>() + static_cast<int64_t>(i) * numbers, batch.as<float>() + before * numbers,
                    static_cast<std::size_t>(numbers) * sizeof(float));
    }
    return noise;
}
