// Implements the table of rule B9 for the parts that a plan runs.
#include "trt_shapes.h"

#include <algorithm>

#include "error.h"

namespace arcflow {
namespace {

constexpr const char *export_again = "export the bundle again";

// A size of the model, which the manifest has as a number: axis `axis` of an input.
int64_t fixed(const Manifest &manifest, const std::string &part, const std::string &name, size_t axis) {
    const TensorSpec &spec = spec_of(manifest.parts.at(part).inputs, name, part);
    const int64_t *size = axis < spec.shape.size() ? std::get_if<int64_t>(&spec.shape[axis]) : nullptr;
    if (size == nullptr || *size < 1) {
        throw bundle_error(part + ": " + name + " must have fixed sizes where rule B9 (docs/bundle.md) has them; " +
                           export_again);
    }
    return *size;
}

bool takes(const Part &part, const std::string &name) {
    for (const TensorSpec &spec : part.inputs)
        if (spec.name == name) return true;
    return false;
}

int64_t channels(const Manifest &manifest) {
    return manifest.latents.channels * manifest.latents.patch_size * manifest.latents.patch_size;
}

}  // namespace

bool DenoiseShape::operator==(const DenoiseShape &other) const {
    return batch == other.batch && height == other.height && width == other.width && text_tokens == other.text_tokens &&
           steps == other.steps;
}

Shapes conditioner_inputs(const Manifest &manifest, int64_t batch, int64_t steps) {
    const Part &part = manifest.parts.at("conditioner");
    Shapes shapes{{"timesteps", {steps}}};
    if (takes(part, "pooled_projections"))
        shapes["pooled_projections"] = {batch, fixed(manifest, "conditioner", "pooled_projections", 1)};
    if (takes(part, "guidance")) shapes["guidance"] = {batch};
    return shapes;
}

Shapes conditioner_outputs(const Manifest &manifest, int64_t batch, int64_t steps) {
    const int64_t rows = manifest.family == Family::flux ? batch : 1;
    return {{"modulation", {steps, rows, fixed(manifest, "backbone", "modulation", 1)}}};
}

Shapes backbone_inputs(const Manifest &manifest, const DenoiseShape &size) {
    const auto of_model = [&](const char *name, size_t axis) { return fixed(manifest, "backbone", name, axis); };
    return {{"latents", {size.batch, size.image_tokens(), channels(manifest)}},
            {"encoder_hidden_states", {size.batch, size.text_tokens, of_model("encoder_hidden_states", 2)}},
            {"modulation", {size.batch, of_model("modulation", 1)}},
            {"image_rotary", {2, size.image_tokens(), of_model("image_rotary", 2)}},
            {"text_rotary", {2, size.text_tokens, of_model("text_rotary", 2)}}};
}

Shapes backbone_outputs(const Manifest &manifest, const DenoiseShape &size) {
    const int64_t tokens = size.image_tokens(), modes = manifest.latents.num_gaussians;
    const int64_t sub_pixels = manifest.latents.logweights_channels;
    if (manifest.sampler == Sampler::linear) return {{"velocity", {size.batch, tokens, channels(manifest)}}};
    return {{"means", {size.batch, tokens, modes, channels(manifest)}},
            {"logweights", {size.batch, tokens, modes, sub_pixels}},
            {"loggammas", {size.batch, tokens, modes - 1, sub_pixels}}};
}

Shapes decoder_inputs(const Manifest &manifest, const DenoiseShape &size) {
    return {{"latents", {size.batch, size.height, size.width, channels(manifest)}}};
}

Shapes decoder_outputs(const Manifest &manifest, const DenoiseShape &size) {
    const int64_t token_px = manifest.latents.patch_size * manifest.latents.vae_scale_factor;
    return {{"images", {size.batch, size.height * token_px, size.width * token_px, 3}}};
}

Shapes encoder_inputs(const Manifest &manifest, const std::string &part, int64_t text_tokens) {
    const bool clip = manifest.family == Family::flux && part == "text_encoder";
    return {{"input_ids", {1, clip ? manifest.text.clip_tokens.value() : manifest.text.drop_tokens + text_tokens}}};
}

Shapes encoder_outputs(const Manifest &manifest, const std::string &part, int64_t text_tokens) {
    Shapes shapes;
    for (const TensorSpec &spec : manifest.parts.at(part).outputs) {
        const auto *width = std::get_if<int64_t>(&spec.shape.back());
        if (width == nullptr)
            throw bundle_error(part + ": " + spec.name + " must have a fixed width (B9); " + export_again);
        std::vector<int64_t> &shape = shapes[spec.name] = {1};
        if (spec.shape.size() == 3) shape.push_back(manifest.text.drop_tokens + text_tokens);
        shape.push_back(*width);
    }
    return shapes;
}

int32_t fitting_profile(const std::string &part, const std::vector<Profile> &profiles, const Shapes &inputs,
                        std::string &wrong) {
    const auto takes = [](const Profile &profile, const std::string &input, const std::vector<int64_t> &shape) {
        const auto found = profile.find(input);
        if (found == profile.end()) return false;
        const auto &[least, best, most] = found->second;
        bool fits = shape.size() == least.size() && shape.size() == most.size();
        for (size_t i = 0; fits && i < shape.size(); ++i) fits = least[i] <= shape[i] && shape[i] <= most[i];
        return fits;
    };
    std::string misfits;
    for (size_t i = 0; i < profiles.size(); ++i) {
        const auto bad = std::find_if(inputs.begin(), inputs.end(), [&](const auto &input) {
            return !takes(profiles[i], input.first, input.second);
        });
        if (bad == inputs.end()) return static_cast<int32_t>(i);
        const auto range = profiles[i].find(bad->first);
        misfits += std::string(misfits.empty() ? "" : "; ") + bad->first + " of " + text_of(bad->second) + " is not " +
                   (range == profiles[i].end() ? "in the profile"
                                               : text_of(range->second.min) + " to " + text_of(range->second.max));
    }
    wrong = part + ": the engine was not built for these shapes (" + misfits +
            "); build it with `arcflow build --resolutions` and `--batch` that hold them";
    return -1;
}

const TensorSpec &spec_of(const std::vector<TensorSpec> &specs, const std::string &name, const std::string &part) {
    for (const TensorSpec &spec : specs)
        if (spec.name == name) return spec;
    throw bundle_error(part + " has no " + name + ", which B9 (docs/bundle.md) demands; export the bundle again");
}

size_t bytes_of(const std::vector<int64_t> &shape, DType dtype, const std::string &what) {
    size_t bytes = size_of(dtype);
    for (const int64_t size : shape)
        if (size < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes))
            throw engine_error(what + " has a shape that its inputs do not tell; build the engine again");
    return bytes;
}

std::string text_of(const std::vector<int64_t> &shape) {
    std::string text = "[";
    for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

}  // namespace arcflow
