// The memory modes of a pipeline, which say what parts of a bundle stay loaded between images (docs/memory.md).
#pragma once

#include <string>

namespace arcflow {

// In order of the memory that they need, the largest first.
enum class MemoryMode { resident, balanced, low };

inline constexpr const char *memory_modes[] = {"resident", "balanced", "low"};

inline const char *name_of(MemoryMode mode) { return memory_modes[static_cast<int>(mode)]; }

// Whether the part stays loaded. Backbone and VAE decoder are what every image needs.
inline bool keeps(MemoryMode mode, const std::string &part) {
    if (mode == MemoryMode::balanced) return part == "backbone" || part == "vae_decoder";
    return mode == MemoryMode::resident;
}

}  // namespace arcflow
