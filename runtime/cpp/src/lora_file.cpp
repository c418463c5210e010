// Reads converted LoRAs (L1): a safetensors file with the inputs of a bundle's slots -> Lora.
#include <atomic>

#include "constants.h"
#include "error.h"
#include "json.h"
#include "json_text.h"
#include "lora.h"
#include "safetensors.h"
#include "sha256.h"

namespace arcflow {
namespace {

constexpr size_t shown_tensors = 3;

Error lora_error(const std::string &what) { return {ARCFLOW_LORA_ERROR, what}; }

// The SHA-256 of a bundle's slots, which a converted file names.
std::string slots_digest(const Manifest &manifest) {
    Json all = Json::object();
    for (const auto &[part, slots] : manifest.slots()) {
        Json layers = Json::object();
        for (const auto &[name, layer] : slots->layers) {
            layers[name] = {{"in_features", layer.in_features},
                            {"out_features", layer.out_features},
                            {"dtype", name_of(layer.dtype)}};
        }
        all[part] = {{"layers", std::move(layers)},
                     {"rank_multiple", slots->rank_multiple},
                     {"max_rank", slots->max_rank},
                     {"unread", slots->unread}};
    }
    return sha256(canonical(all));
}

std::string value_of(const std::map<std::string, std::string> &metadata, const char *key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? "" : found->second;
}

void check_metadata(const SafetensorsHeader &header, const Manifest &manifest, const std::string &where) {
    if (value_of(header.metadata, "format") != lora_format) {
        throw lora_error(where + " must be a converted LoRA, with the format " + lora_format +
                         " in its metadata; run `arcflow lora convert FILE --bundle BUNDLE --out OUT`");
    }
    const std::string version = value_of(header.metadata, "version");
    if (version != lora_version) {
        throw lora_error(where + ": version must be " + lora_version + ", got " + json_text(version) +
                         "; convert the LoRA again");
    }
    if (value_of(header.metadata, "slots") != slots_digest(manifest))
        throw lora_error(where + " was converted for a bundle with other slots; convert the LoRA again for this one");
}

// Check one factor's entry against its slot. `shape`: with -1 for the rank's groups, which are returned.
int64_t check_entry(const std::string &name, const SafetensorsEntry &entry, const std::vector<int64_t> &shape,
                    DType dtype, const std::string &where) {
    int64_t groups = -1;
    bool fits = entry.dtype == safetensors_name(dtype) && entry.shape.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i)
        if (shape[i] < 0) groups = entry.shape[i];
        else fits = entry.shape[i] == shape[i];
    if (fits) return groups;
    std::string wanted;
    for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
    throw lora_error(where + ": " + name + " must be " + safetensors_name(dtype) + "[" + wanted +
                     "], as its slot, got " + entry.dtype + json_text(entry.shape) + "; convert the LoRA again");
}

// The factors of one linear, or nothing if the file does not have them.
std::optional<LoraFactors> read_factors(SafetensorsFile &file, const std::string &layer, const SlotLayer &slot,
                                        const LoraSlots &slots, const std::string &where) {
    const std::string names[] = {lora_a(layer), lora_b(layer)};
    const auto &entries = file.header().entries;
    const auto a = entries.find(names[0]), b = entries.find(names[1]);
    if (a == entries.end() && b == entries.end()) return std::nullopt;
    if (a == entries.end() || b == entries.end()) {
        throw lora_error(where + " lacks " + json_text(a == entries.end() ? names[0] : names[1]) +
                         "; convert the LoRA again");
    }
    const int64_t multiple = slots.rank_multiple;
    const int64_t groups = check_entry(names[0], a->second, {slot.in_features, -1, multiple}, slot.dtype, where);
    check_entry(names[1], b->second, {groups, multiple, slot.out_features}, slot.dtype, where);
    if (groups < 1 || groups > slots.max_rank / multiple) {
        throw lora_error(where + ": " + layer + " must have a rank of 1 to " + std::to_string(slots.max_rank) +
                         ", got " + std::to_string(groups) + " times " + std::to_string(multiple) +
                         "; convert the LoRA again");
    }
    return LoraFactors{file.load(names[0]), file.load(names[1])};
}

std::shared_ptr<const Lora> read_checked(const std::filesystem::path &path, const Manifest &manifest,
                                         const std::string &where) {
    static std::atomic<uint64_t> next{0};
    SafetensorsFile file(path);
    check_metadata(file.header(), manifest, where);
    Lora lora{next++, path.stem().u8string(), {}};
    std::map<std::string, SafetensorsEntry> left = file.header().entries;
    for (const auto &[part, slots] : manifest.slots()) {
        for (const auto &[layer, slot] : slots->layers) {
            std::optional<LoraFactors> factors = read_factors(file, layer, slot, *slots, where);
            if (!factors) continue;
            lora.parts[part].emplace(layer, std::move(*factors));
            left.erase(lora_a(layer));
            left.erase(lora_b(layer));
        }
    }
    if (!left.empty() || lora.parts.empty()) {
        std::vector<std::string> names;
        for (const auto &[name, entry] : left)
            if (names.size() < shown_tensors) names.push_back(name);
        throw lora_error(where + " must hold inputs of this bundle's slots only, at least one, got " +
                         json_text(names) + " besides; convert the LoRA again");
    }
    return std::make_shared<const Lora>(std::move(lora));
}

}  // namespace

std::shared_ptr<const Lora> read_lora(const std::filesystem::path &path, const Manifest &manifest) {
    const std::string where = path.u8string();
    if (manifest.slots().empty()) {
        throw lora_error(where + ": this bundle has no LoRA slots; export with --lora-slots all, or merge the LoRA "
                                 "with --lora");
    }
    std::error_code ignored;
    if (!std::filesystem::is_regular_file(path, ignored))
        throw lora_error(where + " is not a file; give one that `arcflow lora convert` wrote");
    try {
        return read_checked(path, manifest, where);
    } catch (const Error &e) {
        if (e.status != ARCFLOW_BUNDLE_ERROR) throw;
        throw lora_error(where + ": the LoRA cannot be read (" + e.what() + "); convert or copy it again");
    }
}

}  // namespace arcflow
