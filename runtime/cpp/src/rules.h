// The manifest's rules beyond its types.
#pragma once

#include <string>

#include "manifest.h"

namespace arcflow {

constexpr size_t max_manifest_bytes = size_t{16} << 20;

// Check values that the pipeline relies on, so that no stage has to: those of arcflow_runtime/rules.py, and bounds that
// keep products of sizes within 64 bits. Throws Error that names the key of the manifest at `where`.
void check_values(const Manifest &manifest, const std::string &where);

}  // namespace arcflow
