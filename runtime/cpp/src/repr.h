// Values as the Python runtime writes them in its messages, so that both give the same sentences.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace arcflow {

std::string repr(std::string_view text);  // 'text', with escapes
std::string repr(double value);           // shortest text that gives the number back: 3.2, 10000.0, 1e-06
std::string repr(const std::vector<int64_t> &values);
std::string repr(const std::vector<std::string> &texts);

// The shortest text of a float32, such as 3.2 where its value as a double would be 3.200000047683716.
std::string repr_float32(float value);

}  // namespace arcflow
