// Reads the constants of an ONNX graph from its protobuf.
#include "onnx_graph.h"

#include <charconv>
#include <fstream>
#include <stdexcept>
#include <utility>

#include "constants.h"
#include "error.h"
#include "external_data.h"

namespace arcflow {
namespace {

// Bytes of one element of a TensorProto.DataType; 0 for types that a bundle's graphs do not have.
uint64_t size_of_type(int64_t type) {
    switch (type) {
        case 2:   // UINT8
        case 3:   // INT8
        case 9:   // BOOL
        case 17:  // FLOAT8E4M3FN
            return 1;
        case 10:  // FLOAT16
        case 16:  // BFLOAT16
            return 2;
        case 1:  // FLOAT
        case 6:  // INT32
            return 4;
        case 7:   // INT64
        case 11:  // DOUBLE
            return 8;
        default:
            return 0;
    }
}

void multiply(int64_t &count, uint64_t size) {
    if (size > INT64_MAX || __builtin_mul_overflow(count, static_cast<int64_t>(size), &count))
        throw std::out_of_range("dims");
}

std::pair<std::string, Initializer> read_tensor(std::string_view bytes) {
    std::string name;
    Initializer tensor;
    each_field(bytes, [&](const ProtobufField &f) {
        if (f.number == 1) {  // dims, each in its own field or packed into one
            if (f.bytes.data() == nullptr) {
                multiply(tensor.count, f.value);
            } else {
                ProtobufMessage packed(f.bytes);
                while (const auto size = packed.next_packed()) multiply(tensor.count, *size);
            }
        } else if (f.number == 2) {
            tensor.type = static_cast<int64_t>(f.value);
        } else if (f.number == 8) {
            name = f.bytes;
        } else if (f.number == 9) {
            tensor.raw = f.bytes;
            tensor.is_raw = true;
        } else if (f.number == 13) {  // external_data; check_external_data has checked its numbers
            tensor.is_external = true;
            std::string_view key, value;
            each_field(f.bytes, [&](const ProtobufField &entry) {
                if (entry.number == 1) key = entry.bytes;
                if (entry.number == 2) value = entry.bytes;
            });
            uint64_t number = 0;
            std::from_chars(value.data(), value.data() + value.size(), number);
            if (key == "offset") tensor.offset = number;
            if (key == "length") tensor.bytes = number;
        }
    });
    return {name, tensor};
}

}  // namespace

std::optional<ProtobufField> ProtobufMessage::next() {
    if (rest_.empty()) return std::nullopt;
    const uint64_t tag = varint();
    switch (tag & 7) {
        case 0:
            return ProtobufField{tag >> 3, {}, varint()};
        case 1:
            take(8);
            return ProtobufField{tag >> 3, {}, 0};
        case 2:
            return ProtobufField{tag >> 3, take(varint()), 0};
        case 5:
            take(4);
            return ProtobufField{tag >> 3, {}, 0};
        default:  // groups, which onnx.proto does not use
            throw std::out_of_range("wire type");
    }
}

std::optional<uint64_t> ProtobufMessage::next_packed() {
    if (rest_.empty()) return std::nullopt;
    return varint();
}

uint64_t ProtobufMessage::varint() {
    uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        const auto byte = static_cast<unsigned char>(take(1)[0]);
        value |= uint64_t{byte & 0x7fu} << shift;
        if (byte < 0x80) return value;
    }
    throw std::out_of_range("varint");
}

std::string_view ProtobufMessage::take(uint64_t count) {
    if (count > rest_.size()) throw std::out_of_range("length");
    const std::string_view taken = rest_.substr(0, static_cast<size_t>(count));
    rest_.remove_prefix(static_cast<size_t>(count));
    return taken;
}

std::string read_graph(const std::filesystem::path &path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    const auto end = file ? static_cast<std::streamoff>(file.tellg()) : std::streamoff{-1};
    if (end < 0) throw bundle_error(path.string() + " cannot be read");
    const auto size = static_cast<uint64_t>(end);
    if (size > max_graph_bytes) {
        throw bundle_error(path.string() + " is larger than " + std::to_string(max_graph_bytes) +
                           " bytes; it is not a graph with its weights outside");
    }
    std::string bytes(static_cast<size_t>(size), '\0');
    file.seekg(0);
    if (!file.read(bytes.data(), static_cast<std::streamsize>(size)))
        throw bundle_error(path.string() + " cannot be read");
    return bytes;
}

std::optional<uint64_t> Initializer::size() const {
    uint64_t taken = size_of_type(type);
    if (taken == 0 || __builtin_mul_overflow(taken, static_cast<uint64_t>(count), &taken)) return std::nullopt;
    return taken;
}

std::map<std::string, Initializer> read_initializers(const Bundle &bundle, const std::string &part) {
    check_external_data(bundle, part);
    const std::filesystem::path path = bundle.path(bundle.manifest.parts.at(part).graph);
    const std::string bytes = read_graph(path);
    std::map<std::string, Initializer> found;
    try {
        each_field(bytes, [&](const ProtobufField &model) {
            if (model.number != 7) return;  // graph
            each_field(model.bytes, [&](const ProtobufField &f) {
                if (f.number == 5) found.insert(read_tensor(f.bytes));  // initializer
            });
        });
    } catch (const std::out_of_range &) {
        throw bundle_error(path.string() + " is not an ONNX graph; export the bundle again");
    }
    return found;
}

}  // namespace arcflow
