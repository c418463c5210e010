// Lays out, fills and reads the memory of one plan.
#include "trt_buffers.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace arcflow {
namespace {

constexpr DType as_float64 = DType::int64;  // sigmas are float64, which has the size of int64

void fits(bool ok, const std::string &what) {
    if (!ok) throw Error(ARCFLOW_INTERNAL_ERROR, "denoiser: " + what + " does not fit the job");
}

}  // namespace

size_t aligned(size_t bytes) {
    constexpr size_t alignment = 256;
    return (bytes + alignment - 1) / alignment * alignment;
}

void Layout::add(const std::string &name, size_t bytes, std::vector<int64_t> shape) {
    regions_[name] = {end_, bytes, std::move(shape)};
    end_ += aligned(std::max<size_t>(bytes, 1));
}

Buffers::Buffers(Lane &lane, const Manifest &manifest, const PlanKey &key, int64_t steps_at_once,
                 const DenoiseJob &job) {
    for (int64_t start = 0; start < key.size.steps - steps_at_once; start += steps_at_once) starts.push_back(start);
    starts.push_back(key.size.steps - steps_at_once);
    lay_out(manifest, key, steps_at_once);
    const Layout *layouts[] = {&staged, &constant_, &working_};
    for (size_t i = 0; i < 3; ++i) {
        memory_[i] = lane.allocate(layouts[i]->bytes(), "backbone: inputs and outputs");
        for (const auto &[name, region] : layouts[i]->regions()) places_[name] = {layouts[i], i};
    }
    staging_ = lane.allocate_pinned(staged.bytes(), "backbone");
    read_ = lane.allocate_pinned(results.bytes(), "backbone");
    upload(lane, job);
}

void Buffers::lay_out(const Manifest &manifest, const PlanKey &key, int64_t steps_at_once) {
    const Part &backbone = manifest.parts.at("backbone");
    const Shapes inputs = backbone_inputs(manifest, key.size), heads = backbone_outputs(manifest, key.size);
    const auto add = [&](Layout &layout, const std::string &name, const std::vector<int64_t> &shape, DType dtype) {
        layout.add(name, bytes_of(shape, dtype, "backbone: " + name), shape);
        dtypes_[name] = dtype;
    };
    const auto input = [&](const char *name) { return spec_of(backbone.inputs, name, "backbone").dtype; };
    const int64_t batch = key.size.batch, steps = key.size.steps, width = inputs.at("modulation")[1];
    add(staged, "streams", {batch, 2}, DType::int64);
    add(staged, "states", inputs.at("encoder_hidden_states"), input("encoder_hidden_states"));
    for (const char *name : {"image_rotary", "text_rotary"}) add(constant_, name, inputs.at(name), input(name));
    add(constant_, "sigmas", {steps + 1}, as_float64);
    add(working_, "latents", inputs.at("latents"), DType::float32);
    if (input("latents") != DType::float32) add(working_, "input", inputs.at("latents"), input("latents"));
    for (const auto &[name, shape] : heads)
        add(working_, name, shape, spec_of(backbone.outputs, name, "backbone").dtype);
    add(working_, "modulation", inputs.at("modulation"), input("modulation"));
    switch (key.modulation) {
        case Modulation::table:
            add(constant_, "modulations", {steps, 1, width}, input("modulation"));
            break;
        case Modulation::given:
            add(staged, "modulations", {steps, batch, width}, input("modulation"));
            break;
        case Modulation::conditioner: {
            const Part &part = manifest.parts.at("conditioner");
            for (const auto &[name, shape] : conditioner_inputs(manifest, batch, steps_at_once)) {
                if (name != "timesteps") add(staged, name, shape, spec_of(part.inputs, name, "conditioner").dtype);
                else
                    for (size_t run = 0; run < starts.size(); ++run)
                        add(constant_, name + "." + std::to_string(run), shape, DType::float32);
            }
            const std::vector<int64_t> made = conditioner_outputs(manifest, batch, steps_at_once).at("modulation");
            add(working_, "conditioned", made, spec_of(part.outputs, "modulation", "conditioner").dtype);
            add(working_, "modulations", {steps, made[1], width}, input("modulation"));
        }
    }
    if (key.pixels) add(working_, "images", decoder_outputs(manifest, key.size).at("images"), DType::uint8);
    for (const char *name : {"latents", "images"})
        if (working_.has(name)) results.add(name, working_[name].bytes, working_[name].shape);
}

cuda::Address Buffers::operator[](const std::string &name) const {
    const auto found = places_.find(name);
    if (found == places_.end()) return 0;
    const auto &[layout, place] = found->second;
    return memory_[place]->address + (*layout)[name].offset;
}

const Layout::Region &Buffers::region(const std::string &name) const { return (*places_.at(name).first)[name]; }

void Buffers::upload(Lane &lane, const DenoiseJob &job) {
    const std::unique_ptr<cuda::Pinned> pinned = lane.allocate_pinned(constant_.bytes(), "backbone");
    put(pinned->data, constant_["image_rotary"], "image_rotary", *job.image_rotary);
    put(pinned->data, constant_["text_rotary"], "text_rotary", *job.text_rotary);
    const Layout::Region &sigmas = constant_["sigmas"];
    fits(job.sigmas.size() * sizeof(double) == sigmas.bytes, "sigmas");
    std::memcpy(pinned->data + sigmas.offset, job.sigmas.data(), sigmas.bytes);
    if (constant_.has("modulations")) put(pinned->data, constant_["modulations"], "modulations", *job.table);
    if (constant_.has("timesteps.0")) {
        for (size_t run = 0; run < starts.size(); ++run) {
            const Layout::Region &region = constant_["timesteps." + std::to_string(run)];
            const auto start = static_cast<size_t>(starts[run]), count = region.bytes / sizeof(float);
            fits(start + count <= job.timesteps.size(), "timesteps");
            std::memcpy(pinned->data + region.offset, job.timesteps.data() + start, region.bytes);
        }
    }
    try {
        lane.stream().copy(memory_[1]->address, pinned->address(), constant_.bytes());
        lane.stream().wait();
    } catch (...) {
        lane.settle();  // the copy may still run, and reads what is freed now
        throw;
    }
}

void Buffers::stage(const DenoiseJob &job, const Tensor *modulation) {
    const Layout::Region &streams = staged["streams"];
    fits(static_cast<int64_t>(job.streams.size()) == streams.shape[0], "noise");
    auto *to = reinterpret_cast<int64_t *>(staging_->data + streams.offset);
    for (const NoiseStream &stream : job.streams) {
        *to++ = stream.seed;
        *to++ = stream.first;
    }
    // Embeddings do not change, so the same objects as last time have the same values and are not copied again.
    if (texts_ != job.texts) {
        texts_.clear();  // until all are copied
        put_rows("states", job, &Embeddings::states);
        if (staged.has("pooled_projections")) put_rows("pooled_projections", job, &Embeddings::pooled);
        texts_ = job.texts;
    }
    if (staged.has("guidance")) {
        fits(job.guidance.has_value(), "guidance");
        Tensor guidance(DType::float32, staged["guidance"].shape);
        std::fill_n(guidance.as<float>(), guidance.count(), *job.guidance);
        put(staging_->data, staged["guidance"], "guidance", guidance);
    }
    if (!staged.has("modulations")) return;
    const Layout::Region &region = staged["modulations"];
    Tensor rows = cast(*modulation, dtypes_.at("modulations"));
    if (rows.shape.size() == 3 && rows.shape[1] == 1 && region.shape[1] != 1) {  // the same for all images
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
    Tensor tensor(dtype, results[name].shape);
    std::memcpy(tensor.data.data(), read_->data + results[name].offset, results[name].bytes);
    return tensor;
}

// Write a tensor in the region's dtype.
void Buffers::put(std::byte *memory, const Layout::Region &region, const std::string &name, const Tensor &tensor) {
    const DType dtype = dtypes_.at(name);
    if (tensor.dtype != dtype) return put(memory, region, name, cast(tensor, dtype));
    fits(tensor.data.size() == region.bytes, name);
    if (region.bytes) std::memcpy(memory + region.offset, tensor.data.data(), region.bytes);
}

// Write one row for each image: `member` of its text, [1, ...].
void Buffers::put_rows(const std::string &name, const DenoiseJob &job, const Tensor Embeddings::*member) {
    const Layout::Region &region = staged[name];
    fits(static_cast<int64_t>(job.texts.size()) == region.shape[0], "the number of texts");
    const size_t bytes = region.bytes / job.texts.size();
    for (size_t i = 0; i < job.texts.size(); ++i)
        put(staging_->data, {region.offset + i * bytes, bytes, {}}, name, (*job.texts[i]).*member);
}

}  // namespace arcflow
