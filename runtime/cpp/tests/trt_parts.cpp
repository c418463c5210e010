// Implements trt_parts.h: fake engines, and the expected result on the host.
#include "trt_parts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

#include "error.h"
#include "maths.h"
#include "noise_of.h"
#include "trt_engine.h"
#include "trt_shapes.h"

namespace fake {
namespace {

// The values of a tensor in memory, as floats. Looked up by name once, because the loops over them are long.
struct Values {
    DType dtype;
    std::byte *at;

    float operator[](int64_t i) const {
        if (dtype == DType::float32) return reinterpret_cast<const float *>(at)[i];
        const uint16_t bits = reinterpret_cast<const uint16_t *>(at)[i];
        return dtype == DType::float16 ? from_half(bits) : from_bfloat16(bits);
    }
    void set(int64_t i, float x) const {
        if (dtype == DType::float32) reinterpret_cast<float *>(at)[i] = x;
        else reinterpret_cast<uint16_t *>(at)[i] = dtype == DType::float16 ? to_half(x) : to_bfloat16(x);
    }
};

// One run, with the addresses of its call, as a captured engine keeps them.
struct Call {
    std::string part;
    DType dtype;
    Shapes shapes;
    std::map<std::string, cuda::Address> at;
    cuda::Address workspace;
    size_t workspace_bytes;
    std::shared_ptr<bool> alive;  // false after the context was freed
};

DType dtype_of(const Call &call, const std::string &tensor) {
    if (tensor == "images") return DType::uint8;
    const bool single = tensor.find("rotary") != std::string::npos || tensor == "timesteps" || tensor == "guidance" ||
                        call.part == "vae_decoder";
    return single ? DType::float32 : call.dtype;
}

// Called by the driver when the work runs; returns 0 or 1 for a failure.
int run(void *user) {
    const auto &call = *static_cast<const Call *>(user);
    if (!*call.alive) {
        std::fprintf(stderr, "%s: runs after its context was freed\n", call.part.c_str());
        return 1;
    }
    const auto resolve = [](cuda::Address address, size_t bytes) {
        void *found = control<void *(cuda::Address, size_t)>("host_cuda_at")(address, bytes);
        if (found == nullptr) std::fprintf(stderr, "%s\n", control<const char *()>("host_cuda_fault")());
        return static_cast<std::byte *>(found);
    };
    std::map<std::string, std::byte *> at;
    for (const auto &[name, address] : call.at)
        at[name] = resolve(address, bytes_of(call.shapes.at(name), dtype_of(call, name), name));
    std::byte *workspace = resolve(call.workspace, call.workspace_bytes);
    for (const auto &[name, found] : at)
        if (found == nullptr) return 1;
    if (workspace == nullptr) return 1;
    std::memset(workspace, 0xff, call.workspace_bytes);
    if (call.part == "conditioner") conditioner(call.shapes, at, call.dtype);
    else if (call.part == "vae_decoder") decoder(call.shapes, at);
    else backbone(call.shapes, at, call.dtype);
    return 0;
}

class Context : public TrtContext {
public:
    Context(Session &session, std::string part, DType dtype, Shapes shapes, cuda::Stream &stream)
        : session_(session), part_(std::move(part)), dtype_(dtype), shapes_(std::move(shapes)), stream_(stream) {
        session_.most_contexts = std::max(session_.most_contexts, ++session_.live_contexts);
        if (part_ == "conditioner") {
            shapes_["modulation"] = {shapes_.at("timesteps")[0], shapes_.at("pooled_projections")[0], M};
            return;
        }
        const std::vector<int64_t> &s = shapes_.at("latents");
        if (part_ == "vae_decoder") {
            shapes_["images"] = {s[0], s[1] * TOKEN_PX, s[2] * TOKEN_PX, 3};
        } else {
            shapes_["means"] = {s[0], s[1], K, C};
            shapes_["logweights"] = {s[0], s[1], K, P};
            shapes_["loggammas"] = {s[0], s[1], K - 1, P};
        }
    }
    ~Context() override {
        --session_.live_contexts;
        *alive_ = false;
    }

    // The decoder needs most, and larger images need more.
    size_t workspace_bytes() override {
        if (part_ != "vae_decoder") return 300;
        const std::vector<int64_t> &s = shapes_.at("latents");
        return 1000 + 64 * static_cast<size_t>(s[0] * s[1] * s[2]);
    }
    void use_workspace(cuda::Address address, size_t bytes) override {
        CHECK(address % 256 == 0 && bytes >= workspace_bytes());
        workspace_ = address;
        given_ = bytes;
    }
    std::vector<int64_t> shape(const std::string &tensor) override { return shapes_.at(tensor); }
    void bind(const std::string &tensor, cuda::Address address) override {
        CHECK(address % 256 == 0 && address != 0 && shapes_.count(tensor) == 1);
        at_[tensor] = address;
    }
    std::string obstacle() override { return session_.obstacle; }
    void enqueue() override {
        CHECK(at_.size() == shapes_.size() && workspace_ != 0);
        session_.before_enqueue();
        // Never freed, so that a run after the context was freed is found.
        static std::mutex mutex;
        static auto *const all = new std::vector<std::unique_ptr<Call>>;
        auto call = std::make_unique<Call>(Call{part_, dtype_, shapes_, at_, workspace_, given_, alive_});
        Call *const given = call.get();
        {
            const std::lock_guard<std::mutex> lock(mutex);
            all->push_back(std::move(call));
        }
        const int failed =
            control<int(void *, int (*)(void *), void *)>("host_cuda_enqueue")(stream_.handle, run, given);
        if (failed == out_of_memory) throw Error(ARCFLOW_OUT_OF_MEMORY, part_ + ": the run needs more memory");
        if (failed) throw engine_error(part_ + ": the run failed with error " + std::to_string(failed));
    }

private:
    Session &session_;
    std::string part_;
    DType dtype_;
    Shapes shapes_;
    cuda::Stream &stream_;
    cuda::Address workspace_ = 0;
    size_t given_ = 0;
    std::map<std::string, cuda::Address> at_;
    std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

// The rows [row, row + count) of a tensor's first axis.
Tensor rows(const Tensor &from, int64_t row, int64_t count = 1) {
    std::vector<int64_t> shape = from.shape;
    shape[0] = count;
    Tensor part(from.dtype, shape);
    const size_t bytes = from.data.size() / static_cast<size_t>(from.shape[0]);
    std::memcpy(part.data.data(), from.data.data() + static_cast<size_t>(row) * bytes, part.data.size());
    return part;
}

std::map<std::string, std::byte *> addresses(Tensors &tensors) {
    std::map<std::string, std::byte *> at;
    for (auto &[name, tensor] : tensors) at[name] = tensor.data.data();
    return at;
}

// A number that depends on every element of the factors of a slot [in, r, 8] and [r, 8, out], through their product;
// 0 without them. Ranks of zeros change no bit.
float told_by_slot(const std::string &layer, const Shapes &shapes, const std::map<std::string, std::byte *> &at,
                   DType dtype) {
    const auto found = shapes.find(lora_a(layer));
    if (found == shapes.end()) return 0;
    const int64_t in = found->second[0], rank = found->second[1] * found->second[2];
    const int64_t out = shapes.at(lora_b(layer))[2];
    const Values a{dtype, at.at(lora_a(layer))}, b{dtype, at.at(lora_b(layer))};
    float told = 0;
    for (int64_t i = 0; i < in; ++i) {
        for (int64_t o = 0; o < out; ++o) {
            float product = 0;
            for (int64_t r = 0; r < rank; ++r) product += a[i * rank + r] * b[r * out + o];
            told += product * static_cast<float>(1 + i + 2 * o);
        }
    }
    return told;
}

// Add the inputs of a part's slots.
void add_slots(Tensors &tensors, const DenoiseJob &job, const std::string &part) {
    const Tensors *slots = job.loras == nullptr ? nullptr : job.loras->of(part);
    if (slots != nullptr) tensors.insert(slots->begin(), slots->end());
}

// The modulation [S, 1, M] of one image, in the conditioner's dtype.
Tensor conditioned(const DenoiseJob &job, const Embeddings &text, DType dtype) {
    const auto steps = static_cast<int64_t>(job.timesteps.size());
    Tensors t;
    t["timesteps"] = Tensor(DType::float32, {steps});
    std::copy(job.timesteps.begin(), job.timesteps.end(), t["timesteps"].as<float>());
    t["pooled_projections"] = cast(text.pooled, dtype);
    t["guidance"] = Tensor(DType::float32, {1});
    *t["guidance"].as<float>() = *job.guidance;
    add_slots(t, job, "conditioner");
    t["modulation"] = Tensor(dtype, {steps, 1, M});
    conditioner(shapes_of(t), addresses(t), dtype);
    return t["modulation"];
}

}  // namespace

void backbone(const Shapes &shapes, const std::map<std::string, std::byte *> &at, DType dtype) {
    const auto &latents = shapes.at("latents");
    const int64_t batch = latents[0], tokens = latents[1], text = shapes.at("encoder_hidden_states")[1];
    const Values x{dtype, at.at("latents")}, states{dtype, at.at("encoder_hidden_states")};
    const Values modulation{dtype, at.at("modulation")};
    const Values image_rotary{DType::float32, at.at("image_rotary")}, text_rotary{DType::float32, at.at("text_rotary")};
    const Values means{dtype, at.at("means")}, logweights{dtype, at.at("logweights")};
    const Values loggammas{dtype, at.at("loggammas")};
    for (int64_t b = 0; b < batch; ++b) {
        float told = told_by_slot("to_q", shapes, at, dtype);
        for (int64_t i = 0; i < text * TEXT; ++i) told += states[b * text * TEXT + i];
        for (int64_t i = 0; i < text * 2 * HALF_HEAD; ++i) told += text_rotary[i];
        for (int64_t i = 0; i < M; ++i) told += static_cast<float>(i + 1) * modulation[b * M + i];
        for (int64_t n = 0; n < tokens; ++n) {
            const int64_t token = b * tokens + n;
            const float here = told * 0.01f + image_rotary[n * HALF_HEAD];
            for (int64_t k = 0; k < K; ++k) {
                for (int64_t c = 0; c < C; ++c)
                    means.set((token * K + k) * C + c, std::sin(x[token * C + c] + here * static_cast<float>(k + 1)));
                for (int64_t p = 0; p < P; ++p) {
                    const float one = x[token * C + p];
                    logweights.set((token * K + k) * P + p, one * static_cast<float>(k) + here);
                    if (k > 0) loggammas.set((token * (K - 1) + k - 1) * P + p, here - one);
                }
            }
        }
    }
}

void conditioner(const Shapes &shapes, const std::map<std::string, std::byte *> &at, DType dtype) {
    const int64_t steps = shapes.at("timesteps")[0], prompts = shapes.at("pooled_projections")[0];
    const float told = told_by_slot("norm", shapes, at, dtype);
    const Values timesteps{DType::float32, at.at("timesteps")}, guidance{DType::float32, at.at("guidance")};
    const Values pooled{dtype, at.at("pooled_projections")}, modulation{dtype, at.at("modulation")};
    for (int64_t i = 0; i < steps * prompts * M; ++i) {
        const int64_t step = i / (prompts * M), prompt = i / M % prompts;
        modulation.set(i, timesteps[step] / 1000 + pooled[prompt * POOL + 1] + guidance[prompt] +
                              static_cast<float>(i % M) / 8 + told);
    }
}

void decoder(const Shapes &shapes, const std::map<std::string, std::byte *> &at) {
    const auto &s = shapes.at("latents");
    const int64_t width = s[2] * TOKEN_PX, pixels = s[0] * s[1] * TOKEN_PX * width;
    const Values latents{DType::float32, at.at("latents")};
    std::byte *const images = at.at("images");
    for (int64_t i = 0; i < pixels; ++i) {
        const int64_t y = i / width, token = y / TOKEN_PX * s[2] + i % width / TOKEN_PX;
        for (int64_t channel = 0; channel < 3; ++channel)
            images[i * 3 + channel] = static_cast<std::byte>(std::lround(latents[token * C + channel] * 16) & 0xff);
    }
}

std::unique_ptr<TrtContext> Session::context(const Shapes &inputs, cuda::Stream &stream) {
    if (const std::string wrong = misfit(inputs); !wrong.empty()) throw engine_error(wrong);
    ++contexts;
    return std::make_unique<Context>(*this, part_, dtype_, inputs, stream);
}

std::string Session::misfit(const Shapes &inputs) {
    if (part_ == "conditioner" && inputs.at("timesteps")[0] > max_steps)
        return part_ + ": the engine takes at most " + std::to_string(max_steps) + " steps";
    const std::string &batched = part_ == "conditioner" ? "pooled_projections" : "latents";
    if (inputs.at(batched)[0] > max_batch)
        return part_ + ": the engine takes at most " + std::to_string(max_batch) + " images";
    return "";
}

ScaledLora lora_of(uint64_t number, int64_t rank, float scale, const Manifest &manifest) {
    auto made = std::make_shared<Lora>(Lora{number, "lora", {}});
    for (const auto &[part, slots] : manifest.slots()) {
        for (const auto &[layer, slot] : slots->layers) {
            LoraFactors factors{random_tensor(number, {slot.in_features, rank / 8, 8}),
                                random_tensor(number + 1000, {rank / 8, 8, slot.out_features})};
            factors.a = cast(std::move(factors.a), slot.dtype);
            factors.b = cast(std::move(factors.b), slot.dtype);
            made->parts[part].emplace(layer, std::move(factors));
        }
    }
    return {made, scale};
}

Manifest manifest_in(DType dtype, DType conditioned, int64_t max_rank) {
    Manifest m{};
    m.family = Family::flux;
    m.latents = {C / P, 2, 8, K, P};
    const Dimension any = std::string("any");
    Part part{};
    part.inputs = {{"latents", dtype, {any, any, C}},
                   {"encoder_hidden_states", dtype, {any, any, TEXT}},
                   {"modulation", dtype, {any, M}},
                   {"image_rotary", DType::float32, {int64_t{2}, any, HALF_HEAD}},
                   {"text_rotary", DType::float32, {int64_t{2}, any, HALF_HEAD}}};
    part.outputs = {{"means", dtype, {}}, {"logweights", dtype, {}}, {"loggammas", dtype, {}}};
    const auto slot = [&](const char *layer, DType of) {
        if (max_rank > 0) part.lora = LoraSlots{{{layer, {3, 2, of}}}, 8, max_rank, {}};
    };
    slot("to_q", dtype);
    m.parts["backbone"] = part;
    part.inputs = {{"timesteps", DType::float32, {any}},
                   {"guidance", DType::float32, {any}},
                   {"pooled_projections", conditioned, {any, POOL}}};
    part.outputs = {{"modulation", conditioned, {any, any, M}}};
    slot("norm", conditioned);
    m.parts["conditioner"] = part;
    part.lora.reset();
    part.inputs = {{"latents", DType::float32, {any, any, any, C}}};
    part.outputs = {{"images", DType::uint8, {any, any, any, int64_t{3}}}};
    m.parts["vae_decoder"] = part;
    return m;
}

Tensor random_tensor(uint64_t seed, std::vector<int64_t> shape) {
    Tensor tensor(DType::float32, std::move(shape));
    randn(seed, static_cast<size_t>(tensor.count()), tensor.as<float>());
    return tensor;
}

DenoiseJob job_of(uint64_t seed, int64_t images, bool pixels, std::vector<double> sigmas, int64_t text_tokens,
                  int64_t height, int64_t width) {
    DenoiseJob job{};
    std::vector<uint64_t> seeds{seed};
    for (int64_t i = 1; i < images && seed % 2 == 0; ++i) seeds.push_back(seed << 40 | static_cast<uint64_t>(i));
    job.streams = noise_streams(seeds, images, height * width * C);
    for (int64_t i = 0; i < images; ++i) {
        const uint64_t text = seed + static_cast<uint64_t>(i) * 100;
        job.texts.push_back(std::make_shared<const Embeddings>(
            Embeddings{random_tensor(text + 1, {1, text_tokens, TEXT}), random_tensor(text + 2, {1, POOL})}));
    }
    // The tables are the same for all jobs of one shape.
    const auto table = [](int64_t tokens) {
        return std::make_shared<const Tensor>(random_tensor(static_cast<uint64_t>(tokens), {2, tokens, HALF_HEAD}));
    };
    job.image_rotary = table(height * width);
    job.text_rotary = table(text_tokens);
    job.height = height;
    job.width = width;
    for (size_t i = 0; i + 1 < sigmas.size(); ++i) job.timesteps.push_back(static_cast<float>(sigmas[i] * 1000));
    job.sigmas = std::move(sigmas);
    job.guidance = 0.5f + static_cast<float>(seed % 3);
    job.pixels = pixels;
    return job;
}

Denoised expected(const DenoiseJob &job, const Manifest &manifest) {
    Denoised out;
    const Part &part = manifest.parts.at("backbone");
    const DType dtype = part.inputs[0].dtype;
    out.latents = noise_of(job, manifest.latents);
    const int64_t tokens = job.height * job.width, batch = out.latents.shape[0];
    for (int64_t image = 0; image < batch; ++image) {
        const Embeddings &text = *job.texts[static_cast<size_t>(image)];
        Tensor modulation;  // [S, M]
        if (job.table != nullptr) {
            modulation = *job.table;
        } else {
            modulation = conditioned(job, text, manifest.parts.at("conditioner").outputs[0].dtype);
            modulation.shape = {modulation.shape[0], M};
        }
        Tensor x = rows(out.latents, image);
        for (size_t step = 0; step + 1 < job.sigmas.size(); ++step) {
            Tensors t;
            t["latents"] = cast(x, dtype);
            t["encoder_hidden_states"] = cast(text.states, dtype);
            t["modulation"] = cast(rows(modulation, static_cast<int64_t>(step)), dtype);
            t["image_rotary"] = *job.image_rotary;
            t["text_rotary"] = *job.text_rotary;
            add_slots(t, job, "backbone");
            const Shapes shapes = shapes_of(t);
            t["means"] = Tensor(dtype, {1, tokens, K, C});
            t["logweights"] = Tensor(dtype, {1, tokens, K, P});
            t["loggammas"] = Tensor(dtype, {1, tokens, K - 1, P});
            backbone(shapes, addresses(t), dtype);
            update(x, t["means"], t["logweights"], t["loggammas"], job.sigmas[step], job.sigmas[step + 1]);
        }
        std::memcpy(out.latents.data.data() + static_cast<size_t>(image) * x.data.size(), x.data.data(), x.data.size());
    }
    if (!job.pixels) return out;
    out.pixels = Tensor(DType::uint8, {batch, job.height * TOKEN_PX, job.width * TOKEN_PX, 3});
    decoder({{"latents", {batch, job.height, job.width, C}}},
            {{"latents", out.latents.data.data()}, {"images", out.pixels.data.data()}});
    return out;
}

}  // namespace fake
