// Reads safetensors files: 8 bytes with the header's size, a JSON header, then the bytes of the tensors.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.h"
#include "tensor.h"

namespace arcflow {

// One tensor of a header; `begin` and `end` are offsets behind the header.
struct SafetensorsEntry {
    std::string dtype;  // the format's name, such as "F32"
    std::vector<int64_t> shape;
    uint64_t begin, end;
};

struct SafetensorsHeader {
    std::map<std::string, SafetensorsEntry> entries;
    std::map<std::string, std::string> metadata;
};

// Parse the text of a header; `data_bytes` is the size of the file behind it. The tensors must cover these bytes
// without gaps or overlaps, and each must have the size that its shape and dtype take. `where` is the file's name for
// errors. Throws Error.
SafetensorsHeader parse_safetensors_header(std::string_view header, uint64_t data_bytes, const std::string &where);

// The format's name of a dtype, such as "F32".
const char *safetensors_name(DType dtype);

// An opened file whose header has been checked. For one thread.
class SafetensorsFile {
public:
    // Throws Error if the file cannot be read or is damaged.
    explicit SafetensorsFile(const std::filesystem::path &path);

    const SafetensorsHeader &header() const { return header_; }

    // Read a tensor. Throws Error if it is missing or of a type that Tensor does not have.
    Tensor load(const std::string &name);

private:
    std::string where_;
    std::ifstream file_;
    SafetensorsHeader header_;
    uint64_t data_begin_ = 0;
};

// Read the named tensors; throws as SafetensorsFile does.
std::map<std::string, Tensor> load_safetensors(const std::filesystem::path &path,
                                               const std::vector<std::string> &names);

// The bundle's baked modulation, [n, M] float32 by number of steps n (B10); empty if it has none.
std::map<int64_t, Tensor> load_modulation(const Bundle &bundle);

// The input [n, in] float32 of the linears of a table with slots, by number of steps n (B14); empty without slots.
std::map<int64_t, Tensor> load_conditioning(const Bundle &bundle);

}  // namespace arcflow
