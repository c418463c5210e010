#include "json.h"

#include <limits>
#include <set>
#include <vector>

#include "error.h"
#include "repr.h"

namespace arcflow {
namespace {

constexpr int max_depth = 64;
constexpr size_t max_repr_bytes = 1000;

// A string or key with every character beyond printable ASCII escaped, in quotes.
std::string json_text(const Json &text) { return text.dump(-1, ' ', true); }

void write_canonical(const Json &value, std::string &out) {
    if (value.is_object()) {
        out += '{';
        for (const auto &[key, item] : value.items()) {
            if (out.back() != '{') out += ',';
            out += json_text(key) + ':';
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
        out += repr(value.get<double>());
    } else {
        out += json_text(value);
    }
}

// Stops soon after max_repr_bytes.
void write_repr(const Json &value, std::string &out) {
    if (value.is_object()) {
        const char *separator = "";
        out += '{';
        for (const auto &[key, item] : value.items()) {
            out += separator + repr(key) + ": ";
            write_repr(item, out);
            separator = ", ";
            if (out.size() > max_repr_bytes) break;
        }
        out += '}';
    } else if (value.is_array()) {
        const char *separator = "";
        out += '[';
        for (const Json &item : value) {
            out += separator;
            write_repr(item, out);
            separator = ", ";
            if (out.size() > max_repr_bytes) break;
        }
        out += ']';
    } else if (value.is_string()) {
        out += repr(value.get_ref<const std::string &>());
    } else if (value.is_number_float()) {
        out += repr(value.get<double>());
    } else if (value.is_boolean()) {
        out += value.get<bool>() ? "True" : "False";
    } else if (value.is_null()) {
        out += "None";
    } else {
        out += value.dump();
    }
}

}  // namespace

Json read_json(std::string_view text, const std::string &where) {
    std::vector<std::set<std::string>> open;  // the keys seen in each object that is open
    const auto watch = [&](int depth, Json::parse_event_t event, Json &parsed) {
        if (depth > max_depth)
            throw bundle_error(where + " is nested deeper than " + std::to_string(max_depth) + "; it is not ours");
        if (event == Json::parse_event_t::object_start) open.emplace_back();
        if (event == Json::parse_event_t::object_end) open.pop_back();
        if (event == Json::parse_event_t::key) {
            const auto &key = parsed.get_ref<const std::string &>();
            if (!open.back().insert(key).second)
                throw bundle_error(where + ": an object has the key " + repr(key) + " twice; export the bundle again");
        }
        return true;
    };
    try {
        return Json::parse(text.begin(), text.end(), watch);
    } catch (const Json::exception &e) {
        throw bundle_error(where + " is not valid JSON (" + e.what() + "); export the bundle again");
    }
}

std::string canonical(const Json &value) {
    std::string out;
    write_canonical(value, out);
    return out;
}

std::string repr_json(const Json &value) {
    std::string out;
    write_repr(value, out);
    if (out.size() > max_repr_bytes) out = out.substr(0, max_repr_bytes) + "...";
    return out;
}

void Place::check(bool ok, const std::string &must) const {
    if (!ok) throw bundle_error(where_ + " " + must + ", got " + repr_json(value_));
}

int64_t Place::integer(const char *type) const {
    check(value_.is_number_integer() && (value_.is_number_unsigned() || value_.get<int64_t>() >= 0),
          std::string("must be of type ") + type);
    check(value_.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()), "must be below 2**63");
    return value_.get<int64_t>();
}

double Place::real(const char *type) const {
    check(value_.is_number(), std::string("must be of type ") + type);
    return value_.get<double>();
}

bool Place::boolean() const {
    check(value_.is_boolean(), "must be of type bool");
    return value_.get<bool>();
}

std::string Place::text(const char *type) const {
    check(value_.is_string(), std::string("must be of type ") + type);
    return value_.get<std::string>();
}

std::string Place::one_of(std::initializer_list<const char *> options) const {
    if (value_.is_string()) {
        for (const char *option : options)
            if (value_.get_ref<const std::string &>() == option) return option;
    }
    check(false, "must be one of " + repr(std::vector<std::string>(options.begin(), options.end())));
    return "";
}

void Place::keys(std::initializer_list<const char *> required, std::initializer_list<const char *> optional) const {
    check(value_.is_object(), "must be an object");
    std::set<std::string> known(required.begin(), required.end());
    known.insert(optional.begin(), optional.end());
    std::vector<std::string> unknown, missing;
    for (const auto &entry : value_.items())
        if (known.count(entry.key()) == 0) unknown.push_back(entry.key());
    if (!unknown.empty()) {
        throw bundle_error(where_ + ": unknown keys " + repr_json(unknown) + "; known are " +
                           repr(std::vector<std::string>(known.begin(), known.end())));
    }
    for (const std::string &key : std::set<std::string>(required.begin(), required.end()))
        if (!value_.contains(key)) missing.push_back(key);
    if (!missing.empty()) throw bundle_error(where_ + ": missing keys " + repr(missing));
}

Place Place::operator[](const char *key) const {
    static const Json null;
    const auto found = value_.find(key);
    return {found == value_.end() ? null : *found, where_ + ": " + key};
}

}  // namespace arcflow
