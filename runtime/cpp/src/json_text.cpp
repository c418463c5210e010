#include "json_text.h"

#include <charconv>
#include <cmath>

namespace arcflow {
namespace {

// The shortest digits that read back as `value`, laid out as Python's json module does, since the digest of a manifest
// depends on it (B3): an exponent below 1e-4 and from 1e16 on, and ".0" after whole numbers.
template <class Float> std::string number_text(Float value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
    char buffer[64];
    const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
    const std::string text(buffer, end);
    const size_t e = text.find('e');
    const std::string sign = text[0] == '-' ? "-" : "";
    std::string digits;
    for (const char c : text.substr(0, e))
        if (c >= '0' && c <= '9') digits += c;
    const int exponent = std::stoi(text.substr(e + 1));
    if (exponent < -4 || exponent >= 16) {
        const std::string fraction = digits.size() > 1 ? "." + digits.substr(1) : "";
        return sign + digits[0] + fraction + text.substr(e);
    }
    if (exponent < 0) return sign + "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
    const size_t whole = static_cast<size_t>(exponent) + 1;
    if (digits.size() <= whole) return sign + digits + std::string(whole - digits.size(), '0') + ".0";
    return sign + digits.substr(0, whole) + "." + digits.substr(whole);
}

template <class Values, class Write> std::string list_text(const Values &values, Write write) {
    std::string text = "[";
    for (const auto &value : values) text += (text.size() > 1 ? ", " : "") + write(value);
    return text + "]";
}

}  // namespace

std::string json_text(std::string_view text) {
    std::string out = "\"";
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (c == '\n') {
            out += "\\n";
        } else if (c == '\r') {
            out += "\\r";
        } else if (c == '\t') {
            out += "\\t";
        } else if (byte < 0x20 || byte == 0x7F) {
            out += "\\u00";
            out += "0123456789abcdef"[byte >> 4];
            out += "0123456789abcdef"[byte & 15];
        } else {
            out += c;
        }
    }
    return out + '"';
}

std::string json_text(double value) { return number_text(value); }

std::string json_text(float value) { return number_text(value); }

std::string json_text(const std::vector<int64_t> &values) {
    return list_text(values, [](int64_t value) { return std::to_string(value); });
}

std::string json_text(const std::vector<double> &values) {
    return list_text(values, [](double value) { return json_text(value); });
}

std::string json_text(const std::vector<std::string> &texts) {
    return list_text(texts, [](const std::string &text) { return json_text(text); });
}

}  // namespace arcflow
