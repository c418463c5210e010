// ONNX graphs: of their protobuf only what leads to tensors is understood, the rest is skipped. Field numbers are those
// of onnx.proto, which may add fields but never renumber them.
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
    std::string_view bytes;  // of a length-delimited field, null for others
    uint64_t value;          // of a varint, 0 for others
};

// The fields of one message, in order.
class ProtobufMessage {
public:
    explicit ProtobufMessage(std::string_view bytes) : rest_(bytes) {}

    // Nothing at the end. Throws std::out_of_range where the bytes are no protobuf.
    std::optional<ProtobufField> next();

    // One of several numbers that are packed into one field; likewise.
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

// The bytes of a graph whose weights lie outside it. Throws Error.
std::string read_graph(const std::filesystem::path &path);

// A tensor of constants in a graph. `type` is of onnx.proto's TensorProto.DataType. Its bytes are `raw`, or in the
// weights file from `offset`, or neither where they are written in another way.
struct Initializer {
    int64_t type = 0, count = 1;
    std::string raw;
    bool is_raw = false, is_external = false;
    uint64_t offset = 0;
    std::optional<uint64_t> bytes;  // of external data, where the graph tells

    // How many bytes it takes; none for types that no graph of a bundle has.
    std::optional<uint64_t> size() const;
};

// Those of the part's graph by name, without those of graphs within it, after check_external_data. Throws Error.
std::map<std::string, Initializer> read_initializers(const Bundle &bundle, const std::string &part);

}  // namespace arcflow
