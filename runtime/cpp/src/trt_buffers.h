// The fixed memory of one plan: writes a DenoiseJob into it, reads results, and gives device addresses. A captured
// graph has these addresses built in.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "trt_arrays.h"
#include "trt_lane.h"

namespace arcflow {

// Made, used and freed by a thread that holds the lane.
class Buffers {
public:
    // Allocates everything and uploads the constants, which are equal for all jobs of this key. Arguments as for
    // PlanArrays. Throws Error.
    Buffers(Lane &lane, const Manifest &manifest, const PlanKey &key, int64_t steps_at_once, const DenoiseJob &job);

    // The device address of a region; 0 if this plan has none of this name.
    cuda::Address operator[](const std::string &name) const;
    const Layout::Region &region(const std::string &name) const;

    // Write a job's inputs into pinned memory. `modulation`: [S, b, M], [S, 1, M] or [S, M] if the key's modulation is
    // `given`, else null. Throws Error if something does not have this plan's shape.
    void stage(const DenoiseJob &job, const Tensor *modulation);

    cuda::Address staging() const { return staging_->address(); }
    cuda::Address result(const std::string &name) const { return read_->address() + arrays.results[name].offset; }

    // A copy of a result.
    Tensor read(const std::string &name, DType dtype) const;

    const PlanArrays arrays;

private:
    void upload(Lane &lane, const DenoiseJob &job);
    void put(std::byte *memory, const Layout::Region &region, const std::string &name, const Tensor &tensor);
    using Texts = std::vector<std::shared_ptr<const Embeddings>>;
    void put_rows(const std::string &name, const Texts &texts, const Tensor Embeddings::*member);

    std::map<std::string, std::pair<const Layout *, size_t>> places_;
    std::unique_ptr<cuda::Memory> memory_[3];  // staged, constant, working
    std::unique_ptr<cuda::Pinned> staging_, read_;
    Texts texts_, negative_texts_;  // what `staged` holds
};

}  // namespace arcflow
