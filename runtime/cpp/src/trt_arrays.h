// The arrays on the device for one plan: manifest and sizes -> layouts. trt_buffers.h allocates them, and trt_memory.h
// adds them up.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "manifest.h"
#include "trt_shapes.h"

namespace arcflow {

// Where the modulation comes from: the conditioner run on the device, the bundle's table, or the host at each call.
enum class Modulation { conditioner, table, given };

// What a plan is made for. A job runs with the plan of exactly its own key.
struct PlanKey {
    DenoiseShape size;
    bool pixels;
    Modulation modulation;
    int64_t lora_rank;                 // of the arena that the engines read their LoRAs from; 0 if they have no slots
    int64_t negative_text_tokens = 0;  // 0 without guidance by negative prompts

    // The sizes of the backbone's run for the negative prompts.
    DenoiseShape negative_size() const;

    bool operator==(const PlanKey &other) const {
        return size == other.size && pixels == other.pixels && modulation == other.modulation &&
               lora_rank == other.lora_rank && negative_text_tokens == other.negative_text_tokens;
    }
};

// Where a plan takes its modulation from. `in_table`: the bundle's table has the number of steps. `kept`: the
// conditioner stays loaded.
Modulation modulation_source(const Manifest &manifest, bool in_table, bool kept);

// The first step of every run of the conditioner, when a run takes `at_once` of the steps. All runs have the same
// length, so that one context serves them all; the last two overlap if the length does not divide the steps.
std::vector<int64_t> conditioner_starts(int64_t steps, int64_t at_once);

// `bytes` rounded up to TensorRT's alignment, so that the next tensor starts aligned.
size_t aligned(size_t bytes);

// Named regions one after another in one allocation. Each has an address of its own, also if it is empty.
class Layout {
public:
    struct Region {
        size_t offset, bytes;
        std::vector<int64_t> shape;
    };

    void add(const std::string &name, size_t bytes, std::vector<int64_t> shape = {});
    bool has(const std::string &name) const { return regions_.count(name) != 0; }
    const Region &operator[](const std::string &name) const { return regions_.at(name); }
    const std::map<std::string, Region> &regions() const { return regions_; }
    size_t bytes() const { return end_; }

private:
    std::map<std::string, Region> regions_;
    size_t end_ = 0;
};

// Three layouts on the device, and one for results:
// - `staged`: inputs of each call, in pinned memory and on the device in the same layout, copied in one piece: noise
//   `streams`, text `states`, the inputs of the modulation, and with guidance `negative_states` and `true_cfg_scale`.
// - constant: filled once: rotary tables, `sigmas`, `timesteps.<run>` or the modulation table.
// - working: on the device only: `latents` float32, which the update changes in place; `input`, the same in the
//   backbone's dtype unless that is float32; the heads; intermediate results.
// - `results`: pinned memory for `latents` and `images`.
struct PlanArrays {
    // `steps_at_once`: timesteps per run of the conditioner, at most S. Throws Error.
    PlanArrays(const Manifest &manifest, const PlanKey &key, int64_t steps_at_once);

    size_t device_bytes() const { return staged.bytes() + constant.bytes() + working.bytes(); }

    Layout staged, constant, working, results;
    std::map<std::string, DType> dtypes;  // sigmas, which are float64, count as int64, which has the same size
    std::vector<int64_t> starts;          // first step of every run of the conditioner

private:
    void add(Layout &layout, const std::string &name, const std::vector<int64_t> &shape, DType dtype);
};

}  // namespace arcflow
