// Implements core_test.h.
#include "core_test.h"

#include <fstream>
#include <random>

#include "sha256.h"

namespace fs = std::filesystem;
using arcflow::Json;

void fails(const std::function<void()> &work, const std::string &part) {
    const std::string text = thrown<arcflow::Error>(work);
    if (text.find(part) == text.npos) std::fprintf(stderr, "expected: %s\ngot: %s\n", part.c_str(), text.c_str());
    CHECK(text.find(part) != text.npos);
}

void write(const fs::path &path, const std::string &bytes) {
    std::ofstream file(path, std::ios::binary);
    file << bytes;
}

Folder::Folder() : path_(fs::temp_directory_path() / ("arcflow_core_test_" + std::to_string(std::random_device{}()))) {
    fs::create_directory(path_);
}

Folder::~Folder() { fs::remove_all(path_); }

namespace {

const std::string digits = std::string(64, '0');

Json tensors(const std::string &name) {
    return Json::array({{{"name", name}, {"dtype", "float32"}, {"shape", {"batch", 4}}}});
}

Json part(const std::string &name) {
    return {{"graph", name + ".onnx"}, {"weights", name + ".safetensors"}, {"precision", "float32"},
            {"parameters", 7},         {"inputs", tensors("latents")},     {"outputs", tensors("means")},
            {"quantization", nullptr}};
}

}  // namespace

arcflow::Json file_entry() { return {{"bytes", 5}, {"sha256", arcflow::sha256("bytes")}}; }

Json flux_manifest() {
    const Json source = {{"name", "base"}, {"revision", nullptr}, {"sha256", digits}, {"scale", nullptr}};
    Json m = {{"format", "arcflow-bundle"},
              {"version", 1},
              {"family", "flux"},
              {"dtype", "float32"},
              {"reference_dtype", "bfloat16"},
              {"opset", 23},
              {"guidance", true},
              {"schedule", {{"shift", 3.2}, {"timestep_ratio", 1.0}, {"num_inference_steps", 2}}},
              {"latents",
               {{"channels", 16},
                {"patch_size", 2},
                {"vae_scale_factor", 8},
                {"num_gaussians", 16},
                {"logweights_channels", 4}}},
              {"rotary", {{"theta", 10000.0}, {"axes_dims", {8, 12, 12}}}},
              {"text",
               {{"max_sequence_length", 64},
                {"template", nullptr},
                {"drop_tokens", 0},
                {"clip_tokens", 77},
                {"clip_pad_token_id", 530},
                {"t5_pad_token_id", 0}}},
              {"ranges",
               {{"batch", {{"min", 1}, {"max", 4}}},
                {"height_px", {{"min", 16}, {"max", 256}}},
                {"width_px", {{"min", 32}, {"max", 2048}}}}},
              {"parts", Json::object()},
              {"modulation", nullptr},
              {"tokenizers", {{"tokenizer", "tokenizer.json"}, {"tokenizer_2", "tokenizer_2.json"}}},
              {"files", {{"tokenizer.json", file_entry()}, {"tokenizer_2.json", file_entry()}}},
              {"provenance",
               {{"command", "test"},
                {"created", "2026"},
                {"tools", {{"arcflow", "0.1.0"}}},
                {"base", source},
                {"adapter", source},
                {"loras", Json::array({source})}}}};
    for (const char *name : {"text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder"}) {
        m["parts"][name] = part(name);
        m["files"][std::string(name) + ".onnx"] = m["files"][std::string(name) + ".safetensors"] = file_entry();
    }
    return m;
}

Json qwen_manifest() {
    Json m = flux_manifest();
    m["family"] = "qwen-image";
    m["guidance"] = false;
    m["text"] = {{"max_sequence_length", 64}, {"template", "user: {}"}, {"drop_tokens", 3}};
    m["tokenizers"].erase("tokenizer_2");
    m["parts"].erase("conditioner");
    m["parts"].erase("text_encoder_2");
    m["modulation"] = {{"file", "modulation.safetensors"}, {"num_inference_steps", {2, 4}}};
    m["files"]["modulation.safetensors"] = file_entry();
    return m;
}

Json straight_manifest() {
    Json m = qwen_manifest();
    m["version"] = 4;
    m["sampler"] = "linear";
    m["true_cfg_scale"] = 4;
    m["latents"]["num_gaussians"] = 1;
    m["parts"]["backbone"]["outputs"] = tensors("velocity");
    m["provenance"]["adapter"] = nullptr;
    return m;
}

std::string sealed(Json m) {
    m["digest"] = arcflow::sha256(arcflow::canonical(m));
    return m.dump(2);
}

arcflow::Manifest parsed(const Json &m) { return arcflow::parse_manifest(sealed(m), where); }
