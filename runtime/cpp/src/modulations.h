// A cache of the conditioner's results. It saves loading the conditioner, 6.6 GB for FLUX in bfloat16, which stays
// loaded in the memory mode resident only.
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
