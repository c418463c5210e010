// SHA-256 in lower-case hexadecimal, by libcrypto.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace arcflow {

std::string sha256(std::string_view bytes);

// Of a file, read in 4 MiB blocks. Throws Error that names the file where it cannot be read.
std::string sha256_file(const std::filesystem::path &path);

}  // namespace arcflow
