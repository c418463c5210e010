// Reads safetensors files, and the modulation table that a bundle may have in one.
#include "safetensors.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <optional>

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

std::map<std::string, SafetensorsEntry> parse_safetensors_header(std::string_view header, uint64_t data_bytes,
                                                                 const std::string &where) {
    if (header.empty() || header[0] != '{') throw bundle_error(where + ": the header must begin with \"{\"");
    const Json json = read_json(header, where);
    std::map<std::string, SafetensorsEntry> entries;
    Place(json, where).each_entry([&](const std::string &name, const Place &place) {
        if (name == "__metadata__") place.each_entry([](const std::string &, const Place &value) { value.text(); });
        else entries.emplace(name, parse_entry(place));
    });
    std::vector<const SafetensorsEntry *> in_order;
    for (const auto &[name, entry] : entries) in_order.push_back(&entry);
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
    return entries;
}

std::map<std::string, Tensor> load_safetensors(const std::filesystem::path &path,
                                               const std::vector<std::string> &names) {
    const std::string where = path.string();
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    const std::streamoff file_bytes = file ? static_cast<std::streamoff>(file.tellg()) : -1;
    if (file_bytes < 0) throw bundle_error(where + " cannot be opened; check that it exists and may be read");
    file.seekg(0);
    const std::string header = read_header(file, static_cast<uint64_t>(file_bytes), where);
    const uint64_t data_begin = prefix_bytes + header.size();
    const auto entries = parse_safetensors_header(header, static_cast<uint64_t>(file_bytes) - data_begin, where);
    std::map<std::string, Tensor> tensors;
    for (const std::string &name : names) {
        const auto found = entries.find(name);
        if (found == entries.end()) throw bundle_error(where + " has no tensor " + json_text(name));
        const SafetensorsEntry &entry = found->second;
        const Type *type = find_type(entry.dtype);
        if (!type->dtype)
            throw bundle_error(where + ": " + name + " has dtype " + entry.dtype + ", which is not supported");
        Tensor tensor(*type->dtype, entry.shape);
        file.seekg(static_cast<std::streamoff>(data_begin + entry.begin));
        read_bytes(file, reinterpret_cast<char *>(tensor.data.data()), entry.end - entry.begin, where);
        tensors.emplace(name, std::move(tensor));
    }
    return tensors;
}

std::map<int64_t, Tensor> load_modulation(const Bundle &bundle) {
    std::map<int64_t, Tensor> table;
    if (!bundle.manifest.modulation) return table;
    const ModulationTable &spec = *bundle.manifest.modulation;
    const std::filesystem::path path = bundle.path(spec.file);
    const auto name_of_count = [](int64_t n) { return "num_inference_steps_" + std::to_string(n); };
    std::vector<std::string> names;
    for (const int64_t n : spec.num_inference_steps) names.push_back(name_of_count(n));
    std::map<std::string, Tensor> tensors;
    try {
        tensors = load_safetensors(path, names);
    } catch (const Error &e) {
        if (e.status != ARCFLOW_BUNDLE_ERROR) throw;
        throw bundle_error(path.string() + ": the modulation table cannot be read (" + e.what() +
                           "); export the bundle again");
    }
    const Part &backbone = bundle.manifest.parts.at("backbone");
    const auto input = std::find_if(backbone.inputs.begin(), backbone.inputs.end(),
                                    [](const TensorSpec &tensor) { return tensor.name == "modulation"; });
    const int64_t *stated =
        input == backbone.inputs.end() || input->shape.empty() ? nullptr : std::get_if<int64_t>(&input->shape.back());
    const int64_t width = stated ? *stated : -1;
    for (const int64_t n : spec.num_inference_steps) {
        const auto found = tensors.find(name_of_count(n));
        if (found == tensors.end()) continue;  // the manifest lists this number twice
        const Tensor &tensor = found->second;
        if (tensor.dtype != DType::float32 || tensor.shape.size() != 2 || tensor.shape[0] != n ||
            tensor.shape[1] != width) {
            throw bundle_error(path.string() + ": " + name_of_count(n) + " must be float32 of shape [" +
                               std::to_string(n) + ", " + std::to_string(width) +
                               "], for the backbone's input modulation, got " + tensor.describe() +
                               "; export the bundle again");
        }
        table.emplace(n, std::move(found->second));
        tensors.erase(found);
    }
    return table;
}

}  // namespace arcflow
