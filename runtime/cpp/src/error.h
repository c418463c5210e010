// The library's one exception: a status of the C ABI with a text that names the thing, what was expected, what to do.
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

inline Error request_error(const std::string &what) { return {ARCFLOW_REQUEST_ERROR, what}; }
inline Error bundle_error(const std::string &what) { return {ARCFLOW_BUNDLE_ERROR, what}; }
inline Error engine_error(const std::string &what) { return {ARCFLOW_ENGINE_ERROR, what}; }

}  // namespace arcflow
