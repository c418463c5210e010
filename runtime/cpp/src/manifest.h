// The content of manifest.json as structs. docs/bundle.md specifies the file; rule numbers such as B1 refer to it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "tensor.h"

namespace arcflow {

enum class Family { flux, qwen_image };

// How a step is computed from the backbone's outputs: a sum of exponentials, or one velocity (B16).
enum class Sampler { momentum, linear };

// A size, or the name of a size that varies between requests.
using Dimension = std::variant<int64_t, std::string>;

struct TensorSpec {
    std::string name;
    DType dtype;
    std::vector<Dimension> shape;
};

struct Quantization {
    std::string format;
    std::vector<std::string> layers;
    std::string policy;
    std::optional<std::string> scales;
    std::map<std::string, std::string> formats;  // of layers whose format is not `format` (B15)

    // True if a layer is in this format.
    bool uses(const std::string &name) const;
    // True if versions 1 and 2 can state it.
    bool plain() const;
};

// A linear with a slot: its sizes, and the dtype of the slot's two inputs.
struct SlotLayer {
    int64_t in_features, out_features;
    DType dtype;
};

// The linears of a part that take a LoRA's factors as inputs (B14), by name. `unread` names linears that the part
// leaves out because nothing reads their output.
struct LoraSlots {
    std::map<std::string, SlotLayer> layers;
    int64_t rank_multiple, max_rank;
    std::vector<std::string> unread;
};

struct Part {
    std::string graph, weights;
    DType precision;
    int64_t parameters;
    std::vector<TensorSpec> inputs, outputs;
    std::optional<Quantization> quantization;
    std::optional<LoraSlots> lora = {};

    // The inputs of the LoRA slots, [in, rank / 8, 8] and [rank / 8, 8, out] for each linear; none without slots.
    std::vector<TensorSpec> slot_inputs() const;
};

// A shift that depends on the number N of image tokens (B16). mu is the line through (base_image_tokens, base_shift)
// and (max_image_tokens, max_shift), also outside of them. The shift is exp(mu) if `exponential`, otherwise mu.
struct DynamicShift {
    bool exponential;
    double base_shift, max_shift;
    int64_t base_image_tokens, max_image_tokens;

    double mu(int64_t image_tokens) const;
};

// The last three are a straight student's only (B16).
struct Schedule {
    double shift, timestep_ratio;
    int64_t num_inference_steps;
    std::optional<DynamicShift> dynamic_shift = {};
    std::optional<double> terminal = {};
    std::optional<std::vector<double>> sigmas = {};
};

struct Latents {
    int64_t channels, patch_size, vae_scale_factor, num_gaussians, logweights_channels;
};

struct Rotary {
    double theta;
    std::vector<int64_t> axes_dims;
};

struct Text {
    int64_t max_sequence_length;
    std::optional<std::string> templ;  // "template"
    int64_t drop_tokens;
    std::optional<int64_t> clip_tokens, clip_pad_token_id, t5_pad_token_id;
};

struct Range {
    int64_t min, max;
};

struct Ranges {
    Range batch, height_px, width_px;
};

struct ModulationTable {
    std::string file;
    std::vector<int64_t> num_inference_steps;
    std::optional<LoraSlots> lora = {};
    std::optional<std::map<std::string, int64_t>> columns = {};  // the first column of each linear's output
};

struct FileEntry {
    uint64_t bytes;
    std::string sha256;
};

struct Manifest {
    int64_t version;
    Family family;
    DType dtype, reference_dtype;
    int64_t opset;
    bool guidance;
    Schedule schedule;
    Latents latents;
    Rotary rotary;
    Text text;
    Ranges ranges;
    std::map<std::string, Part> parts;
    std::optional<ModulationTable> modulation;
    std::map<std::string, std::string> tokenizers;
    std::map<std::string, FileEntry> files;
    bool has_adapter;
    Sampler sampler;
    std::optional<double> true_cfg_scale;  // the default scale of guidance with a negative prompt (B16)

    // The dtype that FLUX's rotary tables are rounded to: a straight student's reference does not round them.
    DType rotary_dtype() const { return sampler == Sampler::linear ? DType::float32 : reference_dtype; }

    // The LoRA slots by part; those of the modulation table are under "modulation". They point into this object.
    std::map<std::string, const LoraSlots *> slots() const;
};

// The names of a slot's two inputs (B14).
std::string lora_a(const std::string &layer);
std::string lora_b(const std::string &layer);

// Parse the text of a manifest and check rules B1 to B5, B7, B16 and the keys of B12, B14 and B15. `where` is the
// file's name for errors. Throws Error.
Manifest parse_manifest(std::string_view text, const std::string &where);

// An opened bundle. `open` has compared the size of every file, and the SHA-256 of files up to 64 MiB or, if `full`, of
// all (B6).
struct Bundle {
    std::filesystem::path root;  // absolute, so that it stays valid if the working directory changes
    Manifest manifest;
    std::string manifest_sha256 = {};  // digest of the file that was read; "" if there was none

    static Bundle open(const std::filesystem::path &root, bool full);

    // Throws Error if another bundle was written in the place of this one, or it was removed.
    void check_unchanged() const;

    // The path of a file. Throws Error if the manifest does not list it.
    std::filesystem::path path(const std::string &name) const;
};

}  // namespace arcflow
