#include "json.h"

#include <limits>
#include <set>
#include <vector>

#include "error.h"
#include "json_text.h"

namespace arcflow {
namespace {

constexpr int max_depth = 64;
constexpr size_t max_message_bytes = 1000;

// A string or key in quotes, with every character beyond printable ASCII escaped.
std::string ascii_text(const Json &text) { return text.dump(-1, ' ', true); }

void write_canonical(const Json &value, std::string &out) {
    if (value.is_object()) {
        out += '{';
        for (const auto &[key, item] : value.items()) {
            if (out.back() != '{') out += ',';
            out += ascii_text(key) + ':';
            write_canonical(item, out);
        }
        out += '}';
    } else if (value.is_array()) {
        out += '[';
        for (const Json &item : value) {
            if (&item != &value.front()) out += ',';
            write_canonical(item, out);
        }
        out += ']';
    } else if (value.is_number_float()) {
        out += json_text(value.get<double>());
    } else {
        out += ascii_text(value);
    }
}

// Stops soon after max_message_bytes.
void write_message(const Json &value, std::string &out) {
    if (value.is_object()) {
        const char *separator = "";
        out += '{';
        for (const auto &[key, item] : value.items()) {
            out += separator + json_text(key) + ": ";
            write_message(item, out);
            separator = ", ";
            if (out.size() > max_message_bytes) break;
        }
        out += '}';
    } else if (value.is_array()) {
        const char *separator = "";
        out += '[';
        for (const Json &item : value) {
            out += separator;
            write_message(item, out);
            separator = ", ";
            if (out.size() > max_message_bytes) break;
        }
        out += ']';
    } else if (value.is_string()) {
        out += json_text(value.get_ref<const std::string &>());
    } else if (value.is_number_float()) {
        out += json_text(value.get<double>());
    } else {
        out += value.dump();
    }
}

}  // namespace

Json read_json(std::string_view text, const std::string &where) {
    std::vector<std::set<std::string>> open;  // the keys so far of each object that is not yet closed
    const auto watch = [&](int depth, Json::parse_event_t event, Json &parsed) {
        if (depth > max_depth) {
            throw FormatError(where + " must not be nested deeper than " + std::to_string(max_depth) +
                              " levels; no file of this project is");
        }
        if (event == Json::parse_event_t::object_start) open.emplace_back();
        if (event == Json::parse_event_t::object_end) open.pop_back();
        if (event == Json::parse_event_t::key) {
            const auto &key = parsed.get_ref<const std::string &>();
            if (!open.back().insert(key).second)
                throw FormatError(where + ": an object has the key " + json_text(key) + " twice");
        }
        return true;
    };
    try {
        return Json::parse(text.begin(), text.end(), watch);
    } catch (const Json::exception &e) {
        throw FormatError(where + " is not valid JSON (" + e.what() + ")");
    }
}

std::string canonical(const Json &value) {
    std::string out;
    write_canonical(value, out);
    return out;
}

std::string message_text(const Json &value) {
    std::string out;
    write_message(value, out);
    if (out.size() > max_message_bytes) out = out.substr(0, max_message_bytes) + "...";
    return out;
}

void Place::check(bool ok, const std::string &must) const {
    if (!ok) throw FormatError(where_ + " must be " + must + ", got " + message_text(value_));
}

int64_t Place::integer(const char *must) const {
    check(value_.is_number_integer() && (value_.is_number_unsigned() || value_.get<int64_t>() >= 0), must);
    check(value_.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()), "below 2^63");
    return value_.get<int64_t>();
}

double Place::real(const char *must) const {
    check(value_.is_number(), must);
    return value_.get<double>();
}

bool Place::boolean() const {
    check(value_.is_boolean(), "true or false");
    return value_.get<bool>();
}

std::string Place::text(const char *must) const {
    check(value_.is_string(), must);
    return value_.get<std::string>();
}

std::string Place::one_of(std::initializer_list<const char *> options) const {
    if (value_.is_string()) {
        for (const char *option : options)
            if (value_.get_ref<const std::string &>() == option) return option;
    }
    check(false, "one of " + json_text(std::vector<std::string>(options.begin(), options.end())));
    return "";
}

void Place::keys(std::initializer_list<const char *> required, std::initializer_list<const char *> optional) const {
    check(value_.is_object(), "an object");
    std::set<std::string> known(required.begin(), required.end());
    known.insert(optional.begin(), optional.end());
    std::vector<std::string> unknown, missing;
    for (const auto &entry : value_.items())
        if (known.count(entry.key()) == 0) unknown.push_back(entry.key());
    if (!unknown.empty()) {
        throw FormatError(where_ + ": unknown keys " + message_text(unknown) + "; the known keys are " +
                          json_text(std::vector<std::string>(known.begin(), known.end())));
    }
    for (const std::string &key : std::set<std::string>(required.begin(), required.end()))
        if (!value_.contains(key)) missing.push_back(key);
    if (!missing.empty()) throw FormatError(where_ + ": missing keys " + json_text(missing));
}

Place Place::operator[](const char *key) const {
    static const Json null;
    const auto found = value_.find(key);
    return {found == value_.end() ? null : *found, where_ + ": " + key};
}

}  // namespace arcflow
