// Reads manifest.json: text -> Manifest, or an error that names the first key that breaks a rule.
#include "manifest.h"

#include <algorithm>
#include <set>

#include "constants.h"
#include "error.h"
#include "json.h"
#include "json_text.h"
#include "rules.h"
#include "sha256.h"

namespace arcflow {
namespace {

std::string parse_quantization_format(const Place &place) { return place.one_of({"fp8_e4m3", "int8", "nvfp4"}); }

DType parse_dtype(const Place &place) {
    const std::string name = place.one_of({"float32", "float16", "bfloat16", "int64", "uint8"});
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16, DType::int64})
        if (name == name_of(dtype)) return dtype;
    return DType::uint8;
}

std::optional<int64_t> optional_integer(const Place &place) {
    if (place.is_null()) return std::nullopt;
    return place.integer("an integer of at least 0, or null");
}

std::vector<int64_t> integers(const Place &place) {
    std::vector<int64_t> values;
    place.each_item([&](const Place &item) { values.push_back(item.integer()); });
    return values;
}

TensorSpec parse_tensor(const Place &place) {
    place.keys({"name", "dtype", "shape"});
    TensorSpec spec{place["name"].text(), parse_dtype(place["dtype"]), {}};
    place["shape"].each_item([&](const Place &item) {
        if (item.is_text()) spec.shape.emplace_back(item.text());
        else spec.shape.emplace_back(item.integer("an integer of at least 0, or a string"));
    });
    return spec;
}

std::vector<TensorSpec> parse_tensors(const Place &place) {
    std::vector<TensorSpec> specs;
    place.each_item([&](const Place &item) { specs.push_back(parse_tensor(item)); });
    return specs;
}

std::optional<Quantization> parse_quantization(const Place &place, int64_t version) {
    if (place.is_null()) return std::nullopt;
    if (version < formats_bundle_version) place.keys({"format", "layers", "policy", "scales"});
    else place.keys({"format", "layers", "policy", "scales"}, {"formats"});
    Quantization q{parse_quantization_format(place["format"]), {}, place["policy"].text(), {}, {}};
    if (!place["scales"].is_null()) q.scales = place["scales"].text("a string or null");
    if (!place["formats"].is_null()) {
        place["formats"].each_entry([&](const std::string &layer, const Place &format) {
            q.formats.emplace(layer, parse_quantization_format(format));
        });
    }
    place["layers"].each_item([&](const Place &item) { q.layers.push_back(item.text()); });
    return q;
}

SlotLayer parse_slot_layer(const Place &place) {
    place.keys({"in_features", "out_features", "dtype"});
    return {place["in_features"].integer(), place["out_features"].integer(), parse_dtype(place["dtype"])};
}

std::optional<LoraSlots> parse_lora(const Place &place) {
    if (place.is_null()) return std::nullopt;
    place.keys({"layers", "rank_multiple", "max_rank"}, {"unread"});
    LoraSlots slots{{}, place["rank_multiple"].integer(), place["max_rank"].integer(), {}};
    place["layers"].each_entry(
        [&](const std::string &name, const Place &layer) { slots.layers.emplace(name, parse_slot_layer(layer)); });
    if (place.has("unread")) place["unread"].each_item([&](const Place &item) { slots.unread.push_back(item.text()); });
    return slots;
}

Part parse_part(const Place &place, int64_t version) {
    if (version >= lora_bundle_version)
        place.keys({"graph", "weights", "precision", "parameters", "inputs", "outputs"}, {"quantization", "lora"});
    else place.keys({"graph", "weights", "precision", "parameters", "inputs", "outputs"}, {"quantization"});
    return {place["graph"].text(),
            place["weights"].text(),
            parse_dtype(place["precision"]),
            place["parameters"].integer(),
            parse_tensors(place["inputs"]),
            parse_tensors(place["outputs"]),
            parse_quantization(place["quantization"], version),
            parse_lora(place["lora"])};
}

std::optional<double> optional_real(const Place &place) {
    if (place.is_null()) return std::nullopt;
    return place.real("a number or null");
}

std::optional<DynamicShift> parse_dynamic_shift(const Place &place) {
    if (place.is_null()) return std::nullopt;
    place.keys({"kind", "base_shift", "max_shift", "base_image_tokens", "max_image_tokens"});
    return DynamicShift{place["kind"].one_of({"exponential", "linear"}) == "exponential", place["base_shift"].real(),
                        place["max_shift"].real(), place["base_image_tokens"].integer(),
                        place["max_image_tokens"].integer()};
}

Schedule parse_schedule(const Place &place, int64_t version) {
    if (version < straight_bundle_version) place.keys({"shift", "timestep_ratio", "num_inference_steps"});
    else place.keys({"shift", "timestep_ratio", "num_inference_steps"}, {"dynamic_shift", "terminal", "sigmas"});
    Schedule schedule{place["shift"].real(), place["timestep_ratio"].real(), place["num_inference_steps"].integer(),
                      parse_dynamic_shift(place["dynamic_shift"]), optional_real(place["terminal"])};
    if (!place["sigmas"].is_null()) {
        schedule.sigmas.emplace();
        place["sigmas"].each_item([&](const Place &item) { schedule.sigmas->push_back(item.real()); });
    }
    return schedule;
}

Latents parse_latents(const Place &place) {
    place.keys({"channels", "patch_size", "vae_scale_factor", "num_gaussians", "logweights_channels"});
    return {place["channels"].integer(), place["patch_size"].integer(), place["vae_scale_factor"].integer(),
            place["num_gaussians"].integer(), place["logweights_channels"].integer()};
}

Rotary parse_rotary(const Place &place) {
    place.keys({"theta", "axes_dims"});
    return {place["theta"].real(), integers(place["axes_dims"])};
}

Text parse_text(const Place &place) {
    place.keys({"max_sequence_length"},
               {"template", "drop_tokens", "clip_tokens", "clip_pad_token_id", "t5_pad_token_id"});
    Text text{};
    text.max_sequence_length = place["max_sequence_length"].integer();
    if (!place["template"].is_null()) text.templ = place["template"].text("a string or null");
    text.drop_tokens = place.has("drop_tokens") ? place["drop_tokens"].integer() : 0;
    text.clip_tokens = optional_integer(place["clip_tokens"]);
    text.clip_pad_token_id = optional_integer(place["clip_pad_token_id"]);
    text.t5_pad_token_id = optional_integer(place["t5_pad_token_id"]);
    return text;
}

Range parse_range(const Place &place) {
    place.keys({"min", "max"});
    return {place["min"].integer(), place["max"].integer()};
}

Ranges parse_ranges(const Place &place) {
    place.keys({"batch", "height_px", "width_px"});
    return {parse_range(place["batch"]), parse_range(place["height_px"]), parse_range(place["width_px"])};
}

std::optional<ModulationTable> parse_modulation(const Place &place, int64_t version) {
    if (place.is_null()) return std::nullopt;
    if (version >= lora_bundle_version) place.keys({"file", "num_inference_steps"}, {"lora", "columns"});
    else place.keys({"file", "num_inference_steps"});
    ModulationTable table{place["file"].text(), integers(place["num_inference_steps"]), parse_lora(place["lora"])};
    if (!place["columns"].is_null()) {
        table.columns.emplace();
        place["columns"].each_entry(
            [&](const std::string &layer, const Place &column) { table.columns->emplace(layer, column.integer()); });
    }
    return table;
}

// Provenance is for people: its types are checked, its values are not kept.
void check_source(const Place &place) {
    place.keys({"name", "revision", "sha256"}, {"scale"});
    place["name"].text();
    place["sha256"].text();
    if (!place["revision"].is_null()) place["revision"].text("a string or null");
    if (!place["scale"].is_null()) place["scale"].real("a number or null");
}

void check_provenance(const Place &place) {
    place.keys({"command", "created", "tools", "base", "adapter"}, {"loras", "vae"});
    place["command"].text();
    place["created"].text();
    place["tools"].each_entry([](const std::string &, const Place &tool) { tool.text(); });
    check_source(place["base"]);
    if (!place["adapter"].is_null()) check_source(place["adapter"]);
    if (place.has("loras")) place["loras"].each_item(check_source);
    if (place.has("vae") && !place["vae"].is_null()) check_source(place["vae"]);
}

void check_format(const Json &json, const std::string &where) {
    if (!json.is_object() || !json.contains("format") || json["format"] != bundle_format)
        throw bundle_error(where + ": format must be " + json_text(bundle_format) + "; this is not an ArcFlow bundle");
    const auto found = json.find("version");
    const Json got = found == json.end() ? Json() : *found;
    if (!got.is_number_integer() || got < bundle_version || got > straight_bundle_version) {
        const bool newer = got.is_number_integer() && got > straight_bundle_version;
        std::string known = std::to_string(bundle_version);
        for (const int64_t version : {lora_bundle_version, formats_bundle_version})
            known += ", " + std::to_string(version);
        throw bundle_error(where + ": version must be " + known + " or " + std::to_string(straight_bundle_version) +
                           ", got " + message_text(got) + "; " +
                           (newer ? "update arcflow" : "export the bundle again"));
    }
}

Manifest parse_keys(const Json &json, const std::string &where) {
    const Place place(json, where);
    Manifest m{};
    m.version = json["version"].get<int64_t>();  // check_format has checked it
    const auto check_keys = [&](std::initializer_list<const char *> optional) {
        place.keys({"family", "dtype", "reference_dtype", "opset", "guidance", "schedule", "latents", "rotary", "text",
                    "ranges", "parts", "tokenizers", "files", "provenance"},
                   optional);
    };
    if (m.version < straight_bundle_version) check_keys({"modulation", "format", "version"});
    else check_keys({"modulation", "format", "version", "sampler", "true_cfg_scale"});
    const bool straight = place.has("sampler") && place["sampler"].one_of({"momentum", "linear"}) == "linear";
    m.sampler = straight ? Sampler::linear : Sampler::momentum;
    m.true_cfg_scale = optional_real(place["true_cfg_scale"]);
    m.family = place["family"].one_of({"flux", "qwen-image"}) == "flux" ? Family::flux : Family::qwen_image;
    m.dtype = parse_dtype(place["dtype"]);
    m.reference_dtype = parse_dtype(place["reference_dtype"]);
    m.opset = place["opset"].integer();
    m.guidance = place["guidance"].boolean();
    m.schedule = parse_schedule(place["schedule"], m.version);
    m.latents = parse_latents(place["latents"]);
    m.rotary = parse_rotary(place["rotary"]);
    m.text = parse_text(place["text"]);
    m.ranges = parse_ranges(place["ranges"]);
    place["parts"].each_entry(
        [&](const std::string &name, const Place &part) { m.parts.emplace(name, parse_part(part, m.version)); });
    m.modulation = parse_modulation(place["modulation"], m.version);
    place["tokenizers"].each_entry(
        [&](const std::string &name, const Place &file) { m.tokenizers.emplace(name, file.text()); });
    place["files"].each_entry([&](const std::string &name, const Place &file) {
        file.keys({"bytes", "sha256"});
        m.files.emplace(name, FileEntry{static_cast<uint64_t>(file["bytes"].integer()), file["sha256"].text()});
    });
    check_provenance(place["provenance"]);
    m.has_adapter = !place["provenance"]["adapter"].is_null();
    return m;
}

// B7: the family's parts are all there. B5: "files" lists every file that another key names.
void check_references(const Manifest &m, const std::string &where) {
    std::set<std::string> need = {"text_encoder", "backbone", "vae_decoder"};
    if (m.family == Family::flux) need.insert("text_encoder_2");
    if (!m.modulation) need.insert("conditioner");
    std::vector<std::string> missing;
    for (const std::string &part : need)
        if (m.parts.count(part) == 0) missing.push_back(part);
    if (!missing.empty()) {
        throw bundle_error(where + ": a " + (m.family == Family::flux ? "flux" : "qwen-image") +
                           " bundle must have parts " + json_text(std::vector<std::string>(need.begin(), need.end())) +
                           ", missing " + json_text(missing));
    }
    std::vector<std::string> used;
    for (const auto &[name, part] : m.parts) used.insert(used.end(), {part.graph, part.weights});
    for (const auto &[name, file] : m.tokenizers) used.push_back(file);
    if (m.modulation) used.push_back(m.modulation->file);
    for (const std::string &file : used)
        if (m.files.count(file) == 0)
            throw bundle_error(where + ": " + json_text(file) + " is used but not listed under \"files\"");
}

// B4: a file name cannot lead out of the bundle.
void check_name(std::string_view name, const std::string &where) {
    const auto allowed = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
               c == '-' || c == '/';
    };
    bool inside = std::all_of(name.begin(), name.end(), allowed);
    std::string_view rest = name;
    for (bool last = false; !last;) {
        const size_t slash = rest.find('/');
        last = slash == rest.npos;
        const std::string_view component = rest.substr(0, slash);
        inside = inside && !component.empty() && component != "." && component != "..";
        if (!last) rest.remove_prefix(slash + 1);
    }
    if (!inside) {
        throw bundle_error(where + ": file name " + json_text(name) +
                           " leaves the bundle or has characters it may not have");
    }
    if (name == "engines" || name.substr(0, 8) == "engines/") {
        throw bundle_error(where + ": file " + json_text(name) +
                           " must not be in engines/, which is for built engines");
    }
}

}  // namespace

std::string lora_a(const std::string &layer) { return layer + ".lora_a"; }
std::string lora_b(const std::string &layer) { return layer + ".lora_b"; }

bool Quantization::uses(const std::string &name) const {
    return std::any_of(layers.begin(), layers.end(), [&](const std::string &layer) {
        const auto other = formats.find(layer);
        return (other == formats.end() ? format : other->second) == name;
    });
}

bool Quantization::plain() const { return format == "fp8_e4m3" && formats.empty() && scales; }

double DynamicShift::mu(int64_t image_tokens) const {
    const double slope = (max_shift - base_shift) / static_cast<double>(max_image_tokens - base_image_tokens);
    return base_shift + slope * static_cast<double>(image_tokens - base_image_tokens);
}

std::vector<TensorSpec> Part::slot_inputs() const {
    std::vector<TensorSpec> specs;
    if (!lora) return specs;
    for (const auto &[name, layer] : lora->layers) {
        specs.push_back({lora_a(name), layer.dtype, {layer.in_features, "groups", lora->rank_multiple}});
        specs.push_back({lora_b(name), layer.dtype, {"groups", lora->rank_multiple, layer.out_features}});
    }
    return specs;
}

std::map<std::string, const LoraSlots *> Manifest::slots() const {
    std::map<std::string, const LoraSlots *> found;
    for (const auto &[name, part] : parts)
        if (part.lora) found.emplace(name, &*part.lora);
    if (modulation && modulation->lora) found.emplace(modulation_name, &*modulation->lora);
    return found;
}

Manifest parse_manifest(std::string_view text, const std::string &where) {
    if (text.size() > max_manifest_bytes) {
        throw bundle_error(where + " is larger than " + std::to_string(max_manifest_bytes) +
                           " bytes; it is not a manifest");
    }
    Json json, digest;
    Manifest manifest{};
    try {
        json = read_json(text, where);
        check_format(json, where);
        digest = json.value("digest", Json());
        json.erase("digest");
        manifest = parse_keys(json, where);
    } catch (const FormatError &e) {
        throw bundle_error(std::string(e.what()) + "; export the bundle again");
    }
    if (!digest.is_string() || digest != sha256(canonical(json)))
        throw bundle_error(where + " does not match its own digest; it was edited, export the bundle again");
    check_values(manifest, where);
    check_references(manifest, where);
    for (const auto &[name, entry] : manifest.files) check_name(name, where);
    return manifest;
}

}  // namespace arcflow
