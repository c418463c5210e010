// Runs one function of the core and prints its result, for comparison with the Python runtime:
//
//     core_tool noise SEED COUNT                                 float32
//     core_tool latents SEED,... BATCH CHANNELS PATCH HEIGHT WIDTH  float32
//     core_tool sigmas STEPS SHIFT RATIO                         float64
//     core_tool timesteps FAMILY DTYPE STEPS SHIFT RATIO         float32
//     core_tool guidance SCALE DTYPE                             float32
//     core_tool image_rotary MANIFEST HEIGHT WIDTH               float32
//     core_tool text_rotary MANIFEST HEIGHT WIDTH TOKENS         float32
//     core_tool update SAFETENSORS SIGMA NEXT                    float32, from latents, means, logweights, loggammas
//     core_tool schedule MANIFEST STEPS IMAGE_TOKENS             float64: sigmas, then timesteps
//     core_tool euler SAFETENSORS STEP                           float32, from latents, velocity
//     core_tool guide SAFETENSORS SCALE                          float32, from velocity, negative
//     core_tool round DTYPE < float32                            float32
//     core_tool canonical JSON                                   text
//     core_tool open BUNDLE fast|full                            "ok"
//     core_tool modulation BUNDLE                                float32
//     core_tool loras BUNDLE FILE SCALE [FILE SCALE ...]         bytes of the slots' inputs, by part and name
//
// An Error's text goes to standard error, and the status is its own.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>

#include "error.h"
#include "json.h"
#include "lora.h"
#include "maths.h"
#include "safetensors.h"

namespace {

using Arguments = std::vector<std::string>;

std::string read_file(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

template <class T>
void print(const T *values, size_t count) {
    std::fwrite(values, sizeof(T), count, stdout);
}

template <class T>
void print(const std::vector<T> &values) {
    print(values.data(), values.size());
}

void print(const arcflow::Tensor &tensor) { print(tensor.data.data(), tensor.data.size()); }

arcflow::DType dtype_of(const std::string &name) {
    for (const auto dtype : {arcflow::DType::float32, arcflow::DType::float16, arcflow::DType::bfloat16})
        if (name == arcflow::name_of(dtype)) return dtype;
    throw arcflow::request_error("unknown dtype " + name);
}

std::vector<uint64_t> seeds_of(const std::string &text) {
    std::vector<uint64_t> seeds;
    std::istringstream stream(text);
    for (std::string seed; std::getline(stream, seed, ',');) seeds.push_back(std::stoull(seed));
    return seeds;
}

arcflow::Schedule schedule_of(const std::string &shift, const std::string &ratio) {
    return {std::stod(shift), std::stod(ratio), 2};
}

arcflow::Tensor head(const std::string &path, const std::string &name) {
    return std::move(arcflow::load_safetensors(path, {name}).at(name));
}

void run(const std::string &command, const Arguments &a) {
    const auto integer = [&](size_t i) { return static_cast<int64_t>(std::stoll(a.at(i))); };
    if (command == "noise") {
        std::vector<float> noise(std::stoull(a.at(1)));
        arcflow::randn(std::stoull(a.at(0)), noise.size(), noise.data());
        print(noise);
    } else if (command == "latents") {
        const arcflow::Latents latents{integer(2), integer(3), 8, 1, integer(3) * integer(3)};
        print(arcflow::packed_noise(seeds_of(a.at(0)), integer(1), latents, integer(4), integer(5)));
    } else if (command == "sigmas") {
        print(arcflow::sigmas(integer(0), schedule_of(a.at(1), a.at(2)), 1));
    } else if (command == "timesteps") {
        const auto family = a.at(0) == "flux" ? arcflow::Family::flux : arcflow::Family::qwen_image;
        const auto sigmas = arcflow::sigmas(integer(2), schedule_of(a.at(3), a.at(4)), 1);
        print(arcflow::conditioning_timesteps(sigmas, family, dtype_of(a.at(1)), arcflow::Sampler::momentum));
    } else if (command == "schedule") {
        const auto m = arcflow::parse_manifest(read_file(a.at(0)), a[0]);
        const auto sigmas = arcflow::sigmas(integer(1), m.schedule, integer(2));
        print(sigmas);
        const auto timesteps = arcflow::conditioning_timesteps(sigmas, m.family, m.reference_dtype, m.sampler);
        print(std::vector<double>(timesteps.begin(), timesteps.end()));
    } else if (command == "guidance") {
        print(std::vector<float>{arcflow::conditioning_guidance(std::stof(a.at(0)), dtype_of(a.at(1)))});
    } else if (command == "image_rotary") {
        print(arcflow::image_rotary(arcflow::parse_manifest(read_file(a.at(0)), a[0]), integer(1), integer(2)));
    } else if (command == "text_rotary") {
        const auto manifest = arcflow::parse_manifest(read_file(a.at(0)), a[0]);
        print(arcflow::text_rotary(manifest, integer(1), integer(2), integer(3)));
    } else if (command == "update") {
        arcflow::Tensor latents = head(a.at(0), "latents");
        arcflow::update(latents, head(a[0], "means"), head(a[0], "logweights"), head(a[0], "loggammas"),
                        std::stod(a.at(1)), std::stod(a.at(2)));
        print(latents);
    } else if (command == "euler") {
        arcflow::Tensor latents = head(a.at(0), "latents");
        arcflow::euler(latents, head(a[0], "velocity"), std::stod(a.at(1)));
        print(latents);
    } else if (command == "guide") {
        arcflow::Tensor velocity = head(a.at(0), "velocity");
        arcflow::guide(velocity, head(a[0], "negative"), std::stod(a.at(1)));
        print(velocity);
    } else if (command == "round") {
        const std::string bytes{std::istreambuf_iterator<char>(std::cin), {}};
        arcflow::Tensor values(arcflow::DType::float32, {static_cast<int64_t>(bytes.size() / 4)});
        bytes.copy(reinterpret_cast<char *>(values.data.data()), values.data.size());
        print(arcflow::cast(arcflow::cast(std::move(values), dtype_of(a.at(0))), arcflow::DType::float32));
    } else if (command == "canonical") {
        std::cout << arcflow::canonical(arcflow::read_json(read_file(a.at(0)), a[0]));
    } else if (command == "open") {
        arcflow::Bundle::open(a.at(0), a.at(1) == "full");
        std::cout << "ok";
    } else if (command == "modulation") {
        for (const auto &[n, table] : arcflow::load_modulation(arcflow::Bundle::open(a.at(0), false))) print(table);
    } else if (command == "loras") {
        const arcflow::Manifest manifest = arcflow::Bundle::open(a.at(0), false).manifest;
        std::vector<arcflow::ScaledLora> loras;
        for (size_t i = 1; i + 1 < a.size(); i += 2)
            loras.push_back({arcflow::read_lora(a[i], manifest), std::stof(a[i + 1])});
        for (const auto &[part, inputs] : arcflow::prepare_loras(manifest, loras).inputs)
            for (const auto &[name, tensor] : inputs) print(tensor);
    } else {
        throw arcflow::request_error("unknown command " + command);
    }
}

}  // namespace

int main(int argc, char **argv) {
    try {
        run(argc > 1 ? argv[1] : "", {argv + (argc > 1 ? 2 : 1), argv + argc});
    } catch (const arcflow::Error &e) {
        std::cerr << e.what();
        return e.status;
    }
    return 0;
}
