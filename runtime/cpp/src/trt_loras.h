// LoRAs on a GPU: prepared LoRAs -> inputs of the slots at fixed device addresses, so that captured graphs stay valid.
//
// Ranks are padded with zeros to one of a few ranks. Each has an arena, whose addresses the graphs have built in. Other
// LoRAs of the same rank take one copy on the device, from memory where the sets of recent requests are kept.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "constants.h"
#include "lora.h"
#include "trt_arrays.h"
#include "trt_lane.h"

namespace arcflow {

// The inputs of a part's slots, of one rank.
Shapes slot_shapes(const LoraSlots &slots, int64_t rank);

// The inputs of every slot of a part, with zeros for linears and ranks that `inputs` does not have.
Tensors pad_inputs(const LoraSlots &slots, const Tensors &inputs);

// Used by one thread at a time; members that change something are for a thread that holds the lane.
class LoraArenas {
public:
    // For those of `parts` that have slots. At most `sets` sets and `bytes` bytes of them are kept. `manifest` must
    // outlive this object.
    LoraArenas(Lane &lane, const Manifest &manifest, const std::vector<std::string> &parts,
               size_t sets = cached_lora_sets, size_t bytes = cached_lora_bytes);

    // The rank of the arena for these LoRAs; 0 if the parts have no slots.
    int64_t rank(const PreparedLoras &loras) const;

    // Shapes of the slots' inputs of one part; empty if it has no slots.
    Shapes shapes(const std::string &part, int64_t rank) const;

    // Device addresses of the slots' inputs of one part. They stay the same until `release`. Throws
    // Error(ARCFLOW_OUT_OF_MEMORY) if there is not enough memory for the arena.
    std::map<std::string, cuda::Address> addresses(const std::string &part, int64_t rank);

    // Enqueue the copy of a set into the arena of `rank`, unless it is there already. Throws
    // Error(ARCFLOW_OUT_OF_MEMORY) if there is not enough memory for the arena or the set.
    void put(const PreparedLoras &loras, int64_t rank);

    // Copy every set again at its next use: after a failure it is unknown what the arenas hold.
    void forget();

    // Free the kept sets that have this LoRA.
    void drop(uint64_t number);

    // Free everything, after the stream is idle. No plan may use an arena's addresses afterwards. False if there was
    // nothing to free.
    bool release();

private:
    // The inputs of all slots for one rank; `holds` is the set that was copied there last.
    struct Arena {
        std::unique_ptr<cuda::Memory> memory;
        std::optional<LoraKey> holds;
    };
    struct Set {
        int64_t rank;
        LoraKey key;
        std::unique_ptr<cuda::Memory> memory;
    };

    const Layout &layout(int64_t rank);
    Arena &arena(int64_t rank);
    const cuda::Memory &set(const PreparedLoras &loras, int64_t rank);
    void make_room(size_t bytes);
    std::unique_ptr<cuda::Memory> upload(const PreparedLoras &loras, int64_t rank);

    Lane &lane_;
    std::map<std::string, const LoraSlots *> slots_;  // by part
    const size_t most_sets_, most_bytes_;
    std::map<int64_t, Layout> layouts_;
    std::map<int64_t, Arena> arenas_;
    std::list<Set> sets_;  // most recently used first
};

}  // namespace arcflow
