// Reads safetensors files, and the modulation table that a bundle may have in one.
#include "safetensors.h"

#include <algorithm>
#include <array>
#include <optional>
#include <set>

#include "error.h"
#include "json.h"
#include "json_text.h"

namespace arcflow {
namespace {

// The format allows 100 MB; headers of the largest bundles are below 1 MB.
constexpr uint64_t max_header_bytes = uint64_t{16} << 20;
constexpr uint64_t prefix_bytes = 8;

struct Type {
    const char *name;
    uint64_t bytes;
    std::optional<DType> dtype;  // if Tensor has this type
};

constexpr std::array<Type, 16> types = {{{"BOOL", 1, {}},
                                         {"U8", 1, DType::uint8},
                                         {"I8", 1, {}},
                                         {"F8_E4M3", 1, {}},
                                         {"F8_E5M2", 1, {}},
                                         {"F8_E8M0", 1, {}},
                                         {"I16", 2, {}},
                                         {"U16", 2, {}},
                                         {"F16", 2, DType::float16},
                                         {"BF16", 2, DType::bfloat16},
                                         {"I32", 4, {}},
                                         {"U32", 4, {}},
                                         {"F32", 4, DType::float32},
                                         {"I64", 8, DType::int64},
                                         {"U64", 8, {}},
                                         {"F64", 8, {}}}};

const Type *find_type(const std::string &name) {
    const auto found = std::find_if(types.begin(), types.end(), [&](const Type &type) { return name == type.name; });
    return found == types.end() ? nullptr : &*found;
}

SafetensorsEntry parse_entry(const Place &place) {
    place.keys({"dtype", "shape", "data_offsets"});
    SafetensorsEntry entry{place["dtype"].text(), {}, 0, 0};
    const Type *type = find_type(entry.dtype);
    if (!type) throw FormatError(place.where() + ": dtype " + json_text(entry.dtype) + " is not known");
    place["shape"].each_item([&](const Place &item) { entry.shape.push_back(item.integer()); });
    std::vector<uint64_t> offsets;
    place["data_offsets"].each_item(
        [&](const Place &item) { offsets.push_back(static_cast<uint64_t>(item.integer())); });
    if (offsets.size() != 2 || offsets[0] > offsets[1])
        throw FormatError(place.where() + ": data_offsets must be a begin and an end after it");
    entry.begin = offsets[0];
    entry.end = offsets[1];
    uint64_t bytes = type->bytes;
    bool fits = true;
    for (const int64_t size : entry.shape)
        fits = fits && !__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes);
    if (!fits || bytes != entry.end - entry.begin) {
        throw FormatError(place.where() + ": data_offsets must span the bytes that shape and dtype take, got " +
                          std::to_string(entry.end - entry.begin) + " for " + entry.dtype + json_text(entry.shape));
    }
    return entry;
}

// Read exactly `count` bytes from the current position.
void read_bytes(std::ifstream &file, char *bytes, uint64_t count, const std::string &where) {
    if (!file.read(bytes, static_cast<std::streamsize>(count)))
        throw bundle_error(where + " cannot be read to its end");
}

// Read the header's text and leave `file` at the first byte after it.
std::string read_header(std::ifstream &file, uint64_t file_bytes, const std::string &where) {
    std::array<unsigned char, prefix_bytes> prefix{};
    if (file_bytes < prefix.size()) {
        throw bundle_error(where + " must have a header, got " + std::to_string(file_bytes) +
                           " bytes; it is not a safetensors file");
    }
    read_bytes(file, reinterpret_cast<char *>(prefix.data()), prefix.size(), where);
    uint64_t size = 0;
    for (size_t i = 0; i < prefix.size(); ++i) size |= uint64_t{prefix[i]} << (8 * i);
    if (size > max_header_bytes || size > file_bytes - prefix.size()) {
        throw bundle_error(where + ": the header must have at most " +
                           std::to_string(std::min(max_header_bytes, file_bytes - prefix.size())) + " bytes, got " +
                           std::to_string(size) + "; it is not a safetensors file, or was cut");
    }
    std::string header(static_cast<size_t>(size), '\0');
    read_bytes(file, header.data(), size, where);
    return header;
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view header, uint64_t data_bytes, const std::string &where) {
    if (header.empty() || header[0] != '{') throw bundle_error(where + ": the header must begin with \"{\"");
    const Json json = read_json(header, where);
    SafetensorsHeader parsed;
    Place(json, where).each_entry([&](const std::string &name, const Place &place) {
        if (name == "__metadata__") {
            place.each_entry(
                [&](const std::string &key, const Place &value) { parsed.metadata.emplace(key, value.text()); });
        } else {
            parsed.entries.emplace(name, parse_entry(place));
        }
    });
    std::vector<const SafetensorsEntry *> in_order;
    for (const auto &[name, entry] : parsed.entries) in_order.push_back(&entry);
    std::sort(in_order.begin(), in_order.end(), [](const SafetensorsEntry *a, const SafetensorsEntry *b) {
        return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
    });
    uint64_t end = 0;
    for (const SafetensorsEntry *entry : in_order) {
        if (entry->begin != end) {
            throw bundle_error(where + ": tensors must lie one after the other, got one at byte " +
                               std::to_string(entry->begin) + " after byte " + std::to_string(end));
        }
        end = entry->end;
    }
    if (end != data_bytes) {
        throw bundle_error(where + ": the tensors must take the " + std::to_string(data_bytes) +
                           " bytes behind the header, got " + std::to_string(end) + "; it was cut or edited");
    }
    return parsed;
}

const char *safetensors_name(DType dtype) {
    const auto *found = std::find_if(types.begin(), types.end(), [&](const Type &type) { return type.dtype == dtype; });
    return found->name;  // every DType is in the table
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path &path)
    : where_(path.string()), file_(path, std::ios::binary | std::ios::ate) {
    const std::streamoff file_bytes = file_ ? static_cast<std::streamoff>(file_.tellg()) : -1;
    if (file_bytes < 0) throw bundle_error(where_ + " cannot be opened; check that it exists and may be read");
    file_.seekg(0);
    const std::string header = read_header(file_, static_cast<uint64_t>(file_bytes), where_);
    data_begin_ = prefix_bytes + header.size();
    header_ = parse_safetensors_header(header, static_cast<uint64_t>(file_bytes) - data_begin_, where_);
}

Tensor SafetensorsFile::load(const std::string &name) {
    const auto found = header_.entries.find(name);
    if (found == header_.entries.end()) throw bundle_error(where_ + " has no tensor " + json_text(name));
    const SafetensorsEntry &entry = found->second;
    const Type *type = find_type(entry.dtype);
    if (!type->dtype)
        throw bundle_error(where_ + ": " + name + " has dtype " + entry.dtype + ", which is not supported");
    Tensor tensor(*type->dtype, entry.shape);
    file_.seekg(static_cast<std::streamoff>(data_begin_ + entry.begin));
    read_bytes(file_, reinterpret_cast<char *>(tensor.data.data()), entry.end - entry.begin, where_);
    return tensor;
}

std::map<std::string, Tensor> load_safetensors(const std::filesystem::path &path,
                                               const std::vector<std::string> &names) {
    SafetensorsFile file(path);
    std::map<std::string, Tensor> tensors;
    for (const std::string &name : names) tensors.emplace(name, file.load(name));
    return tensors;
}

namespace {

// Step count n -> the tensor `<prefix>_<n>` [n, width] float32 of the table's file. `what` says in errors what gives
// the width.
std::map<int64_t, Tensor> load_table(const Bundle &bundle, const std::string &prefix, int64_t width,
                                     const std::string &what) {
    const ModulationTable &spec = *bundle.manifest.modulation;
    const std::filesystem::path path = bundle.path(spec.file);
    const std::set<int64_t> counts(spec.num_inference_steps.begin(), spec.num_inference_steps.end());
    std::map<int64_t, Tensor> table;
    try {
        SafetensorsFile file(path);
        for (const int64_t n : counts) table.emplace(n, file.load(prefix + "_" + std::to_string(n)));
    } catch (const Error &e) {
        if (e.status != ARCFLOW_BUNDLE_ERROR) throw;
        throw bundle_error(path.string() + ": the modulation table cannot be read (" + e.what() +
                           "); export the bundle again");
    }
    for (const auto &[n, tensor] : table) {
        if (tensor.dtype != DType::float32 || tensor.shape != std::vector<int64_t>{n, width}) {
            throw bundle_error(path.string() + ": " + prefix + "_" + std::to_string(n) + " must be float32 of shape [" +
                               std::to_string(n) + ", " + std::to_string(width) + "], " + what + ", got " +
                               tensor.describe() + "; export the bundle again");
        }
    }
    return table;
}

}  // namespace

std::map<int64_t, Tensor> load_modulation(const Bundle &bundle) {
    if (!bundle.manifest.modulation) return {};
    const Part &backbone = bundle.manifest.parts.at("backbone");
    const auto input = std::find_if(backbone.inputs.begin(), backbone.inputs.end(),
                                    [](const TensorSpec &tensor) { return tensor.name == "modulation"; });
    const int64_t *stated =
        input == backbone.inputs.end() || input->shape.empty() ? nullptr : std::get_if<int64_t>(&input->shape.back());
    return load_table(bundle, "num_inference_steps", stated ? *stated : -1, "for the backbone's input modulation");
}

std::map<int64_t, Tensor> load_conditioning(const Bundle &bundle) {
    if (!bundle.manifest.modulation || !bundle.manifest.modulation->lora) return {};
    std::map<int64_t, Tensor> table;
    for (const auto &[name, layer] : bundle.manifest.modulation->lora->layers)
        if (table.empty() || table.begin()->second.shape[1] != layer.in_features)
            table = load_table(bundle, "conditioning", layer.in_features, "for the table's slots");
    return table;
}

}  // namespace arcflow
