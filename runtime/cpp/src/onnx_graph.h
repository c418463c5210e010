// Reads ONNX graphs. Only the protobuf fields that lead to tensors are read, others are skipped. Field numbers are
// those of onnx.proto, which may add fields but never renumbers them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "manifest.h"

namespace arcflow {

struct ProtobufField {
    uint64_t number;
    std::string_view bytes;  // of a length-delimited field; data() is null for others
    uint64_t value;          // of a varint field; 0 for others
};

// Iterates over the fields of one message.
class ProtobufMessage {
public:
    explicit ProtobufMessage(std::string_view bytes) : rest_(bytes) {}

    // The next field, or nothing at the end. Throws std::out_of_range if the bytes are not a protobuf message.
    std::optional<ProtobufField> next();

    // The next number of a packed field, or nothing at the end. Throws std::out_of_range like `next`.
    std::optional<uint64_t> next_packed();

private:
    uint64_t varint();
    std::string_view take(uint64_t count);

    std::string_view rest_;
};

template <class Visit> void each_field(std::string_view bytes, Visit visit) {
    ProtobufMessage message(bytes);
    while (const auto field = message.next()) visit(*field);
}

// The content of a graph file. Throws Error if it is too large to be a graph whose weights lie outside.
std::string read_graph(const std::filesystem::path &path);

// A constant of a graph. `type` is a TensorProto.DataType. The bytes are in `raw` if `is_raw`, at `offset` of the
// weights file if `is_external`, and otherwise in a form that is not read.
struct Initializer {
    int64_t type = 0, count = 1;
    std::string raw;
    bool is_raw = false, is_external = false;
    uint64_t offset = 0;
    std::optional<uint64_t> bytes;  // length of external data, if the graph gives it

    // Bytes of the tensor; nothing for types that a bundle's graphs do not have.
    std::optional<uint64_t> size() const;
};

// The constants of the part's graph by name, without those of nested graphs. Calls check_external_data first. Throws
// Error.
std::map<std::string, Initializer> read_initializers(const Bundle &bundle, const std::string &part);

}  // namespace arcflow
