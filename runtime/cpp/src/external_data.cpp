// Checks where the tensors of an ONNX graph keep their data, by reading the graph's protobuf.
#include "external_data.h"

#include <charconv>
#include <cstdint>
#include <stdexcept>
#include <string_view>

#include "error.h"
#include "json_text.h"
#include "onnx_graph.h"

namespace arcflow {
namespace {

// How deep graphs may nest inside attributes of nodes such as If and Loop. Exported graphs do not nest.
constexpr int max_nesting = 16;

class Check {
public:
    Check(std::filesystem::path graph, const Bundle &bundle, const Part &part)
        : where_(std::move(graph)),
          weights_(part.weights),
          location_(std::filesystem::path("/" + part.weights)
                        .lexically_relative(std::filesystem::path("/" + part.graph).parent_path())
                        .string()),
          weights_bytes_(bundle.manifest.files.at(part.weights).bytes) {}

    void model(std::string_view bytes) const {
        each_field(bytes, [&](const ProtobufField &f) {
            if (f.number == 7) {  // graph
                graph(f.bytes, 0);
            } else if (f.number == 20) {  // training_info: two graphs
                each_field(f.bytes, [&](const ProtobufField &inner) { graph(inner.bytes, 0); });
            } else if (f.number == 25) {  // functions
                each_field(f.bytes, [&](const ProtobufField &inner) {
                    if (inner.number == 7) node(inner.bytes, 0);
                    else if (inner.number == 11) attribute(inner.bytes, 0);  // attribute_proto
                });
            }
        });
    }

private:
    void graph(std::string_view bytes, int depth) const {
        if (depth > max_nesting) throw std::out_of_range("depth");
        each_field(bytes, [&](const ProtobufField &f) {
            if (f.number == 1) node(f.bytes, depth);
            else if (f.number == 5) tensor(f.bytes);   // initializer
            else if (f.number == 15) sparse(f.bytes);  // sparse_initializer
        });
    }

    void node(std::string_view bytes, int depth) const {
        each_field(bytes, [&](const ProtobufField &f) {
            if (f.number == 5) attribute(f.bytes, depth);
        });
    }

    void attribute(std::string_view bytes, int depth) const {
        each_field(bytes, [&](const ProtobufField &f) {
            if (f.number == 5 || f.number == 10) tensor(f.bytes);                 // t, tensors
            else if (f.number == 22 || f.number == 23) sparse(f.bytes);           // sparse_tensor, sparse_tensors
            else if (f.number == 6 || f.number == 11) graph(f.bytes, depth + 1);  // g, graphs
        });
    }

    void sparse(std::string_view bytes) const {
        each_field(bytes, [&](const ProtobufField &f) {
            if (f.number == 1 || f.number == 2) tensor(f.bytes);  // values, indices
        });
    }

    void tensor(std::string_view bytes) const {
        std::string name;
        bool external = false;
        bool located = false;
        uint64_t offset = 0, length = 0;
        each_field(bytes, [&](const ProtobufField &f) {
            if (f.number == 8) {
                name = f.bytes;
            } else if (f.number == 14) {  // data_location: 1 is EXTERNAL
                external = external || f.value == 1;
            } else if (f.number == 13) {  // external_data: one key with its value
                external = true;
                std::string_view key, value;
                each_field(f.bytes, [&](const ProtobufField &entry) {
                    if (entry.number == 1) key = entry.bytes;
                    else if (entry.number == 2) value = entry.bytes;
                });
                if (key == "location") {
                    location(name, value);
                    located = true;
                } else if (key == "offset") {
                    offset = number(name, key, value);
                } else if (key == "length") {
                    length = number(name, key, value);
                }
            }
        });
        if (external && !located) throw wrong("tensor " + json_text(name) + " has external data without a location");
        if (external && (offset > weights_bytes_ || length > weights_bytes_ - offset)) {
            throw wrong("external data of tensor " + json_text(name) + " must lie within the " +
                        std::to_string(weights_bytes_) + " bytes of " + weights_ + ", got bytes " +
                        std::to_string(offset) + " to " + std::to_string(offset) + " + " + std::to_string(length));
        }
    }

    void location(const std::string &name, std::string_view value) const {
        // Compared as text, because ".." after a link would lead to another folder.
        if (value != location_ && value != "./" + location_) {
            throw wrong("external data of tensor " + json_text(name) + " must lie in the part's weights " + weights_ +
                        ", got " + json_text(value));
        }
    }

    uint64_t number(const std::string &name, std::string_view key, std::string_view value) const {
        uint64_t parsed = 0;
        const auto [stop, error] = std::from_chars(value.data(), value.data() + value.size(), parsed);
        if (error != std::errc() || stop != value.data() + value.size()) {
            throw wrong("external data of tensor " + json_text(name) + ": " + std::string(key) +
                        " must be a number of bytes, got " + json_text(value));
        }
        return parsed;
    }

    Error wrong(const std::string &what) const {
        return bundle_error(where_.string() + ": " + what + "; export the bundle again");
    }

    std::filesystem::path where_;
    std::string weights_, location_;
    uint64_t weights_bytes_;
};

}  // namespace

void check_external_data(const Bundle &bundle, const std::string &part) {
    const Part &spec = bundle.manifest.parts.at(part);
    const std::filesystem::path path = bundle.path(spec.graph);
    const std::string bytes = read_graph(path);
    try {
        Check(path, bundle, spec).model(bytes);
    } catch (const std::out_of_range &) {
        throw bundle_error(path.string() + " is not an ONNX graph; export the bundle again");
    }
}

}  // namespace arcflow
