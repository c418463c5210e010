// Tests of manifests, bundles on disk and safetensors files: valid ones are read, and each kind of damage is refused
// with a message that names it.
#include "constants.h"
#include "core_test.h"
#include "json_text.h"
#include "safetensors.h"
#include "sha256.h"

namespace {

namespace fs = std::filesystem;
using arcflow::DType;
using arcflow::Json;

const std::string digits = std::string(64, '0');

// Check that `m`, with the value at a JSON pointer replaced, is refused with "manifest.json" and this text.
void refused(Json m, const char *pointer, const Json &value, const std::string &text) {
    m[Json::json_pointer(pointer)] = value;
    fails([&] { parsed(m); }, where + text);
}

void test_manifests() {
    const arcflow::Manifest m = parsed(flux_manifest());
    CHECK(m.family == arcflow::Family::flux && m.dtype == DType::float32 && m.reference_dtype == DType::bfloat16);
    CHECK(m.guidance && m.opset == 23 && m.schedule.shift == 3.2 && m.rotary.axes_dims[2] == 12);
    CHECK(m.text.max_sequence_length == 64 && m.text.clip_tokens == 77 && m.text.t5_pad_token_id == 0 && !m.text.templ);
    CHECK(m.ranges.width_px.min == 32 && m.ranges.width_px.max == 2048 && m.parts.size() == 5);
    const arcflow::Part &backbone = m.parts.at("backbone");
    CHECK(backbone.weights == "backbone.safetensors" && backbone.parameters == 7 && !backbone.quantization);
    CHECK(backbone.inputs[0].name == "latents" && std::get<std::string>(backbone.inputs[0].shape[0]) == "batch");
    CHECK(std::get<int64_t>(backbone.outputs[0].shape[1]) == 4);
    CHECK(m.files.at("backbone.onnx").bytes == 5 && m.files.at("backbone.onnx").sha256 == arcflow::sha256("bytes"));
    const arcflow::Manifest q = parsed(qwen_manifest());
    CHECK(q.text.templ == "user: {}" && q.text.drop_tokens == 3 && !q.text.clip_tokens);
    CHECK(q.modulation->num_inference_steps == (std::vector<int64_t>{2, 4}));
    Json whole = flux_manifest();  // whole numbers for floats, and absent optional keys
    whole["schedule"]["shift"] = 3;
    whole.erase("modulation");
    whole["provenance"].erase("loras");
    whole["parts"]["backbone"].erase("quantization");
    CHECK(parsed(whole).schedule.shift == 3.0);
}

// A valid manifest of version 2, whose backbone and table have a slot each.
Json slotted_manifest() {
    Json m = qwen_manifest();
    const auto slots = [](const char *layer, int out) {
        return Json{{"layers", {{layer, {{"in_features", 3}, {"out_features", out}, {"dtype", "float32"}}}}},
                    {"rank_multiple", 8},
                    {"max_rank", 16},
                    {"unread", {"proj_out"}}};
    };
    m["version"] = 2;
    m["parts"]["backbone"]["lora"] = slots("blocks.0.to_q", 2);
    m["parts"]["backbone"]["inputs"].push_back({{"name", "modulation"}, {"dtype", "float32"}, {"shape", {"batch", 4}}});
    m["modulation"]["lora"] = slots("blocks.0.mod", 3);
    m["modulation"]["columns"] = {{"blocks.0.mod", 1}};
    return m;
}

// B14.
void test_slots() {
    const Json m = slotted_manifest();
    const arcflow::Manifest parsed_m = parsed(m);
    CHECK(parsed_m.slots().size() == 2 && parsed_m.slots().at("backbone")->max_rank == 16);
    CHECK(parsed_m.modulation->columns->at("blocks.0.mod") == 1);
    const std::vector<arcflow::TensorSpec> inputs = parsed_m.parts.at("backbone").slot_inputs();
    CHECK(inputs.size() == 2 && inputs[0].name == "blocks.0.to_q.lora_a" && inputs[1].name == "blocks.0.to_q.lora_b");
    CHECK(std::get<int64_t>(inputs[0].shape[0]) == 3 && std::get<int64_t>(inputs[1].shape[2]) == 2);

    refused(m, "/version", 1, ": parts.backbone: unknown keys [\"lora\"]; the known keys are [\"graph\",");
    Json plain = qwen_manifest();
    plain["version"] = 2;
    fails([&] { parsed(plain); }, "version must be 1 for these slots and formats (B14, B15), got 2");
    const std::string part = "/parts/backbone/lora", key = ": parts.backbone: lora: ";
    refused(m, (part + "/surprise").c_str(), 1, key.substr(0, key.size() - 2) + ": unknown keys [\"surprise\"]");
    refused(m, (part + "/layers").c_str(), Json::object(), ": parts.backbone: lora: layers must be at least one");
    refused(m, (part + "/rank_multiple").c_str(), 4, ": parts.backbone: lora: rank_multiple must be 8, got 4");
    for (const int rank : {0, 12, 1032})
        refused(m, (part + "/max_rank").c_str(), rank, key + "max_rank must be a multiple of 8 up to 1024, got ");
    refused(m, (part + "/max_rank").c_str(), 8, ": lora: max_rank must be the same in every part, got [8, 16]");
    const std::string layer = part + "/layers/blocks.0.to_q";
    refused(m, (layer + "/dtype").c_str(), "int64", key + "blocks.0.to_q: dtype must be one of");
    refused(m, (layer + "/in_features").c_str(), 0, key + "blocks.0.to_q: in_features must be at least 1, got 0");
    refused(m, (layer + "/out_features").c_str(), int64_t{1} << 40,
            key + "blocks.0.to_q: out_features must be at most");
    const Json table = m["modulation"]["lora"]["layers"]["blocks.0.mod"];
    refused(m, (part + "/layers/blocks.0.mod").c_str(), table,
            ": lora: layers must be in one part each, got [\"blocks");
    refused(m, "/modulation/columns", nullptr, ": modulation: columns must be given for [\"blocks.0.mod\"], got []");
    refused(m, "/modulation/columns/blocks.0.mod", 2, ": modulation: columns: blocks.0.mod must be at most 4 with its");
    refused(m, "/modulation/lora", nullptr, ": modulation: columns must be given with lora only");
    refused(m, "/modulation/lora/layers/blocks.0.mod/dtype", "float16", ": modulation: lora: blocks.0.mod: dtype must");
}

// B1 and B3. Format and version are checked before any other key; the digest covers all keys.
void test_seal() {
    const auto parse = [](const std::string &text) { return [text] { arcflow::parse_manifest(text, where); }; };
    for (const char *text : {"[]", "{}", "{\"format\": \"other\"}", "{\"format\": 1, \"version\": 2}"})
        fails(parse(text), "manifest.json: format must be \"arcflow-bundle\"; this is not an ArcFlow bundle");
    const std::string format = "{\"format\": \"arcflow-bundle\", \"unknown\": 1";
    const std::string must = "version must be 1, 2, 3 or 4, got ";
    fails(parse(format + "}"), must + "null; export the bundle again");
    fails(parse(format + ", \"version\": 5}"), must + "5; update arcflow");
    fails(parse(format + ", \"version\": true}"), must + "true; export the bundle again");
    fails(parse(format + ", \"version\": \"1\"}"), must + "\"1\"; export the bundle again");
    fails(parse(format + ", \"version\": 1}"),
          "manifest.json: unknown keys [\"unknown\"]; the known keys are [\"dtype\", \"family\",");
    Json m = flux_manifest();
    fails(parse(m.dump()), "manifest.json does not match its own digest; it was edited, export the bundle again");
    m["digest"] = arcflow::sha256(arcflow::canonical(flux_manifest()));
    parsed(flux_manifest());
    m["provenance"]["created"] = "2027";
    fails(parse(m.dump()), "manifest.json does not match its own digest");
    m["digest"] = 1;
    fails(parse(m.dump()), "manifest.json does not match its own digest");
    fails(parse(std::string(arcflow::max_manifest_bytes + 1, ' ')),
          "is larger than 16777216 bytes; it is not a manifest");
}

// B2: unknown keys, missing keys and wrong types; the message names the place.
void test_types() {
    const Json m = flux_manifest();
    refused(m, "/surprise", 1,
            ": unknown keys [\"surprise\"]; the known keys are [\"dtype\", \"family\", \"files\", \"format\", "
            "\"guidance\",");
    refused(m, "/family", "sd", ": family must be one of [\"flux\", \"qwen-image\"], got \"sd\"");
    refused(m, "/dtype", nullptr,
            ": dtype must be one of [\"float32\", \"float16\", \"bfloat16\", \"int64\", \"uint8\"], got null");
    refused(m, "/opset", "23", ": opset must be an integer of at least 0, got \"23\"");
    refused(m, "/opset", 23.0, ": opset must be an integer of at least 0, got 23.0");
    refused(m, "/opset", true, ": opset must be an integer of at least 0, got true");
    refused(m, "/opset", -1, ": opset must be an integer of at least 0, got -1");
    refused(m, "/opset", uint64_t{1} << 63, ": opset must be below 2^63, got 9223372036854775808");
    refused(m, "/guidance", 1, ": guidance must be true or false, got 1");
    refused(m, "/schedule", Json::array(), ": schedule must be an object, got []");
    refused(m, "/schedule/shift", "3.2", ": schedule: shift must be a number, got \"3.2\"");
    refused(m, "/schedule/shift", true, ": schedule: shift must be a number, got true");
    refused(m, "/rotary/axes_dims/1", 1.5, ": rotary: axes_dims[1] must be an integer of at least 0, got 1.5");
    refused(m, "/text/template", 1, ": text: template must be a string or null, got 1");
    refused(m, "/text/drop_tokens", nullptr, ": text: drop_tokens must be an integer of at least 0, got null");
    refused(m, "/text/clip_tokens", "a", ": text: clip_tokens must be an integer of at least 0, or null, got \"a\"");
    refused(m, "/ranges/batch/step", 1,
            ": ranges: batch: unknown keys [\"step\"]; the known keys are [\"max\", \"min\"]");
    refused(m, "/parts", nullptr, ": parts must be an object, got null");
    refused(m, "/parts/backbone/inputs", {{"a", 1}}, ": parts.backbone: inputs must be a list, got {\"a\": 1}");
    refused(m, "/parts/backbone/inputs/0/dtype", "int8",
            ": parts.backbone: inputs[0]: dtype must be one of [\"float32\",");
    refused(m, "/parts/backbone/inputs/0/shape/1", nullptr,
            ": parts.backbone: inputs[0]: shape[1] must be an integer of at least 0, or a string, got null");
    refused(m, "/parts/backbone/quantization", 1, ": parts.backbone: quantization must be an object, got 1");
    refused(m, "/parts/backbone/quantization", {{"format", "int4"}},
            ": parts.backbone: quantization: missing keys [\"layers\", \"policy\", \"scales\"]");
    refused(m, "/modulation", "x", ": modulation must be an object, got \"x\"");
    refused(m, "/tokenizers/tokenizer", 1, ": tokenizers.tokenizer must be a string, got 1");
    refused(m, "/files/backbone.onnx/bytes", 5.5,
            ": files.backbone.onnx: bytes must be an integer of at least 0, got 5.5");
    refused(m, "/provenance/tools/x", 1, ": provenance: tools.x must be a string, got 1");
    refused(m, "/provenance/base/scale", "1", ": provenance: base: scale must be a number or null, got \"1\"");
    refused(m, "/provenance/base/revision", 1, ": provenance: base: revision must be a string or null, got 1");
    refused(m, "/provenance/loras", nullptr, ": provenance: loras must be a list, got null");
    refused(m, "/provenance/loras/0/x", 1, ": provenance: loras[0]: unknown keys [\"x\"]");
    for (const auto &[key, value] : m.items()) {
        Json less = m;
        less.erase(key);
        if (key == "modulation") continue;
        const bool first = key == "format" || key == "version";
        fails([&] { parsed(less); }, first ? key : "manifest.json: missing keys [\"" + key + "\"]");
    }
}

// Values, and rules B4, B5 and B7.
void test_rules() {
    const Json m = flux_manifest();
    const std::string again = "; export the bundle again";
    refused(m, "/dtype", "int64",
            ": dtype must be one of [\"float32\", \"float16\", \"bfloat16\"], got \"int64\"" + again);
    refused(m, "/schedule/shift", 0, ": schedule: shift must be positive, got 0.0" + again);
    refused(m, "/schedule/timestep_ratio", 1.5,
            ": schedule: timestep_ratio must be above 0 and at most 1, got 1.5" + again);
    refused(m, "/schedule/num_inference_steps", 0, ": schedule: num_inference_steps must be at least 1, got 0" + again);
    refused(m, "/latents/channels", 0, ": latents: channels must be at least 1, got 0" + again);
    refused(m, "/latents/patch_size", int64_t{1} << 40,
            ": latents: patch_size must be at most 65536, got 1099511627776");
    refused(m, "/latents/logweights_channels", 3,
            ": latents: logweights_channels must be patch_size squared, 4, got 3");
    refused(m, "/rotary/theta", -1.0, ": rotary: theta must be positive, got -1.0" + again);
    refused(m, "/rotary/axes_dims", {8, 12}, ": rotary: axes_dims must be three even sizes, got [8, 12]" + again);
    refused(m, "/rotary/axes_dims", {8, 12, 13}, ": rotary: axes_dims must be three even sizes, got [8, 12, 13]");
    refused(m, "/text/max_sequence_length", 0, ": text: max_sequence_length must be at least 1, got 0");
    refused(m, "/text/max_sequence_length", INT64_MAX, ": text: max_sequence_length must be at most 1048576, got");
    refused(m, "/text/clip_tokens", nullptr, ": text: clip_tokens must be given for a flux bundle, got null" + again);
    refused(m, "/ranges/batch/max", 0,
            ": ranges: batch must be min and max with 1 <= min <= max, got {\"min\": 1, \"max\": 0}" + again);
    refused(m, "/ranges/width_px/max", 2047,
            ": ranges: width_px must be multiples of 16, got {\"min\": 32, \"max\": 2047}" + again);
    refused(m, "/ranges/width_px/max", int64_t{1} << 40, ": ranges: width_px must be at most 2147483647, got");
    refused(m, "/tokenizers", {{"tokenizer", "tokenizer.json"}},
            ": tokenizers must be given for [\"tokenizer\", \"tokenizer_2\"], got [\"tokenizer\"]" + again);
    refused(qwen_manifest(), "/text/template", "{} {}",
            ": text: template must be a text with one {} for the prompt, got \"{} {}\"");
    refused(qwen_manifest(), "/text/template", nullptr,
            ": text: template must be a text with one {} for the prompt, got null");
    refused(qwen_manifest(), "/schedule/num_inference_steps", 3,
            ": schedule: num_inference_steps must be one of [2, 4], got 3");
    const Json quantization = {{"format", "fp8_e4m3"}, {"layers", {"a", "b"}}, {"policy", digits}, {"scales", digits}};
    const std::string place = "/parts/backbone/quantization", name = ": parts.backbone: quantization: ";
    Json quantized = m;
    quantized[Json::json_pointer(place)] = quantization;
    CHECK(parsed(quantized).parts.at("backbone").quantization->layers[1] == "b");
    refused(quantized, (place + "/layers").c_str(), Json::array(),
            name + "layers must be at least one, or no quantization, got []");
    refused(quantized, (place + "/layers/1").c_str(), "a", name + "layers must be named once each, got [\"a\"]");
    refused(quantized, (place + "/policy").c_str(), digits + "0", name + "policy must be a SHA-256, got \"000");
    refused(quantized, (place + "/scales").c_str(), "A" + digits.substr(1),
            name + "scales must be a SHA-256, got \"A0");

    Json int8 = quantized;
    int8["version"] = 3;
    int8[Json::json_pointer(place + "/format")] = "int8";
    int8[Json::json_pointer(place + "/scales")] = nullptr;
    const auto read = *parsed(int8).parts.at("backbone").quantization;
    CHECK(!read.scales && read.uses("int8") && !read.uses("fp8_e4m3"));
    refused(int8, "/version", 2, ": version must be 3 for these slots and formats (B14, B15), got 2");
    refused(int8, (place + "/formats").c_str(), {{"c", "int8"}},
            name + "formats must be given for names of layers only, got [\"c\"]");
    refused(int8, (place + "/formats").c_str(), {{"b", "fp8_e4m3"}}, name + "scales must be a SHA-256, got null");

    Json less = m;
    less["parts"].erase("conditioner");
    fails([&] { parsed(less); },
          "a flux bundle must have parts [\"backbone\", \"conditioner\", \"text_encoder\", \"text_encoder_2\", "
          "\"vae_decoder\"], missing [\"conditioner\"]");
    refused(m, "/parts/backbone/graph", "b.onnx", ": \"b.onnx\" is used but not listed under \"files\"");
    refused(qwen_manifest(), "/modulation/file", "m", ": \"m\" is used but not listed under \"files\"");
    for (const char *bad : {"../a", "/a", "a//b", "a/", "./a", "a/..", "a b", "a\\b", "", "\xc3\xa9", "a\x01"}) {
        Json named = m;
        named["files"][bad] = file_entry();
        fails([&] { parsed(named); }, " leaves the bundle or has characters it may not have");
    }
    for (const char *bad : {"engines/a", "engines"}) {
        Json named = m;
        named["files"][bad] = file_entry();
        fails([&] { parsed(named); }, " must not be in engines/, which is for built engines");
    }
}

// Rules B4 and B6, on files.
void test_bundles() {
    const Folder folder;
    const fs::path root = folder.path() / "bundle", file = root / "backbone.onnx";
    const auto open = [&] { arcflow::Bundle::open(root, false); };
    fails(open, "bundle is not a directory; give the directory that `arcflow export --out` wrote");
    fs::create_directory(root);
    fails(open, "bundle has no manifest.json, so it is not a bundle; make one with `arcflow export`");
    const Json m = flux_manifest();
    write(root / "manifest.json", sealed(m));
    fails(open, " is missing; was the bundle moved in part? Copy the whole directory again");
    for (const auto &[name, entry] : m["files"].items()) write(root / name, "bytes");
    const arcflow::Bundle bundle = arcflow::Bundle::open(root, true);
    CHECK(bundle.path("backbone.onnx") == file);
    fails([&] { bundle.path("../x"); }, "\"../x\" is used but not listed under \"files\"");
    write(file, "longer");
    fails(open, "backbone.onnx must have 5 bytes, got 6; it was cut or edited, export or copy it again");
    write(file, "Bytes");
    fails(open, "backbone.onnx does not match its SHA-256 in manifest.json; it was edited or damaged");
    fs::remove(file);
    fs::create_directory(file);
    fails(open, "backbone.onnx is missing");
    fs::remove(file);
    write(folder.path() / "outside", "bytes");
    fs::create_symlink("../outside", file);
    fails(open, "backbone.onnx is a link that leaves the bundle; copy the file into it");
    fs::remove(file);
    fs::create_symlink(file, file);
    fails(open, "backbone.onnx is missing");
    fs::remove(file);
    fs::create_symlink("conditioner.onnx", file);
    open();
    // The bundle's own directory may be a link.
    fs::create_directory_symlink(root, folder.path() / "link");
    arcflow::Bundle::open(folder.path() / "link", false);
    write(root / "manifest.json", std::string(arcflow::max_manifest_bytes + 1, ' '));
    fails(open, "is larger than 16777216 bytes; it is not a manifest");
}

std::string safetensors(const std::string &header, const std::string &data) {
    std::string prefix;
    for (int i = 0; i < 8; ++i) prefix += static_cast<char>((header.size() >> (8 * i)) & 0xFF);
    return prefix + header + data;
}

void test_safetensors() {
    const Folder folder;
    const fs::path path = folder.path() / "t";
    const std::string a = "\"a\": {\"dtype\": \"F32\", \"shape\": [1, 2], \"data_offsets\": [2, 10]}";
    const std::string b = "\"b\": {\"dtype\": \"BF16\", \"shape\": [], \"data_offsets\": [0, 2]}";
    const std::string data("\x80\x3f\x00\x00\x80\x3f\x00\x00\x00\x40", 10);
    write(path, safetensors("{" + a + ", " + b + ", \"__metadata__\": {\"k\": \"v\"}}  ", data));
    const auto found = arcflow::load_safetensors(path, {"a", "b"});
    CHECK(found.at("a").describe() == "float32[1, 2]" && found.at("a").as<float>()[1] == 2.0f);
    CHECK(found.at("b").describe() == "bfloat16[]" && arcflow::from_bfloat16(found.at("b").as<uint16_t>()[0]) == 1.0f);
    fails([&] { arcflow::load_safetensors(path, {"c"}); }, "t has no tensor \"c\"");
    fails([&] { arcflow::load_safetensors(folder.path() / "none", {}); }, "none cannot be opened");

    const auto bytes_fail = [&](const std::string &bytes, const std::string &text) {
        write(path, bytes);
        fails([&] { arcflow::load_safetensors(path, {"a"}); }, text);
    };
    bytes_fail("1234567", "t must have a header, got 7 bytes");
    bytes_fail(safetensors("{" + a + ", " + b + "}", data.substr(1)),
               "must take the 9 bytes behind the header, got 10");
    bytes_fail(safetensors("{" + a + ", " + b + "}", data + "x"), "must take the 11 bytes behind the header, got 10");
    bytes_fail(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10), "the header must have at most 2 bytes, got 1844");
    bytes_fail(std::string("\x03\0\0\0\0\0\0\0{}", 10), "the header must have at most 2 bytes, got 3");
    bytes_fail(safetensors("", ""), "the header must begin with \"{\"");
    bytes_fail(safetensors("{" + a + "}", data), "one after the other, got one at byte 2 after byte 0");

    const auto fail = [](const std::string &entry, const std::string &text) {
        fails([&] { arcflow::parse_safetensors_header("{\"a\": " + entry + "}", 8, "t"); }, text);
    };
    const auto entry = [](const std::string &dtype, const std::string &shape, const std::string &offsets) {
        return "{\"dtype\": \"" + dtype + "\", \"shape\": " + shape + ", \"data_offsets\": " + offsets + "}";
    };
    arcflow::parse_safetensors_header("{\"a\": " + entry("F64", "[1]", "[0, 8]") + "}", 8, "t");
    fail("1", "t.a must be an object, got 1");
    fail("{}", "t.a: missing keys [\"data_offsets\", \"dtype\", \"shape\"]");
    fail(entry("F31", "[1]", "[0, 8]"), "t.a: dtype \"F31\" is not known");
    fail(entry("F32", "[-2]", "[0, 8]"), "t.a: shape[0] must be an integer of at least 0, got -2");
    fail(entry("F32", "[2]", "[0, 8, 9]"), "t.a: data_offsets must be a begin and an end after it");
    fail(entry("F32", "[2]", "[8, 0]"), "t.a: data_offsets must be a begin and an end after it");
    fail(entry("F32", "[3]", "[0, 8]"), "span the bytes that shape and dtype take, got 8 for F32[3]");
    // 2**62 * 4 is 0 in 64 bits.
    fail(entry("F32", "[4611686018427387904]", "[0, 0]"), "span the bytes that shape and dtype take, got 0 for F32[46");
    fail(entry("F32", "[2]", "[0, 8]") + ", \"b\": " + entry("F32", "[1]", "[4, 8]"), "got one at byte 4 after byte 8");
    fail(entry("F32", "[2]", "[0, 8]") + ", \"a\": 1", "has the key \"a\" twice");
    fail(entry("F32", "[2]", "[0, 8]") + ", \"__metadata__\": {\"k\": 1}", "__metadata__.k must be a string, got 1");
}

void test_modulation() {
    const Folder folder;
    arcflow::Bundle bundle{folder.path(), parsed(flux_manifest())};
    CHECK(arcflow::load_modulation(bundle).empty());
    bundle.manifest = parsed(qwen_manifest());
    bundle.manifest.parts.at("backbone").inputs = {{"modulation", arcflow::DType::float32, {"batch", int64_t{1}}}};
    const auto entry = [](const char *n, const char *shape, const char *offsets) {
        return std::string("\"num_inference_steps_") + n + "\": {\"dtype\": \"F32\", \"shape\": " + shape +
               ", \"data_offsets\": " + offsets + "}";
    };
    const fs::path path = folder.path() / "modulation.safetensors";
    const std::string two = entry("2", "[2, 1]", "[0, 8]"), four = entry("4", "[4, 1]", "[8, 24]");
    write(path, safetensors("{" + two + ", " + four + "}", std::string(24, '\0')));
    CHECK(arcflow::load_modulation(bundle).at(4).describe() == "float32[4, 1]");
    write(path, safetensors("{" + two + "}", std::string(8, '\0')));
    fails([&] { arcflow::load_modulation(bundle); },
          "modulation.safetensors: the modulation table cannot be read (" + path.string() +
              " has no tensor \"num_inference_steps_4\"); export the bundle again");
    write(path, safetensors("{" + two + ", " + entry("4", "[2, 2]", "[8, 24]") + "}", std::string(24, '\0')));
    fails([&] { arcflow::load_modulation(bundle); }, "num_inference_steps_4 must be float32 of shape [4, 1], for the "
                                                     "backbone's input modulation, got float32[2, 2]");
    write(path, safetensors("{" + two + ", " + entry("4", "[4, 2]", "[8, 40]") + "}", std::string(40, '\0')));
    fails([&] { arcflow::load_modulation(bundle); }, "must be float32 of shape [4, 1], for the backbone's input");
}

}  // namespace

void test_bundle() {
    test_manifests();
    test_slots();
    test_seal();
    test_types();
    test_rules();
    test_bundles();
    test_safetensors();
    test_modulation();
}
