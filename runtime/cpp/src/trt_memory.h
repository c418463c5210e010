// The memory that a bundle needs on a GPU in each mode, and the mode that fits (docs/memory.md): manifest, engines and
// image size -> bytes. The Python runtime has the same sums.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "manifest.h"
#include "memory_mode.h"
#include "trt_shapes.h"

namespace arcflow {

// One call: images of one size, whose texts have `text_tokens` states.
struct ImageSize {
    int64_t batch, height_px, width_px, text_tokens, steps;
};

// The size that a request without fields generates, with the longest text.
ImageSize usual_size(const Manifest &manifest);

// Input shapes of every part for this size, at the smallest LoRA rank. Text encoders run one prompt at a time.
std::map<std::string, Shapes> part_inputs(const Manifest &manifest, const ImageSize &size);

// Bytes of a part's engine: its weights, and the activations of one run. 0 for activations that are not known.
struct EngineBytes {
    uint64_t weights = 0, activations = 0;
};

// What a loaded engine takes, for inputs of these shapes: as much as its file has, and the part's weights if they are
// not in it. Weights that are streamed do not count, because only those are on the GPU that have room there.
EngineBytes engine_bytes(const Bundle &bundle, const EngineRecord &record, const Shapes &inputs);

// The most bytes that are held at one time while images of this size are generated.
uint64_t peak_bytes(const Manifest &manifest, const ImageSize &size, const std::map<std::string, EngineBytes> &parts,
                    MemoryMode mode);

// The mode that keeps the most parts loaded among those that fit into `free_bytes`, or low if none does. `why` is a
// sentence about it, or "" for resident.
MemoryMode choose_memory(const Manifest &manifest, const std::map<std::string, EngineBytes> &parts, uint64_t free_bytes,
                         std::string &why);

}  // namespace arcflow
