// Reads the project's JSON files strictly: a value and its place -> its content, or an error that names the place.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "error.h"

namespace arcflow {

// Object keys are sorted by their bytes, which sorts them by code point.
using Json = nlohmann::json;

// What everything in this file throws. The text says what must be and what was found; it has no advice, since that
// depends on the file: the caller adds it.
class FormatError : public Error {
public:
    explicit FormatError(const std::string &what) : Error(ARCFLOW_BUNDLE_ERROR, what) {}
};

// Parse UTF-8 text. Stricter than JSON: an object must not have a key twice, and nesting is limited to 64 levels, so
// that recursion over the result is safe. Throws FormatError that names the file `where`.
Json read_json(std::string_view text, const std::string &where);

// The canonical text of B3: as Python's json.dumps(value, sort_keys=True, separators=(",", ":")).
std::string canonical(const Json &value);

// `value` for an error message, as JSON with a space after each comma and colon, cut after about 1000 bytes.
std::string message_text(const Json &value);

// A value and its place in a file, such as "manifest.json: parts.backbone: inputs[0]". It refers to the value, which
// must outlive it. Each function throws FormatError if the value does not have the type (B2); `must` names the type in
// the message.
class Place {
public:
    Place(const Json &value, std::string where) : value_(value), where_(std::move(where)) {}

    const std::string &where() const { return where_; }
    bool is_null() const { return value_.is_null(); }
    int64_t integer(const char *must = "an integer of at least 0") const;
    double real(const char *must = "a number") const;
    bool boolean() const;
    std::string text(const char *must = "a string") const;
    std::string one_of(std::initializer_list<const char *> options) const;
    bool is_text() const { return value_.is_string(); }

    // Check that the value is an object with all of the `required` keys and no keys but these and `optional`.
    void keys(std::initializer_list<const char *> required, std::initializer_list<const char *> optional = {}) const;

    // The value of a key that `keys` has checked; null if an optional key is absent.
    Place operator[](const char *key) const;
    bool has(const char *key) const { return value_.contains(key); }

    // Call `use(item)` for each item of a list, or `use(key, item)` for each entry of an object with any keys.
    template <class Use> void each_item(Use use) const {
        check(value_.is_array(), "a list");
        size_t i = 0;
        for (const Json &item : value_) use(Place(item, where_ + "[" + std::to_string(i++) + "]"));
    }
    template <class Use> void each_entry(Use use) const {
        check(value_.is_object(), "an object");
        for (const auto &[key, item] : value_.items()) use(key, Place(item, where_ + "." + key));
    }

private:
    void check(bool ok, const std::string &must) const;

    const Json &value_;
    std::string where_;
};

}  // namespace arcflow
