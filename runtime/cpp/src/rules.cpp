// Checks the values of a manifest.
#include "rules.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "constants.h"
#include "error.h"
#include "json_text.h"

namespace arcflow {
namespace {

// Bounds of this reader alone, far above any model's. With them, products of sizes fit in 64 bits.
// max_size: channels, patches, modes and steps.
constexpr int64_t max_size = 65536;
constexpr int64_t max_text_tokens = int64_t{1} << 20;
// Inputs and outputs of a linear, and columns of the modulation.
constexpr int64_t max_features = int64_t{1} << 24;
// Heights and widths of a request are int32.
constexpr int64_t max_px = std::numeric_limits<int32_t>::max();

class Rules {
public:
    explicit Rules(const std::string &where) : where_(where) {}

    void check(bool ok, const std::string &key, const std::string &must, const std::string &got) const {
        if (!ok)
            throw bundle_error(where_ + ": " + key + " must be " + must + ", got " + got + "; export the bundle again");
    }

    void between(int64_t low, int64_t value, int64_t high, const std::string &key) const {
        check(value >= low, key, "at least " + std::to_string(low), std::to_string(value));
        check(value <= high, key, "at most " + std::to_string(high), std::to_string(value));
    }

private:
    const std::string &where_;
};

bool is_sha256(const std::string &text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == text.npos;
}

void check_range(const Rules &rules, const Range &range, const std::string &key, int64_t multiple) {
    const std::string got = "{\"min\": " + std::to_string(range.min) + ", \"max\": " + std::to_string(range.max) + "}";
    rules.check(1 <= range.min && range.min <= range.max, key, "min and max with 1 <= min <= max", got);
    rules.check(range.max <= max_px, key, "at most " + std::to_string(max_px), got);
    rules.check(range.min % multiple == 0 && range.max % multiple == 0, key, "multiples of " + std::to_string(multiple),
                got);
}

void check_text(const Rules &rules, const Manifest &m) {
    const Text &t = m.text;
    rules.between(1, t.max_sequence_length, max_text_tokens, "text: max_sequence_length");
    rules.between(0, t.drop_tokens, max_text_tokens, "text: drop_tokens");
    std::vector<std::string> wanted = {"tokenizer"}, got;
    if (m.family == Family::flux) {
        wanted.emplace_back("tokenizer_2");
        rules.check(t.clip_tokens.has_value(), "text: clip_tokens", "given for a flux bundle", "null");
        rules.check(t.clip_pad_token_id.has_value(), "text: clip_pad_token_id", "given for a flux bundle", "null");
        rules.check(t.t5_pad_token_id.has_value(), "text: t5_pad_token_id", "given for a flux bundle", "null");
        rules.between(0, *t.clip_tokens, max_text_tokens, "text: clip_tokens");
    } else {
        const size_t first = t.templ ? t.templ->find("{}") : std::string::npos;
        rules.check(first != std::string::npos && t.templ->find("{}", first + 2) == std::string::npos, "text: template",
                    "a text with one {} for the prompt", t.templ ? json_text(*t.templ) : "null");
    }
    for (const auto &[name, file] : m.tokenizers) got.push_back(name);
    rules.check(got == wanted, "tokenizers", "given for " + json_text(wanted), json_text(got));
}

void check_quantization(const Rules &rules, const std::string &part, const Quantization &q) {
    const std::string key = "parts." + part + ": quantization";
    rules.check(!q.layers.empty(), key + ": layers", "at least one, or no quantization", "[]");
    std::set<std::string> once, twice;
    for (const std::string &layer : q.layers)
        if (!once.insert(layer).second) twice.insert(layer);
    rules.check(twice.empty(), key + ": layers", "named once each",
                json_text(std::vector<std::string>(twice.begin(), twice.end())));
    rules.check(is_sha256(q.policy), key + ": policy", "a SHA-256", json_text(q.policy));
    std::vector<std::string> strangers;
    for (const auto &[layer, format] : q.formats)
        if (once.count(layer) == 0) strangers.push_back(layer);
    rules.check(strangers.empty(), key + ": formats", "given for names of layers only", json_text(strangers));
    const std::string scales = q.scales ? json_text(*q.scales) : "null";
    if (q.uses("fp8_e4m3")) rules.check(q.scales && is_sha256(*q.scales), key + ": scales", "a SHA-256", scales);
    else rules.check(!q.scales, key + ": scales", "null for a format without calibration", scales);
}

void check_slots(const Rules &rules, const std::string &key, const LoraSlots &slots) {
    rules.check(!slots.layers.empty(), key + ": layers", "at least one, or no lora", "{}");
    rules.check(slots.rank_multiple == rank_multiple, key + ": rank_multiple", std::to_string(rank_multiple),
                std::to_string(slots.rank_multiple));
    rules.check(0 < slots.max_rank && slots.max_rank <= max_rank && slots.max_rank % rank_multiple == 0,
                key + ": max_rank",
                "a multiple of " + std::to_string(rank_multiple) + " up to " + std::to_string(max_rank),
                std::to_string(slots.max_rank));
    for (const auto &[name, layer] : slots.layers) {
        rules.check(is_float(layer.dtype), key + ": " + name + ": dtype",
                    R"(one of ["float32", "float16", "bfloat16"])", json_text(name_of(layer.dtype)));
        rules.between(1, layer.in_features, max_features, key + ": " + name + ": in_features");
        rules.between(1, layer.out_features, max_features, key + ": " + name + ": out_features");
    }
}

// The table's slots and their columns.
void check_table(const Rules &rules, const Manifest &m) {
    const ModulationTable &table = *m.modulation;
    if (!table.lora) {
        rules.check(!table.columns, "modulation: columns", "given with lora only", "columns without lora");
        return;
    }
    rules.check(m.parts.count("conditioner") == 0, "modulation: lora", "null in a bundle with a conditioner", "slots");
    std::vector<std::string> layers, columns;
    for (const auto &[name, layer] : table.lora->layers) layers.push_back(name);
    const std::map<std::string, int64_t> first = table.columns.value_or(std::map<std::string, int64_t>());
    for (const auto &[name, column] : first) columns.push_back(name);
    rules.check(columns == layers, "modulation: columns", "given for " + json_text(layers), json_text(columns));
    int64_t wide = 0;
    if (const auto backbone = m.parts.find("backbone"); backbone != m.parts.end()) {
        for (const TensorSpec &input : backbone->second.inputs) {
            if (input.name != "modulation" || input.shape.empty()) continue;
            if (const auto *width = std::get_if<int64_t>(&input.shape.back())) wide = *width;
        }
    }
    for (const auto &[name, layer] : table.lora->layers) {
        rules.check(first.at(name) <= wide - layer.out_features, "modulation: columns: " + name,
                    "at most " + std::to_string(wide) + " with its outputs", std::to_string(first.at(name)));
        rules.check(layer.dtype == DType::float32, "modulation: lora: " + name + ": dtype", "float32",
                    json_text(name_of(layer.dtype)));
    }
}

// B14, B15.
void check_loras(const Rules &rules, const Manifest &m) {
    const std::map<std::string, const LoraSlots *> found = m.slots();
    int64_t version = found.empty() ? bundle_version : lora_bundle_version;
    for (const auto &[name, part] : m.parts)
        if (part.quantization && !part.quantization->plain()) version = formats_bundle_version;
    rules.check(m.sampler == Sampler::linear || m.version == version, "version",
                std::to_string(version) + " for these slots and formats (B14, B15)", std::to_string(m.version));
    std::set<std::string> once, twice;
    std::set<int64_t> ranks;
    for (const auto &[part, slots] : found) {
        check_slots(rules, part == modulation_name ? "modulation: lora" : "parts." + part + ": lora", *slots);
        ranks.insert(slots->max_rank);
        for (const auto &[name, layer] : slots->layers)
            if (!once.insert(name).second) twice.insert(name);
    }
    rules.check(twice.empty(), "lora: layers", "in one part each",
                json_text(std::vector<std::string>(twice.begin(), twice.end())));
    rules.check(ranks.size() <= 1, "lora: max_rank", "the same in every part",
                json_text(std::vector<int64_t>(ranks.begin(), ranks.end())));
    if (m.modulation) check_table(rules, m);
}

std::string whole(double value) { return std::to_string(static_cast<int64_t>(value)); }

void check_dynamic_shift(const Rules &rules, const Manifest &m, const DynamicShift &d) {
    const std::string key = "schedule: dynamic_shift";
    rules.check(m.schedule.shift == 1, "schedule: shift", "1 with dynamic_shift", json_text(m.schedule.shift));
    rules.check(d.base_image_tokens < d.max_image_tokens, key + ": base_image_tokens", "below max_image_tokens",
                json_text(std::vector<int64_t>{d.base_image_tokens, d.max_image_tokens}));
    // At the smallest and the largest image, so that no size overflows or divides by 0.
    const double least = d.exponential ? -max_mu : 0;
    const int64_t token_px = m.latents.patch_size * m.latents.vae_scale_factor;
    const Range &height = m.ranges.height_px, &width = m.ranges.width_px;
    for (const int64_t image_px : {height.min * width.min, height.max * width.max}) {
        const double mu = d.mu(image_px / (token_px * token_px));
        rules.check(least < mu && mu <= max_mu, key + ": mu",
                    "above " + whole(least) + " and at most " + whole(max_mu) + " for every size", json_text(mu));
    }
    rules.check(!m.modulation, "modulation", "null with dynamic_shift, which depends on the image's size", "a table");
}

// B16.
void check_sampler(const Rules &rules, const Manifest &m) {
    const Schedule &s = m.schedule;
    const bool straight = m.sampler == Sampler::linear;
    rules.check(m.has_adapter != straight, "provenance: adapter",
                straight ? "null for the sampler \"linear\" (B16)" : "given for the sampler \"momentum\" (B16)",
                m.has_adapter ? "an adapter" : "null");
    if (!straight) return;
    rules.check(m.version == straight_bundle_version, "version",
                std::to_string(straight_bundle_version) + " for the sampler \"linear\" (B16)",
                std::to_string(m.version));
    rules.check(m.latents.num_gaussians == 1, "latents: num_gaussians", "1 for a straight student",
                std::to_string(m.latents.num_gaussians));
    if (const auto backbone = m.parts.find("backbone"); backbone != m.parts.end()) {
        std::vector<std::string> names;
        for (const TensorSpec &output : backbone->second.outputs) names.push_back(output.name);
        rules.check(names == std::vector<std::string>{"velocity"}, "parts.backbone: outputs",
                    "[\"velocity\"] for a straight student", json_text(names));
    }
    const std::string scale = m.true_cfg_scale ? json_text(*m.true_cfg_scale) : "null";
    if (m.family == Family::flux) {
        rules.check(!m.true_cfg_scale, "true_cfg_scale", "null for a flux bundle", scale);
    } else {
        rules.check(m.true_cfg_scale && 1 <= *m.true_cfg_scale && *m.true_cfg_scale <= max_true_cfg_scale,
                    "true_cfg_scale", "between 1 and " + whole(max_true_cfg_scale), scale);
    }
    if (s.terminal) {
        rules.check(0 < *s.terminal && *s.terminal < 1, "schedule: terminal", "above 0 and below 1, or null",
                    json_text(*s.terminal));
    }
    if (s.sigmas) {
        bool falls = !s.sigmas->empty() && s.sigmas->front() <= 1;
        double last = std::numeric_limits<double>::infinity();
        for (const double sigma : *s.sigmas) {
            falls = falls && 0 < sigma && sigma < last;
            last = sigma;
        }
        rules.check(falls, "schedule: sigmas", "falling from at most 1 and above 0", json_text(*s.sigmas));
        const auto count = static_cast<int64_t>(s.sigmas->size());
        rules.check(s.num_inference_steps == count, "schedule: num_inference_steps",
                    std::to_string(count) + ", the number of sigmas", std::to_string(s.num_inference_steps));
        rules.check(s.timestep_ratio == 1, "schedule: timestep_ratio", "1 with sigmas", json_text(s.timestep_ratio));
    }
    if (s.dynamic_shift) check_dynamic_shift(rules, m, *s.dynamic_shift);
}

}  // namespace

void check_values(const Manifest &m, const std::string &where) {
    const Rules rules(where);
    const Schedule &s = m.schedule;
    const Latents &k = m.latents;
    const std::vector<int64_t> &axes = m.rotary.axes_dims;
    const std::string floats = R"(one of ["float32", "float16", "bfloat16"])";
    rules.check(is_float(m.dtype), "dtype", floats, json_text(std::string_view(name_of(m.dtype))));
    rules.check(is_float(m.reference_dtype), "reference_dtype", floats, json_text(name_of(m.reference_dtype)));
    rules.check(std::isfinite(s.shift) && s.shift > 0, "schedule: shift", "positive", json_text(s.shift));
    rules.check(0 < s.timestep_ratio && s.timestep_ratio <= 1, "schedule: timestep_ratio", "above 0 and at most 1",
                json_text(s.timestep_ratio));
    rules.between(1, s.num_inference_steps, max_size, "schedule: num_inference_steps");
    rules.between(1, k.channels, max_size, "latents: channels");
    rules.between(1, k.patch_size, max_size, "latents: patch_size");
    rules.between(1, k.vae_scale_factor, max_size, "latents: vae_scale_factor");
    rules.between(1, k.num_gaussians, max_size, "latents: num_gaussians");
    const int64_t sub_pixels = k.patch_size * k.patch_size;
    rules.check(k.logweights_channels == sub_pixels, "latents: logweights_channels",
                "patch_size squared, " + std::to_string(sub_pixels), std::to_string(k.logweights_channels));
    rules.check(std::isfinite(m.rotary.theta) && m.rotary.theta > 0, "rotary: theta", "positive",
                json_text(m.rotary.theta));
    const bool even = std::all_of(axes.begin(), axes.end(), [](int64_t d) { return d > 0 && d % 2 == 0; });
    rules.check(axes.size() == 3 && even, "rotary: axes_dims", "three even sizes", json_text(axes));
    for (const int64_t size : axes) rules.between(2, size, max_size, "rotary: axes_dims");
    const int64_t token_px = k.patch_size * k.vae_scale_factor;
    check_range(rules, m.ranges.batch, "ranges: batch", 1);
    check_range(rules, m.ranges.height_px, "ranges: height_px", token_px);
    check_range(rules, m.ranges.width_px, "ranges: width_px", token_px);
    check_text(rules, m);
    for (const auto &[name, part] : m.parts)
        if (part.quantization) check_quantization(rules, name, *part.quantization);
    check_loras(rules, m);
    check_sampler(rules, m);
    if (m.modulation && m.parts.count("conditioner") == 0) {
        const std::vector<int64_t> &baked = m.modulation->num_inference_steps;
        rules.check(std::find(baked.begin(), baked.end(), s.num_inference_steps) != baked.end(),
                    "schedule: num_inference_steps", "one of " + json_text(baked),
                    std::to_string(s.num_inference_steps));
    }
}

}  // namespace arcflow
