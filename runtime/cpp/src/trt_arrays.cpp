// Lays out the memory of one plan.
#include "trt_arrays.h"

#include <algorithm>

namespace arcflow {
namespace {

constexpr DType as_float64 = DType::int64;

}  // namespace

DenoiseShape PlanKey::negative_size() const {
    DenoiseShape negative = size;
    negative.text_tokens = negative_text_tokens;
    return negative;
}

size_t aligned(size_t bytes) {
    constexpr size_t alignment = 256;
    return (bytes + alignment - 1) / alignment * alignment;
}

void Layout::add(const std::string &name, size_t bytes, std::vector<int64_t> shape) {
    regions_[name] = {end_, bytes, std::move(shape)};
    end_ += aligned(std::max<size_t>(bytes, 1));
}

Modulation modulation_source(const Manifest &manifest, bool in_table, bool kept) {
    if (in_table) return Modulation::table;
    const DType made = spec_of(manifest.parts.at("conditioner").outputs, "modulation", "conditioner").dtype;
    const DType taken = spec_of(manifest.parts.at("backbone").inputs, "modulation", "backbone").dtype;
    // Within a CUDA graph nothing casts between engines, so both must have the same dtype.
    return kept && made == taken ? Modulation::conditioner : Modulation::given;
}

std::vector<int64_t> conditioner_starts(int64_t steps, int64_t at_once) {
    std::vector<int64_t> starts;
    for (int64_t start = 0; start < steps - at_once; start += at_once) starts.push_back(start);
    starts.push_back(steps - at_once);
    return starts;
}

PlanArrays::PlanArrays(const Manifest &manifest, const PlanKey &key, int64_t steps_at_once)
    : starts(conditioner_starts(key.size.steps, steps_at_once)) {
    const Part &backbone = manifest.parts.at("backbone");
    const Shapes inputs = backbone_inputs(manifest, key.size), heads = backbone_outputs(manifest, key.size);
    const auto input = [&](const char *name) { return spec_of(backbone.inputs, name, "backbone").dtype; };
    const int64_t batch = key.size.batch, steps = key.size.steps, width = inputs.at("modulation")[1];
    add(staged, "streams", {batch, 2}, DType::int64);
    add(staged, "states", inputs.at("encoder_hidden_states"), input("encoder_hidden_states"));
    for (const char *name : {"image_rotary", "text_rotary"}) add(constant, name, inputs.at(name), input(name));
    add(constant, "sigmas", {steps + 1}, as_float64);
    add(working, "latents", inputs.at("latents"), DType::float32);
    if (input("latents") != DType::float32) add(working, "input", inputs.at("latents"), input("latents"));
    for (const auto &[name, shape] : heads)
        add(working, name, shape, spec_of(backbone.outputs, name, "backbone").dtype);
    add(working, "modulation", inputs.at("modulation"), input("modulation"));
    if (key.negative_text_tokens > 0) {
        const Shapes negative = backbone_inputs(manifest, key.negative_size());
        add(staged, "negative_states", negative.at("encoder_hidden_states"), input("encoder_hidden_states"));
        add(staged, "true_cfg_scale", {1}, DType::float32);
        add(constant, "negative_text_rotary", negative.at("text_rotary"), input("text_rotary"));
        add(working, "negative_velocity", heads.at("velocity"), dtypes.at("velocity"));
    }
    switch (key.modulation) {
        case Modulation::table:
            add(constant, "modulations", {steps, 1, width}, input("modulation"));
            break;
        case Modulation::given:
            add(staged, "modulations", {steps, batch, width}, input("modulation"));
            break;
        case Modulation::conditioner: {
            const Part &part = manifest.parts.at("conditioner");
            for (const auto &[name, shape] : conditioner_inputs(manifest, batch, steps_at_once)) {
                if (name != "timesteps") add(staged, name, shape, spec_of(part.inputs, name, "conditioner").dtype);
                else
                    for (size_t run = 0; run < starts.size(); ++run)
                        add(constant, name + "." + std::to_string(run), shape, DType::float32);
            }
            const std::vector<int64_t> made = conditioner_outputs(manifest, batch, steps_at_once).at("modulation");
            add(working, "conditioned", made, spec_of(part.outputs, "modulation", "conditioner").dtype);
            add(working, "modulations", {steps, made[1], width}, input("modulation"));
        }
    }
    if (key.pixels) add(working, "images", decoder_outputs(manifest, key.size).at("images"), DType::uint8);
    for (const char *name : {"latents", "images"})
        if (working.has(name)) results.add(name, working[name].bytes, working[name].shape);
}

void PlanArrays::add(Layout &layout, const std::string &name, const std::vector<int64_t> &shape, DType dtype) {
    layout.add(name, bytes_of(shape, dtype, "backbone: " + name), shape);
    dtypes[name] = dtype;
}

}  // namespace arcflow
