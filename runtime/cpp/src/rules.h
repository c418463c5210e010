// Rules for the values in a manifest, beyond their types.
#pragma once

#include <string>

#include "manifest.h"

namespace arcflow {

// Check the values that the pipeline relies on, so that no stage has to. The rules are those of
// arcflow_runtime/disk/rules.py, and bounds that keep products of sizes within 64 bits. Throws Error that names the
// key; `where` is the manifest's name for errors.
void check_values(const Manifest &manifest, const std::string &where);

}  // namespace arcflow
