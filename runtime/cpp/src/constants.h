// Names, defaults and limits that the library shares with the Python runtime; tests/test_cpp_limits.py compares each
// with Python's, so a constant changes in both or in neither.
#pragma once

#include <cstddef>
#include <cstdint>

namespace arcflow {

// Bundles (docs/bundle.md, B1 to B6).
inline constexpr const char *bundle_format = "arcflow-bundle";
inline constexpr int64_t bundle_version = 1;
inline constexpr int64_t lora_bundle_version = 2;      // with LoRA slots (B14)
inline constexpr int64_t formats_bundle_version = 3;   // with other formats than FP8 (B15)
inline constexpr int64_t straight_bundle_version = 4;  // of a straight student (B16)
inline constexpr const char *manifest_name = "manifest.json";
inline constexpr uint64_t max_manifest_bytes = 16 << 20;
inline constexpr uint64_t fast_hash_bytes = 64 << 20;  // larger files are hashed by a full check only
inline constexpr uint64_t max_graph_bytes = 256 << 20;

// Records of what was built from a bundle: engines (E1) and tokenizers (O2).
inline constexpr uint64_t max_record_bytes = 1 << 20;
inline constexpr const char *engines_folder = "engines";
inline constexpr const char *engine_format = "arcflow-engine";
inline constexpr int64_t engine_version = 2;  // version 1, without the keys on memory, is read too
inline constexpr const char *tokenizers_folder = "openvino";
inline constexpr const char *tokenizers_record = "tokenizers.json";
inline constexpr const char *tokenizers_format = "arcflow-openvino";
inline constexpr int64_t tokenizers_version = 1;
inline constexpr uint64_t max_runtime_cache_bytes = 1 << 30;

// LoRA slots (B14) and converted LoRAs (L1).
inline constexpr int64_t rank_multiple = 8;
inline constexpr int64_t max_rank = 1024;
inline constexpr const char *modulation_name = "modulation";  // of the table, beside the parts' names
inline constexpr const char *lora_format = "arcflow-lora";
inline constexpr const char *lora_version = "1";

// Requests.
inline constexpr int64_t default_size_px = 1024;
inline constexpr float default_guidance_scale = 3.5f;
inline constexpr float max_guidance_scale = 65.0f;
inline constexpr int64_t max_inference_steps = 1000;
inline constexpr int64_t far_steps = 2;  // more than this many times the student's own number are warned of
inline constexpr float max_lora_scale = 1000000.0f;

// Straight students (B16).
inline constexpr double max_true_cfg_scale = 65.0;  // the largest default, and the largest of a request
inline constexpr double max_mu = 16.0;              // of a dynamic shift

// Computation.
inline constexpr float timestep_scale = 1000;   // the students' sinusoidal embedding takes sigma times this
inline constexpr size_t cached_prompts = 16;    // whose token ids and embeddings are kept
inline constexpr size_t cached_lora_sets = 16;  // prepared LoRAs that are kept, and their bytes
inline constexpr size_t cached_lora_bytes = 2147483648;
inline constexpr size_t cached_modulations = 16;  // results of the conditioner that are kept, and their bytes
inline constexpr size_t cached_modulation_bytes = 536870912;
inline constexpr size_t changed_tables = 8;     // modulation tables with LoRAs that are kept
inline constexpr size_t shown_characters = 40;  // of a prompt in a warning

}  // namespace arcflow
