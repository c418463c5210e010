// The fixed memory of one plan: writes a DenoiseJob into it, reads results, and gives device addresses. A captured
// graph has these addresses built in.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "trt_lane.h"
#include "trt_shapes.h"

namespace arcflow {

// Where the modulation comes from: the conditioner run on the device, the bundle's table, or the host at each call.
enum class Modulation { conditioner, table, given };

// What a plan is made for. A job runs with the plan of exactly its own key.
struct PlanKey {
    DenoiseShape size;
    bool pixels;
    Modulation modulation;

    bool operator==(const PlanKey &other) const {
        return size == other.size && pixels == other.pixels && modulation == other.modulation;
    }
};

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

// Four allocations:
// - `staged`: inputs of each call, in pinned memory and on the device in the same layout, copied in one piece: noise
//   `streams`, text `states`, and the inputs of the modulation.
// - constant: filled once: rotary tables, `sigmas`, `timesteps.<run>` or the modulation table.
// - working: on the device only: `latents` float32, which the update changes in place; `input`, the same in the
//   backbone's dtype unless that is float32; the heads; intermediate results.
// - `results`: pinned memory for `latents` and `images`.
// Made, used and freed by a thread that holds the lane.
class Buffers {
public:
    // Allocates everything and uploads the constants, which are equal for all jobs of this key. `steps_at_once`:
    // timesteps per run of the conditioner, at most S. Throws Error.
    Buffers(Lane &lane, const Manifest &manifest, const PlanKey &key, int64_t steps_at_once, const DenoiseJob &job);

    // The device address of a region; 0 if this plan has none of this name.
    cuda::Address operator[](const std::string &name) const;
    const Layout::Region &region(const std::string &name) const;

    // Write a job's inputs into pinned memory. `modulation`: [S, b, M] or [S, 1, M] if the key's modulation is `given`,
    // else null. Throws Error if something does not have this plan's shape.
    void stage(const DenoiseJob &job, const Tensor *modulation);

    cuda::Address staging() const { return staging_->address(); }
    cuda::Address result(const std::string &name) const { return read_->address() + results[name].offset; }

    // A copy of a result.
    Tensor read(const std::string &name, DType dtype) const;

    Layout staged, results;
    // First step of every run of the conditioner. All runs have the same length, so that one context serves them all;
    // the last two overlap if the length does not divide S.
    std::vector<int64_t> starts;

private:
    void lay_out(const Manifest &manifest, const PlanKey &key, int64_t steps_at_once);
    void upload(Lane &lane, const DenoiseJob &job);
    void put(std::byte *memory, const Layout::Region &region, const std::string &name, const Tensor &tensor);
    void put_rows(const std::string &name, const DenoiseJob &job, const Tensor Embeddings::*member);

    std::map<std::string, DType> dtypes_;
    Layout constant_, working_;
    std::map<std::string, std::pair<const Layout *, size_t>> places_;
    std::unique_ptr<cuda::Memory> memory_[3];  // staged, constant, working
    std::unique_ptr<cuda::Pinned> staging_, read_;
    std::vector<std::shared_ptr<const Embeddings>> texts_;  // what `staged` holds
};

}  // namespace arcflow
