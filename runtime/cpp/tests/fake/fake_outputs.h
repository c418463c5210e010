// Outputs of fake engines, with the shapes that the pipeline expects.
#pragma once

#include <algorithm>
#include <string>

#include "engine.h"

inline arcflow::Tensor filled(arcflow::DType dtype, const std::vector<int64_t> &shape, float value) {
    arcflow::Tensor tensor(arcflow::DType::float32, shape);
    std::fill_n(tensor.as<float>(), tensor.count(), value);
    return arcflow::cast(std::move(tensor), dtype);
}

// Text states equal the ids; modulation counts its rows; heads give the constant velocity `mean`, and a straight
// student's velocity is `mean` times the text's first state; bytes of images differ by `colour_step` from each to the
// next.
inline arcflow::Tensors fake_outputs(const arcflow::Manifest &m, const std::string &part,
                                     const arcflow::Tensors &inputs, float mean, uint8_t colour_step) {
    using arcflow::DType;
    using arcflow::Tensor;
    arcflow::Tensors out;
    const arcflow::DType precision = m.parts.at(part).precision;
    const auto first = static_cast<float>(part.rfind("text", 0) == 0 ? *inputs.at("input_ids").as<int64_t>() : 0);
    if (part == "text_encoder" && m.family == arcflow::Family::flux) {
        out["pooled_projections"] = filled(precision, {1, 6}, first);
    } else if (part.rfind("text", 0) == 0) {
        const int64_t tokens = inputs.at("input_ids").shape[1];
        Tensor states(DType::float32, {1, tokens, 8});
        for (int64_t i = 0; i < states.count(); ++i)
            states.as<float>()[i] = static_cast<float>(inputs.at("input_ids").as<int64_t>()[i / 8]);
        out["encoder_hidden_states"] = arcflow::cast(std::move(states), precision);
    } else if (part == "conditioner") {
        const int64_t steps = inputs.at("timesteps").shape[0], prompts = inputs.at("pooled_projections").shape[0];
        Tensor modulation(DType::float32, {steps, prompts, 5});
        for (int64_t i = 0; i < modulation.count(); ++i) modulation.as<float>()[i] = static_cast<float>(i / 5);
        out["modulation"] = arcflow::cast(std::move(modulation), precision);
    } else if (part == "backbone" && m.sampler == arcflow::Sampler::linear) {
        const std::vector<int64_t> &shape = inputs.at("latents").shape;
        const Tensor states = arcflow::cast(inputs.at("encoder_hidden_states"), DType::float32);
        Tensor velocity(DType::float32, shape);
        const int64_t each = velocity.count() / shape[0], text = states.count() / shape[0];
        for (int64_t i = 0; i < velocity.count(); ++i)
            velocity.as<float>()[i] = mean * states.as<float>()[i / each * text];
        out["velocity"] = arcflow::cast(std::move(velocity), precision);
    } else if (part == "backbone") {
        const std::vector<int64_t> &shape = inputs.at("latents").shape;
        const int64_t k = m.latents.num_gaussians, p = m.latents.logweights_channels;
        out["means"] = filled(precision, {shape[0], shape[1], k, shape[2]}, mean);
        out["logweights"] = filled(precision, {shape[0], shape[1], k, p}, 0);
        out["loggammas"] = filled(precision, {shape[0], shape[1], k - 1, p}, 0);
    } else {
        const std::vector<int64_t> &shape = inputs.at("latents").shape;
        Tensor images(DType::uint8, {shape[0], shape[1] * 16, shape[2] * 16, 3});
        for (int64_t i = 0; i < images.count(); ++i) images.as<uint8_t>()[i] = static_cast<uint8_t>(i * colour_step);
        out["images"] = std::move(images);
    }
    return out;
}
