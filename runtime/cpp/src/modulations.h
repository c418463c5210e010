// A cache of the conditioner's results. It is a quarter of FLUX's weights, and must be loaded to run unless the memory
// mode is resident.
#pragma once

#include <string>
#include <utility>

#include "engine.h"
#include "lora.h"
#include "recent.h"

namespace arcflow {

// What a modulation depends on: the LoRAs of the conditioner, and the bytes of its inputs.
using ModulationKey = std::pair<LoraKey, std::string>;

inline ModulationKey modulation_key(const PreparedLoras &loras, const Tensors &inputs) {
    ModulationKey key{loras.of("conditioner") == nullptr ? LoraKey() : loras.key, {}};
    for (const auto &[name, tensor] : inputs) {
        key.second += name + " " + tensor.describe() + " ";
        key.second.append(reinterpret_cast<const char *>(tensor.data.data()), tensor.data.size());
    }
    return key;
}

using ModulationCache = Recent<ModulationKey, Tensor>;

}  // namespace arcflow
