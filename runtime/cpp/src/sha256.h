// SHA-256 digests as 64 lower-case hexadecimal digits.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace arcflow {

std::string sha256(std::string_view bytes);

// Digest of a file, read in blocks of 4 MiB. Throws Error if it cannot be read.
std::string sha256_file(const std::filesystem::path &path);

}  // namespace arcflow
