// Strict reading of JSON files of ours: a value and its place -> what it must be, or an error that names the place.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

namespace arcflow {

// Objects are ordered by key, bytewise, which is by code point.
using Json = nlohmann::json;

// Parse UTF-8 text. Refused beyond JSON's grammar: a key that an object has twice, and more than 64 levels, so that
// recursion over the result is safe. Throws Error that names the file `where`.
Json read_json(std::string_view text, const std::string &where);

// The canonical text of B3: json.dumps(value, sort_keys=True, separators=(",", ":")).
std::string canonical(const Json &value);

// `value` as Python would write it, cut at 1000 bytes.
std::string repr_json(const Json &value);

// A value and its place, such as "manifest.json: parts.backbone: inputs[0]"; lives no longer than the value. Each
// function throws Error where the value is not of its type (B2).
class Place {
public:
    Place(const Json &value, std::string where) : value_(value), where_(std::move(where)) {}

    const std::string &where() const { return where_; }
    bool is_null() const { return value_.is_null(); }
    int64_t integer(const char *type = "int") const;  // at least 0
    double real(const char *type = "float") const;
    bool boolean() const;
    std::string text(const char *type = "str") const;
    std::string one_of(std::initializer_list<const char *> options) const;
    bool is_text() const { return value_.is_string(); }

    // An object with all of `required`, perhaps some of `optional`, and no other keys.
    void keys(std::initializer_list<const char *> required, std::initializer_list<const char *> optional = {}) const;

    // The value of a key that `keys` has checked; null where it is left out.
    Place operator[](const char *key) const;
    bool has(const char *key) const { return value_.contains(key); }

    // Call `use(item)` for each item of a list, or `use(key, item)` for each of an object with any keys.
    template <class Use>
    void each_item(Use use) const {
        check(value_.is_array(), "must be a list");
        size_t i = 0;
        for (const Json &item : value_) use(Place(item, where_ + "[" + std::to_string(i++) + "]"));
    }
    template <class Use>
    void each_entry(Use use) const {
        check(value_.is_object(), "must be an object");
        for (const auto &[key, item] : value_.items()) use(key, Place(item, where_ + "." + key));
    }

private:
    void check(bool ok, const std::string &must) const;

    const Json &value_;
    std::string where_;
};

}  // namespace arcflow
