// Implements trt_parts.h: fake engines, and the expected result on the host.
#include "trt_parts.h"

#include <cmath>
#include <cstring>

#include "maths.h"
#include "noise_of.h"
#include "trt_engine.h"

namespace fake {
namespace {

float read(DType dtype, const std::byte *from, int64_t i) {
    if (dtype == DType::float32) return reinterpret_cast<const float *>(from)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t *>(from)[i];
    return dtype == DType::float16 ? from_half(bits) : from_bfloat16(bits);
}

void write(DType dtype, std::byte *to, int64_t i, float x) {
    if (dtype == DType::float32) reinterpret_cast<float *>(to)[i] = x;
    else reinterpret_cast<uint16_t *>(to)[i] = dtype == DType::float16 ? to_half(x) : to_bfloat16(x);
}

// A context of a fake engine; the decoder makes one pixel per token.
class Context : public TrtContext {
public:
    Context(std::string part, DType dtype, Shapes shapes, cuda::Stream &stream, bool capturable)
        : part_(std::move(part)), dtype_(dtype), shapes_(std::move(shapes)), stream_(stream), capturable_(capturable) {
        if (part_ == "conditioner") {
            shapes_["modulation"] = {shapes_.at("timesteps")[0], shapes_.at("pooled_projections")[0], M};
            return;
        }
        const std::vector<int64_t> &s = shapes_.at("latents");
        if (part_ == "vae_decoder") {
            shapes_["images"] = {s[0], s[1], s[2], 3};
        } else {
            shapes_["means"] = {s[0], s[1], K, C};
            shapes_["logweights"] = {s[0], s[1], K, P};
            shapes_["loggammas"] = {s[0], s[1], K - 1, P};
        }
    }

    size_t scratch_bytes() override { return part_ == "vae_decoder" ? 1000 : 300; }
    void use_scratch(cuda::Address address, size_t bytes) override {
        CHECK(address % 256 == 0 && bytes >= scratch_bytes());
        scratch_ = reinterpret_cast<std::byte *>(address);
    }
    std::vector<int64_t> shape(const std::string &tensor) override { return shapes_.at(tensor); }
    void bind(const std::string &tensor, cuda::Address address) override {
        CHECK(address % 256 == 0);
        CHECK(shapes_.count(tensor) == 1);
        at_[tensor] = reinterpret_cast<std::byte *>(address);
    }
    bool capturable() override { return capturable_; }
    void enqueue() override {
        CHECK(at_.size() == shapes_.size() && scratch_ != nullptr);
        std::memset(scratch_, 1, scratch_bytes());
        // Keeps the addresses of this call, as a captured engine does.
        struct Call {
            Context *context;
            std::map<std::string, std::byte *> at;
        };
        auto call = std::make_shared<Call>(Call{this, at_});
        calls_.push_back(call);
        driver<void(void *, void (*)(void *), void *)>("fake_enqueue")(
            stream_.handle,
            [](void *user) {
                const auto *c = static_cast<Call *>(user);
                if (c->context->part_ == "conditioner") conditioner(c->context->shapes_, c->at);
                else if (c->context->part_ == "vae_decoder") decoder(c->context->shapes_, c->at);
                else backbone(c->context->shapes_, c->at, c->context->dtype_);
            },
            call.get());
    }

private:
    std::string part_;
    DType dtype_;
    Shapes shapes_;
    cuda::Stream &stream_;
    bool capturable_;
    std::byte *scratch_ = nullptr;
    std::map<std::string, std::byte *> at_;
    std::vector<std::shared_ptr<void>> calls_;  // graphs may run them during the context's lifetime
};

}  // namespace

void backbone(const Shapes &shapes, const std::map<std::string, std::byte *> &at, DType dtype) {
    const auto &latents = shapes.at("latents");
    const int64_t batch = latents[0], tokens = latents[1], text = shapes.at("encoder_hidden_states")[1];
    for (int64_t b = 0; b < batch; ++b) {
        float told = 0;
        for (int64_t i = 0; i < text * TEXT; ++i)
            told += read(dtype, at.at("encoder_hidden_states"), b * text * TEXT + i);
        for (int64_t i = 0; i < text * 2 * HALF_HEAD; ++i) told += read(DType::float32, at.at("text_rotary"), i);
        for (int64_t i = 0; i < M; ++i) told += static_cast<float>(i + 1) * read(dtype, at.at("modulation"), b * M + i);
        for (int64_t n = 0; n < tokens; ++n) {
            const int64_t token = b * tokens + n;
            const float here = told * 0.01f + read(DType::float32, at.at("image_rotary"), n * HALF_HEAD);
            for (int64_t k = 0; k < K; ++k) {
                for (int64_t c = 0; c < C; ++c) {
                    const float x = read(dtype, at.at("latents"), token * C + c);
                    write(dtype, at.at("means"), (token * K + k) * C + c,
                          std::sin(x + here * static_cast<float>(k + 1)));
                }
                for (int64_t p = 0; p < P; ++p) {
                    const float x = read(dtype, at.at("latents"), token * C + p);
                    write(dtype, at.at("logweights"), (token * K + k) * P + p, x * static_cast<float>(k) + here);
                    if (k > 0) write(dtype, at.at("loggammas"), (token * (K - 1) + k - 1) * P + p, here - x);
                }
            }
        }
    }
}

void conditioner(const Shapes &shapes, const std::map<std::string, std::byte *> &at) {
    const int64_t steps = shapes.at("timesteps")[0], prompts = shapes.at("pooled_projections")[0];
    for (int64_t i = 0; i < steps * prompts * M; ++i) {
        const int64_t step = i / (prompts * M), prompt = i / M % prompts;
        const float timestep = read(DType::float32, at.at("timesteps"), step);
        const float pooled = read(DType::float32, at.at("pooled_projections"), prompt);
        write(DType::float32, at.at("modulation"), i, timestep + 100 * pooled + static_cast<float>(i % M) / 8);
    }
}

void decoder(const Shapes &shapes, const std::map<std::string, std::byte *> &at) {
    const auto &s = shapes.at("latents");
    for (int64_t i = 0; i < s[0] * s[1] * s[2]; ++i) {
        for (int64_t channel = 0; channel < 3; ++channel) {
            const float x = read(DType::float32, at.at("latents"), i * C + channel);
            at.at("images")[i * 3 + channel] = static_cast<std::byte>(std::lround(x * 16) & 0xff);
        }
    }
}

std::unique_ptr<TrtContext> Session::context(const Shapes &inputs, cuda::Stream &stream) {
    ++contexts;
    return std::make_unique<Context>(part_, dtype_, inputs, stream, capturable_);
}

Manifest manifest_in(DType dtype) {
    Manifest m{};
    m.latents = {C / P, 2, 8, K, P};
    Part part{};
    part.inputs = {{"latents", dtype, {}},
                   {"encoder_hidden_states", dtype, {}},
                   {"modulation", dtype, {}},
                   {"image_rotary", DType::float32, {}},
                   {"text_rotary", DType::float32, {}}};
    part.outputs = {{"means", dtype, {}}, {"logweights", dtype, {}}, {"loggammas", dtype, {}}};
    m.parts["backbone"] = part;
    return m;
}

Tensor random_tensor(uint64_t seed, std::vector<int64_t> shape) {
    Tensor tensor(DType::float32, std::move(shape));
    randn(seed, static_cast<size_t>(tensor.count()), tensor.as<float>());
    return tensor;
}

DenoiseInputs inputs_of(uint64_t seed, int64_t prompts, bool decode, std::vector<double> sigmas) {
    DenoiseInputs in;
    in.shape = {3, 6, C};
    in.streams = noise_streams(seed % 2 ? std::vector<uint64_t>{seed} : std::vector<uint64_t>{seed, 9, seed << 40 | 7},
                               3, 6 * C);
    const auto table = [&](uint64_t more, int64_t tokens) {
        return std::make_shared<const Tensor>(random_tensor(seed + more, {2, tokens, HALF_HEAD}));
    };
    in.groups.push_back({{0, 2}, {1, 0}, random_tensor(seed + 1, {2, 4, TEXT}), table(2, 4)});
    in.groups.push_back({{1}, {1}, random_tensor(seed + 3, {1, 7, TEXT}), table(4, 7)});
    const auto steps = static_cast<int64_t>(sigmas.size()) - 1;
    in.modulation = random_tensor(seed + 5, {steps, prompts, M});
    in.image_rotary = table(6, 6);
    in.sigmas = std::move(sigmas);
    in.height_px = 32;
    in.width_px = 48;
    in.decode = decode;
    return in;
}

Denoised expected(const DenoiseInputs &in, DType dtype) {
    Denoised out;
    out.latents = noise_of(in, manifest_in(dtype).latents);
    const int64_t tokens = in.shape[1], prompts = in.modulation.shape[1], batch = in.shape[0];
    for (size_t step = 0; step + 1 < in.sigmas.size(); ++step) {
        for (const TextGroup &group : in.groups) {
            for (size_t i = 0; i < group.images.size(); ++i) {
                const auto copy = [](const Tensor &from, std::vector<int64_t> shape, int64_t row) {
                    Tensor part(DType::float32, std::move(shape));
                    std::memcpy(part.data.data(), from.data.data() + static_cast<size_t>(row) * part.data.size(),
                                part.data.size());
                    return part;
                };
                const int64_t text = group.states.shape[1];
                const auto row = static_cast<int64_t>(step) * prompts + (prompts > 1 ? group.prompts[i] : 0);
                Tensors t;
                Tensor x = copy(out.latents, {1, tokens, C}, group.images[i]);
                t["latents"] = cast(x, dtype);
                t["encoder_hidden_states"] = cast(copy(group.states, {1, text, TEXT}, static_cast<int64_t>(i)), dtype);
                t["modulation"] = cast(copy(in.modulation, {1, M}, row), dtype);
                t["image_rotary"] = *in.image_rotary;
                t["text_rotary"] = *group.rotary;
                const Shapes shapes = shapes_of(t);
                t["means"] = Tensor(dtype, {1, tokens, K, C});
                t["logweights"] = Tensor(dtype, {1, tokens, K, P});
                t["loggammas"] = Tensor(dtype, {1, tokens, K - 1, P});
                std::map<std::string, std::byte *> at;
                for (auto &[name, tensor] : t) at[name] = tensor.data.data();
                backbone(shapes, at, dtype);
                update(x, t["means"], t["logweights"], t["loggammas"], in.sigmas[step], in.sigmas[step + 1]);
                std::memcpy(out.latents.data.data() + static_cast<size_t>(group.images[i]) * x.data.size(),
                            x.data.data(), x.data.size());
            }
        }
    }
    out.pixels = Tensor(DType::uint8, {batch, in.height_px / 16, in.width_px / 16, 3});
    decoder({{"latents", {batch, in.height_px / 16, in.width_px / 16, C}}},
            {{"latents", out.latents.data.data()}, {"images", out.pixels.data.data()}});
    return out;
}

}  // namespace fake
