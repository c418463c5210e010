// Safetensors files: 8 bytes with the header's size, a JSON header, and the tensors' bytes one after the other.
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

// One tensor: where its bytes are behind the header.
struct SafetensorsEntry {
    std::string dtype;  // the format's name, such as "F32"
    std::vector<int64_t> shape;
    uint64_t begin, end;
};

// Parse a header, as text, of a file with `data_bytes` behind it. The tensors must cover these bytes without holes or
// overlaps, each as many as its shape and dtype take. Throws Error that names the file `where`.
std::map<std::string, SafetensorsEntry> parse_safetensors_header(std::string_view header, uint64_t data_bytes,
                                                                 const std::string &where);

// The tensors of the given names. Throws Error where the file is damaged, lacks one, or has one of another type than
// Tensor's.
std::map<std::string, Tensor> load_safetensors(const std::filesystem::path &path,
                                               const std::vector<std::string> &names);

// The bundle's baked modulation [n, M] float32 by step count n (B10); empty where it has none.
std::map<int64_t, Tensor> load_modulation(const Bundle &bundle);

}  // namespace arcflow
