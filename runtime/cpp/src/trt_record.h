// Selects the built engine that fits this machine from the records in a bundle (docs/bundle.md, E1 to E5).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "manifest.h"

namespace arcflow {

// Smallest, best and largest shape of one input.
struct ProfileShapes {
    std::vector<int64_t> min, opt, max;
};

// Everything that an engine depends on (E2).
struct EngineKey {
    std::string part, graph, weights;
    std::string precision;
    std::vector<std::map<std::string, ProfileShapes>> profiles;
    std::vector<std::string> flags;
    std::optional<int64_t> optimization_level, workspace_bytes;
    std::string builder, builder_version, target;
    std::optional<std::string> gpu;
    std::string platform;
};

struct EngineRecord {
    std::string file;
    uint64_t bytes;
    std::string sha256;
    EngineKey key;
    // Bytes of activations for the largest shapes of each profile; empty if the builder did not tell.
    std::vector<int64_t> activation_bytes;
    bool allocates_when_run = false;  // then no run can be captured
};

// The machine that an engine must have been built for. `gpu`: product name for TensorRT, whose engines fit one product;
// nothing for TensorRT-RTX.
struct Host {
    std::string builder, builder_version, target;
    std::optional<std::string> gpu;
    std::string platform;
};

struct BuiltEngine {
    std::filesystem::path path;
    EngineRecord record;
};

// The operating system and processor, such as "linux-x86_64".
std::string this_platform();

// Read and check one record (E1), without its engine file. Throws Error.
EngineRecord read_record(const std::filesystem::path &path);

// Find the engine of `part` for `host`. Compares library, version and GPU first, then graph, weights and precision
// (E4); does not read the engine file. Throws Error that names what differs.
BuiltEngine find_engine(const Bundle &bundle, const std::string &part, const Host &host);

// Check an engine file's size, and its SHA-256 if it has at most 64 MiB or `full` is set (E5). Throws Error.
void check_engine(const BuiltEngine &engine, bool full);

}  // namespace arcflow
