// The bundle's built engines: a folder of records -> the engine that fits this machine (docs/bundle.md, E1 to E5).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "manifest.h"

namespace arcflow {

// One input's smallest, best and largest shape.
struct ProfileShapes {
    std::vector<int64_t> min, opt, max;
};

// What an engine depends on (E2).
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
};

// What an engine must have been built for to run here. `gpu` is the product's name for TensorRT, whose engines are for
// one product, and none for TensorRT-RTX.
struct Host {
    std::string builder, builder_version, target;
    std::optional<std::string> gpu;
    std::string platform;
};

struct BuiltEngine {
    std::filesystem::path path;
    EngineRecord record;
};

// Operating system and processor, such as "linux-x86_64".
std::string this_platform();

// Read and check one record (E1); the engine itself is not looked at. Throws Error.
EngineRecord read_record(const std::filesystem::path &path);

// The engine of `part` for `host`. Library, version and GPU are compared first, then graph, weights and precision (E4);
// nothing of the engine is read. Throws Error that names what differs.
BuiltEngine find_engine(const Bundle &bundle, const std::string &part, const Host &host);

// Compare the engine's size with its record, and its SHA-256 if it has at most 64 MiB or with `full` (E5). Throws
// Error.
void check_engine(const BuiltEngine &engine, bool full);

}  // namespace arcflow
