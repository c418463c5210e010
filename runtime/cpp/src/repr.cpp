#include "repr.h"

#include <charconv>
#include <cmath>

namespace arcflow {
namespace {

// The digits of `value` and its decimal exponent, laid out by the rule of Python's repr: an exponent below 1e-4 and
// from 1e16 on, a ".0" on whole numbers.
template <class Float>
std::string repr_number(Float value) {
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

template <class Values, class Write>
std::string repr_list(const Values &values, Write write) {
    std::string text = "[";
    for (const auto &value : values) text += (text.size() > 1 ? ", " : "") + write(value);
    return text + "]";
}

}  // namespace

std::string repr(std::string_view text) {
    const bool double_quoted = text.find('\'') != text.npos && text.find('"') == text.npos;
    const char quote = double_quoted ? '"' : '\'';
    std::string out(1, quote);
    for (const char c : text) {
        if (c == quote || c == '\\') {
            out += '\\';
            out += c;
        } else if (c == '\n') {
            out += "\\n";
        } else if (c == '\r') {
            out += "\\r";
        } else if (c == '\t') {
            out += "\\t";
        } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
            out += "\\x";
            out += "0123456789abcdef"[c >> 4];
            out += "0123456789abcdef"[c & 15];
        } else {
            out += c;
        }
    }
    return out + quote;
}

std::string repr(double value) { return repr_number(value); }

std::string repr_float32(float value) { return repr_number(value); }

std::string repr(const std::vector<int64_t> &values) {
    return repr_list(values, [](int64_t value) { return std::to_string(value); });
}

std::string repr(const std::vector<std::string> &texts) {
    return repr_list(texts, [](const std::string &text) { return repr(text); });
}

}  // namespace arcflow
