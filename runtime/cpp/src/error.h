// The library's only exception type: a status of the C API, and a text that says what is wrong, what was expected and
// what to do.
#pragma once

#include <stdexcept>
#include <string>

#include "arcflow/arcflow.h"

namespace arcflow {

class Error : public std::runtime_error {
public:
    Error(arcflow_status code, const std::string &what) : std::runtime_error(what), status(code) {}
    arcflow_status status;
};

// What to do where memory ran out.
inline constexpr const char *save_memory =
    "open with the memory mode \"balanced\" or \"low\", or ask for fewer or smaller images";

inline Error request_error(const std::string &what) { return {ARCFLOW_REQUEST_ERROR, what}; }
inline Error bundle_error(const std::string &what) { return {ARCFLOW_BUNDLE_ERROR, what}; }
inline Error engine_error(const std::string &what) { return {ARCFLOW_ENGINE_ERROR, what}; }

}  // namespace arcflow
