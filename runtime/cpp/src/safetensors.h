// Reads safetensors files: 8 bytes with the header's size, a JSON header, then the bytes of the tensors.
#pragma once

#include <cstdint>
#include <filesystem>
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

// Parse the text of a header; `data_bytes` is the size of the file behind it. The tensors must cover these bytes
// without gaps or overlaps, and each must have the size that its shape and dtype take. `where` is the file's name for
// errors. Throws Error.
std::map<std::string, SafetensorsEntry> parse_safetensors_header(std::string_view header, uint64_t data_bytes,
                                                                 const std::string &where);

// Read the named tensors. Throws Error if the file is damaged, or a tensor is missing or of a type that Tensor does not
// have.
std::map<std::string, Tensor> load_safetensors(const std::filesystem::path &path,
                                               const std::vector<std::string> &names);

// The bundle's baked modulation, [n, M] float32 by number of steps n (B10); empty if it has none.
std::map<int64_t, Tensor> load_modulation(const Bundle &bundle);

}  // namespace arcflow
