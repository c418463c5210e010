// Values as JSON text, for error messages and for the canonical form of a manifest (B3).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace arcflow {

std::string json_text(std::string_view text);  // in double quotes, with escapes
std::string json_text(double value);           // the shortest text that reads back as `value`: 3.2, 10000.0, 1e-06
std::string json_text(float value);            // the same for float32: 3.2 for 3.2f
std::string json_text(const std::vector<int64_t> &values);     // [1, 2]
std::string json_text(const std::vector<double> &values);      // [1.0, 0.5]
std::string json_text(const std::vector<std::string> &texts);  // ["a", "b"]

}  // namespace arcflow
