// LoRAs of a request: factors of each LoRA and its scale -> the inputs of the graphs' LoRA slots (B14).
#pragma once

#include <cstdint>
#include <filesystem>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "manifest.h"
#include "tensor.h"

namespace arcflow {

// The change of one linear at scale 1, in the slot's dtype: `a` [in, R/8, 8] and `b` [R/8, 8, out].
struct LoraFactors {
    Tensor a, b;
    int64_t rank() const { return a.shape[1] * a.shape[2]; }
};

// A LoRA that fits a bundle: its factors by part and linear. The modulation table counts as a part.
struct Lora {
    uint64_t number;   // each LoRA of a process has another
    std::string name;  // for messages
    std::map<std::string, std::map<std::string, LoraFactors>> parts;
};

struct ScaledLora {
    std::shared_ptr<const Lora> lora;
    float scale;  // not 0
};

// Identifies LoRAs with their scales: (number, scale), sorted.
using LoraKey = std::vector<std::pair<uint64_t, float>>;

// LoRAs that are ready to run. `text_key` names those that change a text encoder; equal keys give equal embeddings.
// `inputs`: part -> the inputs of its slots; those of linears that no LoRA changes are left out.
struct PreparedLoras {
    LoraKey key, text_key;
    std::map<std::string, Tensors> inputs;

    size_t bytes() const;
    const Tensors *of(const std::string &part) const;  // null if no LoRA changes the part
};

// Read a file that `arcflow lora convert` wrote for a bundle with the same slots (L1). Sizes are compared with the
// slots before anything is allocated. Throws Error(ARCFLOW_LORA_ERROR).
std::shared_ptr<const Lora> read_lora(const std::filesystem::path &path, const Manifest &manifest);

// Join LoRAs along the rank in the order of their numbers, with their scales in the second factor. Throws
// Error(ARCFLOW_REQUEST_ERROR) that names the linear if its ranks add up to more than the bundle takes, or a factor is
// beyond the slot's dtype.
PreparedLoras prepare_loras(const Manifest &manifest, std::vector<ScaledLora> loras);

// The modulation table [n, M] float32 with the LoRAs of its slots: (c A) B is added to the columns of each linear,
// where c is `conditioning` [n, in] float32.
Tensor changed_table(Tensor table, const Tensor &conditioning, const ModulationTable &spec, const Tensors &inputs);

// Prepared sets of LoRAs that were used last, bounded in number and bytes. Safe to use from several threads.
class LoraSets {
public:
    // `manifest` must outlive this object.
    explicit LoraSets(const Manifest &manifest) : manifest_(manifest) {}

    // The set, prepared on first use. Throws as prepare_loras does.
    std::shared_ptr<const PreparedLoras> get(const std::vector<ScaledLora> &loras);

    // Drop all sets that have this LoRA. Requests that are running keep theirs.
    void forget(const Lora &lora);

private:
    struct Entry {
        std::shared_ptr<const PreparedLoras> set;
        std::vector<std::weak_ptr<const Lora>> loras;
    };

    std::shared_ptr<const PreparedLoras> find(const LoraKey &key);
    void put(std::shared_ptr<const PreparedLoras> set, const std::vector<ScaledLora> &loras);

    const Manifest &manifest_;
    std::mutex making_;  // one set is prepared at a time, so that threads with the same set do not make it twice
    std::mutex lock_;
    std::list<Entry> entries_;  // most recently used first
};

}  // namespace arcflow
