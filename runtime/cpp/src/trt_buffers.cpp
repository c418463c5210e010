// Allocates, fills and reads the memory of one plan.
#include "trt_buffers.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace arcflow {
namespace {

void fits(bool ok, const std::string &what) {
    if (!ok) throw Error(ARCFLOW_INTERNAL_ERROR, "denoiser: " + what + " does not fit the job");
}

}  // namespace

Buffers::Buffers(Lane &lane, const Manifest &manifest, const PlanKey &key, int64_t steps_at_once, const DenoiseJob &job)
    : arrays(manifest, key, steps_at_once) {
    const Layout *layouts[] = {&arrays.staged, &arrays.constant, &arrays.working};
    for (size_t i = 0; i < 3; ++i) {
        memory_[i] = lane.allocate(layouts[i]->bytes(), "backbone: inputs and outputs");
        for (const auto &[name, region] : layouts[i]->regions()) places_[name] = {layouts[i], i};
    }
    staging_ = lane.allocate_pinned(arrays.staged.bytes(), "backbone");
    read_ = lane.allocate_pinned(arrays.results.bytes(), "backbone");
    upload(lane, job);
}

cuda::Address Buffers::operator[](const std::string &name) const {
    const auto found = places_.find(name);
    if (found == places_.end()) return 0;
    const auto &[layout, place] = found->second;
    return memory_[place]->address + (*layout)[name].offset;
}

const Layout::Region &Buffers::region(const std::string &name) const { return (*places_.at(name).first)[name]; }

void Buffers::upload(Lane &lane, const DenoiseJob &job) {
    const std::unique_ptr<cuda::Pinned> pinned = lane.allocate_pinned(arrays.constant.bytes(), "backbone");
    put(pinned->data, arrays.constant["image_rotary"], "image_rotary", *job.image_rotary);
    put(pinned->data, arrays.constant["text_rotary"], "text_rotary", *job.text_rotary);
    if (arrays.constant.has("negative_text_rotary")) {
        fits(job.negative.has_value(), "guidance by negative prompts");
        put(pinned->data, arrays.constant["negative_text_rotary"], "negative_text_rotary", *job.negative->text_rotary);
    }
    const Layout::Region &sigmas = arrays.constant["sigmas"];
    fits(job.sigmas.size() * sizeof(double) == sigmas.bytes, "sigmas");
    std::memcpy(pinned->data + sigmas.offset, job.sigmas.data(), sigmas.bytes);
    if (arrays.constant.has("modulations"))
        put(pinned->data, arrays.constant["modulations"], "modulations", *job.table);
    if (arrays.constant.has("timesteps.0")) {
        for (size_t run = 0; run < arrays.starts.size(); ++run) {
            const Layout::Region &region = arrays.constant["timesteps." + std::to_string(run)];
            const auto start = static_cast<size_t>(arrays.starts[run]), count = region.bytes / sizeof(float);
            fits(start + count <= job.timesteps.size(), "timesteps");
            std::memcpy(pinned->data + region.offset, job.timesteps.data() + start, region.bytes);
        }
    }
    try {
        lane.stream().copy(memory_[1]->address, pinned->address(), arrays.constant.bytes());
        lane.stream().wait();
    } catch (...) {
        lane.settle();  // the copy may still run, and reads what is freed now
        throw;
    }
}

void Buffers::stage(const DenoiseJob &job, const Tensor *modulation) {
    const Layout::Region &streams = arrays.staged["streams"];
    fits(static_cast<int64_t>(job.streams.size()) == streams.shape[0], "noise");
    auto *to = reinterpret_cast<int64_t *>(staging_->data + streams.offset);
    for (const NoiseStream &stream : job.streams) {
        *to++ = stream.seed;
        *to++ = stream.first;
    }
    // Embeddings do not change, so the same objects as last time have the same values and are not copied again.
    if (texts_ != job.texts) {
        texts_.clear();  // until all are copied
        put_rows("states", job.texts, &Embeddings::states);
        if (arrays.staged.has("pooled_projections")) put_rows("pooled_projections", job.texts, &Embeddings::pooled);
        texts_ = job.texts;
    }
    if (arrays.staged.has("negative_states")) {
        fits(job.negative.has_value(), "guidance by negative prompts");
        if (negative_texts_ != job.negative->texts) {
            negative_texts_.clear();
            put_rows("negative_states", job.negative->texts, &Embeddings::states);
            negative_texts_ = job.negative->texts;
        }
        Tensor scale(DType::float32, {1});
        *scale.as<float>() = job.negative->scale;
        put(staging_->data, arrays.staged["true_cfg_scale"], "true_cfg_scale", scale);
    }
    if (arrays.staged.has("guidance")) {
        fits(job.guidance.has_value(), "guidance");
        Tensor guidance(DType::float32, arrays.staged["guidance"].shape);
        std::fill_n(guidance.as<float>(), guidance.count(), *job.guidance);
        put(staging_->data, arrays.staged["guidance"], "guidance", guidance);
    }
    if (!arrays.staged.has("modulations")) return;
    const Layout::Region &region = arrays.staged["modulations"];
    Tensor rows = cast(*modulation, arrays.dtypes.at("modulations"));
    if (region.shape[1] != 1 && rows.data.size() * static_cast<size_t>(region.shape[1]) == region.bytes) {
        // The same for all images.
        Tensor all(rows.dtype, region.shape);
        const auto count = static_cast<size_t>(region.shape[0] * region.shape[1]), bytes = region.bytes / count;
        for (size_t i = 0; i < count; ++i)
            std::memcpy(all.data.data() + i * bytes,
                        rows.data.data() + i / static_cast<size_t>(region.shape[1]) * bytes, bytes);
        rows = std::move(all);
    }
    put(staging_->data, region, "modulations", rows);
}

Tensor Buffers::read(const std::string &name, DType dtype) const {
    Tensor tensor(dtype, arrays.results[name].shape);
    std::memcpy(tensor.data.data(), read_->data + arrays.results[name].offset, arrays.results[name].bytes);
    return tensor;
}

// Write a tensor in the region's dtype.
void Buffers::put(std::byte *memory, const Layout::Region &region, const std::string &name, const Tensor &tensor) {
    const DType dtype = arrays.dtypes.at(name);
    if (tensor.dtype != dtype) return put(memory, region, name, cast(tensor, dtype));
    fits(tensor.data.size() == region.bytes, name);
    if (region.bytes) std::memcpy(memory + region.offset, tensor.data.data(), region.bytes);
}

// Write one row for each image: `member` of its text, [1, ...].
void Buffers::put_rows(const std::string &name, const Texts &texts, const Tensor Embeddings::*member) {
    const Layout::Region &region = arrays.staged[name];
    fits(static_cast<int64_t>(texts.size()) == region.shape[0], "the number of texts");
    const size_t bytes = region.bytes / texts.size();
    for (size_t i = 0; i < texts.size(); ++i)
        put(staging_->data, {region.offset + i * bytes, bytes, {}}, name, (*texts[i]).*member);
}

}  // namespace arcflow
