// Adds up the memory of each mode.
#include "trt_memory.h"

#include <algorithm>
#include <cstdio>

#include "constants.h"
#include "error.h"
#include "trt_arrays.h"
#include "trt_loras.h"

namespace arcflow {
namespace {

constexpr MemoryMode every_mode[] = {MemoryMode::resident, MemoryMode::balanced, MemoryMode::low};

DenoiseShape denoise_shape(const Manifest &manifest, const ImageSize &size) {
    const int64_t token_px = manifest.latents.patch_size * manifest.latents.vae_scale_factor;
    return {size.batch, size.height_px / token_px, size.width_px / token_px, size.text_tokens, size.steps};
}

bool is_encoder(const std::string &part) { return part.rfind("text_encoder", 0) == 0; }

Shapes outputs_of(const Manifest &manifest, const std::string &part, const ImageSize &size) {
    if (is_encoder(part)) return encoder_outputs(manifest, part, size.text_tokens);
    return conditioner_outputs(manifest, size.batch, size.steps);
}

// Bytes of a part's inputs and outputs where it runs on host tensors.
uint64_t array_bytes(const Manifest &manifest, const std::string &name, const ImageSize &size) {
    const Part &part = manifest.parts.at(name);
    Shapes shapes = part_inputs(manifest, size).at(name);
    shapes.merge(outputs_of(manifest, name, size));
    std::vector<TensorSpec> specs = part.inputs;
    for (const std::vector<TensorSpec> &more : {part.outputs, part.slot_inputs()})
        specs.insert(specs.end(), more.begin(), more.end());
    Layout layout;
    for (const TensorSpec &spec : specs)
        layout.add(spec.name, bytes_of(shapes.at(spec.name), spec.dtype, name + ": " + spec.name));
    return layout.bytes();
}

// What a mode runs: `parts` in order, and those of them that run on host tensors, outside the graph.
struct Runs {
    std::vector<std::string> parts, by_host;
    uint64_t plan_bytes;
};

Runs runs_of(const Manifest &manifest, const ImageSize &size, MemoryMode mode) {
    const auto &table = manifest.modulation;
    const bool in_table =
        table && std::count(table->num_inference_steps.begin(), table->num_inference_steps.end(), size.steps) != 0;
    const Modulation source = modulation_source(manifest, in_table, keeps(mode, "conditioner"));
    Runs runs{};
    for (const auto &[name, part] : manifest.parts)
        if (is_encoder(name)) runs.parts.push_back(name);
    runs.by_host = runs.parts;
    if (source == Modulation::given) runs.by_host.emplace_back("conditioner");
    if (source != Modulation::table) runs.parts.emplace_back("conditioner");
    for (const char *name : {"backbone", "vae_decoder"}) runs.parts.emplace_back(name);
    // The graph's parts read LoRAs from one arena, which is filled from a copy for each set.
    Layout loras;
    for (const char *name : {"backbone", "conditioner"}) {
        const auto part = manifest.parts.find(name);
        if (part == manifest.parts.end()) continue;
        const Shapes inputs = part->second.lora ? slot_shapes(*part->second.lora, rank_multiple) : Shapes();
        for (const TensorSpec &slot : part->second.slot_inputs())
            loras.add(slot.name, bytes_of(inputs.at(slot.name), slot.dtype, slot.name));
    }
    const int64_t rank = loras.bytes() > 0 ? rank_multiple : 0;
    // A straight student that can be guided by negative prompts usually is.
    const int64_t negative_tokens = manifest.true_cfg_scale ? size.text_tokens : 0;
    const PlanKey key{denoise_shape(manifest, size), true, source, rank, negative_tokens};
    runs.plan_bytes = PlanArrays(manifest, key, size.steps).device_bytes() + 2 * loras.bytes();
    return runs;
}

// Bytes in GB of 10^9 bytes, such as "9.5", or "0.024" below a tenth.
std::string gigabytes(uint64_t bytes) {
    const double value = static_cast<double>(bytes) / 1e9;
    char text[32];
    std::snprintf(text, sizeof text, value >= 0.1 ? "%.1f" : "%.3f", value);
    return text;
}

}  // namespace

ImageSize usual_size(const Manifest &manifest) {
    const auto nearest = [](const Range &range) { return std::clamp(default_size_px, range.min, range.max); };
    const Ranges &ranges = manifest.ranges;
    return {ranges.batch.min, nearest(ranges.height_px), nearest(ranges.width_px), manifest.text.max_sequence_length,
            manifest.schedule.num_inference_steps};
}

std::map<std::string, Shapes> part_inputs(const Manifest &manifest, const ImageSize &size) {
    const DenoiseShape shape = denoise_shape(manifest, size);
    std::map<std::string, Shapes> inputs;
    for (const auto &[name, part] : manifest.parts) {
        if (name == "conditioner") inputs[name] = conditioner_inputs(manifest, size.batch, size.steps);
        else if (name == "backbone") inputs[name] = backbone_inputs(manifest, shape);
        else if (name == "vae_decoder") inputs[name] = decoder_inputs(manifest, shape);
        else inputs[name] = encoder_inputs(manifest, name, size.text_tokens);
        if (part.lora) inputs[name].merge(slot_shapes(*part.lora, part.lora->rank_multiple));
    }
    return inputs;
}

EngineBytes engine_bytes(const Bundle &bundle, const EngineRecord &record, const Shapes &inputs) {
    const auto &flags = record.key.flags;
    const auto has = [&](const char *flag) { return std::find(flags.begin(), flags.end(), flag) != flags.end(); };
    const uint64_t weights = bundle.manifest.files.at(bundle.manifest.parts.at(record.key.part).weights).bytes;
    EngineBytes found{record.bytes, 0};
    if (has("WEIGHT_STREAMING")) found.weights -= std::min(record.bytes, weights);
    else if (has("STRIP_PLAN")) found.weights += weights;
    std::string wrong;
    const auto profile = static_cast<size_t>(fitting_profile(record.key.part, record.key.profiles, inputs, wrong));
    if (profile < record.activation_bytes.size())  // so not if no profile fits
        found.activations = static_cast<uint64_t>(record.activation_bytes[profile]);
    return found;
}

uint64_t peak_bytes(const Manifest &manifest, const ImageSize &size, const std::map<std::string, EngineBytes> &parts,
                    MemoryMode mode) {
    const Runs runs = runs_of(manifest, size, mode);
    std::map<std::string, uint64_t> arrays;
    for (const std::string &part : runs.by_host) arrays[part] = array_bytes(manifest, part, size);
    uint64_t held = runs.plan_bytes, most = 0;
    if (mode == MemoryMode::low) {
        for (const std::string &part : runs.parts)
            most = std::max(most, parts.at(part).weights + parts.at(part).activations + arrays[part]);
        return held + most;
    }
    for (const auto &[part, bytes] : arrays) held += bytes;
    for (const auto &[part, bytes] : parts)
        if (keeps(mode, part)) held += bytes.weights;
    uint64_t workspace = 0;
    for (const std::string &part : runs.parts) {
        workspace = std::max(workspace, parts.at(part).activations);
        if (!keeps(mode, part)) most = std::max(most, parts.at(part).weights);
    }
    return held + workspace + most;
}

MemoryMode choose_memory(const Manifest &manifest, const std::map<std::string, EngineBytes> &parts, uint64_t free_bytes,
                         std::string &why) {
    const ImageSize size = usual_size(manifest);
    std::string needs;
    MemoryMode chosen = MemoryMode::low;
    bool fits = false;
    for (const MemoryMode mode : every_mode) {
        const uint64_t peak = peak_bytes(manifest, size, parts, mode);
        needs += gigabytes(peak) + " GB with \"" + name_of(mode) + "\", ";
        fits = peak <= free_bytes;
        chosen = mode;
        if (fits) break;
    }
    why.clear();
    if (chosen == MemoryMode::resident) return chosen;
    why = std::string("memory \"") + name_of(chosen) + "\" is used: an image of " + std::to_string(size.height_px) +
          " x " + std::to_string(size.width_px) + " px needs up to " + needs + "and " + gigabytes(free_bytes) +
          " GB of the GPU's memory are free";
    if (!fits) why += "; generate smaller images, or use a bundle in FP8 (arcflow quantize)";
    return chosen;
}

}  // namespace arcflow
