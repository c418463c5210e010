// The CUDA graph of the TensorRT backend, and its engines on host tensors, with a driver and engines that run on the
// CPU.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "maths.h"
#include "trt_denoiser.h"
#include "trt_engine.h"

namespace {

using namespace arcflow;

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition);    \
            std::exit(1);                                                                    \
        }                                                                                    \
    } while (false)

constexpr int64_t K = 3, P = 4, C = 16, TEXT = 6, M = 5, HALF_HEAD = 2;

// The driver's functions that only the fake one has.
template <class Function> Function *fake(const char *name) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *found = driver == nullptr ? nullptr : dlsym(driver, name);
    if (found == nullptr) {
        std::fprintf(stderr, "run this with the folder of the fake libcuda.so.1 in LD_LIBRARY_PATH\n");
        std::exit(1);
    }
    return reinterpret_cast<Function *>(found);
}

float read(DType dtype, const std::byte *from, int64_t i) {
    if (dtype == DType::float32) return reinterpret_cast<const float *>(from)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t *>(from)[i];
    return dtype == DType::float16 ? from_half(bits) : from_bfloat16(bits);
}

void write(DType dtype, std::byte *to, int64_t i, float x) {
    if (dtype == DType::float32) reinterpret_cast<float *>(to)[i] = x;
    else reinterpret_cast<uint16_t *>(to)[i] = dtype == DType::float16 ? to_half(x) : to_bfloat16(x);
}

// Some heads that depend on every input of each image: its own latents, text and modulation.
void backbone(const Shapes &shapes, const std::map<std::string, std::byte *> &at, DType dtype) {
    const auto &latents = shapes.at("latents");
    const int64_t batch = latents[0], tokens = latents[1], text = shapes.at("encoder_hidden_states")[1];
    for (int64_t b = 0; b < batch; ++b) {
        float told = 0;
        for (int64_t i = 0; i < text * TEXT; ++i) {
            told += read(dtype, at.at("encoder_hidden_states"), b * text * TEXT + i);
        }
        for (int64_t i = 0; i < text * 2 * HALF_HEAD; ++i) told += read(DType::float32, at.at("text_rotary"), i);
        for (int64_t i = 0; i < M; ++i) {
            told += static_cast<float>(i + 1) * read(dtype, at.at("modulation"), b * M + i);
        }
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
                    if (k > 0) {
                        write(dtype, at.at("loggammas"), (token * (K - 1) + k - 1) * P + p, here - x);
                    }
                }
            }
        }
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

// One context of a fake engine; its outputs have the shapes of the parts above, one pixel per token for the decoder.
class FakeContext : public TrtContext {
public:
    FakeContext(std::string part, DType dtype, Shapes shapes, cuda::Stream &stream, bool capturable)
        : part_(std::move(part)), dtype_(dtype), shapes_(std::move(shapes)), stream_(stream), capturable_(capturable) {
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
        // The addresses of now, as a captured engine has them.
        struct Call {
            FakeContext *context;
            std::map<std::string, std::byte *> at;
        };
        auto call = std::make_shared<Call>(Call{this, at_});
        calls_.push_back(call);
        fake<void(void *, void (*)(void *), void *)>("fake_enqueue")(
            stream_.handle,
            [](void *user) {
                const auto *c = static_cast<Call *>(user);
                if (c->context->part_ == "vae_decoder") decoder(c->context->shapes_, c->at);
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
    std::vector<std::shared_ptr<void>> calls_;  // a graph may run them as long as the context lives
};

class FakeSession : public TrtSession {
public:
    FakeSession(std::string part, DType dtype, bool capturable)
        : part_(std::move(part)), dtype_(dtype), capturable_(capturable) {}
    std::unique_ptr<TrtContext> context(const Shapes &inputs, cuda::Stream &stream) override {
        ++contexts;
        return std::make_unique<FakeContext>(part_, dtype_, inputs, stream, capturable_);
    }
    int64_t largest(const std::string &, size_t) override { return 8; }

    int contexts = 0;

private:
    std::string part_;
    DType dtype_;
    bool capturable_;
};

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

// Images 0 and 2 have one text length, image 1 another; each prompt has its own modulation, or all share one.
DenoiseInputs inputs_of(uint64_t seed, int64_t prompts, bool decode, std::vector<double> sigmas = {1, 0.7619, 0}) {
    DenoiseInputs in;
    in.noise = random_tensor(seed, {3, 6, C});
    in.groups.push_back(
        {{0, 2}, {1, 0}, random_tensor(seed + 1, {2, 4, TEXT}), random_tensor(seed + 2, {2, 4, HALF_HEAD})});
    in.groups.push_back({{1}, {1}, random_tensor(seed + 3, {1, 7, TEXT}), random_tensor(seed + 4, {2, 7, HALF_HEAD})});
    const auto steps = static_cast<int64_t>(sigmas.size()) - 1;
    in.modulation = random_tensor(seed + 5, {steps, prompts, M});
    in.image_rotary = random_tensor(seed + 6, {2, 6, HALF_HEAD});
    in.sigmas = std::move(sigmas);
    in.height_px = 32;
    in.width_px = 48;
    in.decode = decode;
    return in;
}

// The same on host tensors, image by image, with the library's own update.
Denoised expected(const DenoiseInputs &in, DType dtype) {
    Denoised out;
    out.latents = in.noise;
    const int64_t tokens = in.noise.shape[1], prompts = in.modulation.shape[1], batch = in.noise.shape[0];
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
                t["image_rotary"] = in.image_rotary;
                t["text_rotary"] = group.rotary;
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

// Places of 16-bit inputs may round the other way where the two updates differ in their last place.
float largest_difference(const Tensor &a, const Tensor &b) {
    CHECK(a.shape == b.shape);
    float most = 0;
    for (int64_t i = 0; i < a.count(); ++i) most = std::fmax(most, std::fabs(a.as<float>()[i] - b.as<float>()[i]));
    return most;
}

struct Setup {
    explicit Setup(DType dtype, bool capturable = true)
        : device(std::make_shared<const cuda::Device>()),
          backbone(std::make_shared<FakeSession>("backbone", dtype, capturable)),
          decoder(std::make_shared<FakeSession>("vae_decoder", DType::float32, capturable)),
          denoiser(make_trt_denoiser(device, backbone, decoder, manifest_in(dtype))) {}

    std::shared_ptr<const cuda::Device> device;
    std::shared_ptr<FakeSession> backbone, decoder;
    std::unique_ptr<Denoiser> denoiser;
};

int launches() { return fake<int()>("fake_graph_launches")(); }

void test_agrees_with_the_host() {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
        Setup s(dtype);
        // A place of the backbone's input moves its heads by about as much.
        const float near = dtype == DType::float32 ? 1e-5f : dtype == DType::float16 ? 4e-3f : 4e-2f;
        for (const int64_t prompts : {1, 2}) {
            const int before = launches();
            for (uint64_t seed = 1; seed < 4; ++seed) {
                const DenoiseInputs in = inputs_of(seed, prompts, true);
                const Denoised ours = s.denoiser->run(in), host = expected(in, dtype);
                CHECK(largest_difference(ours.latents, host.latents) <= near);
                Denoised again = expected(in, dtype);  // pixels of these very latents
                decoder({{"latents", {3, 2, 3, C}}}, {{"latents", const_cast<std::byte *>(ours.latents.data.data())},
                                                      {"images", again.pixels.data.data()}});
                CHECK(ours.pixels.shape == host.pixels.shape && ours.pixels.data == again.pixels.data);
            }
            // The first of a shape is enqueued, the others are graphs; both share one plan, with 1 prompt or 2.
            CHECK(launches() - before == (prompts == 1 ? 2 : 3));
        }
        CHECK(s.backbone->contexts == 2 && s.decoder->contexts == 1);
    }
}

void test_graph_and_enqueue_give_equal_bits() {
    Setup graph(DType::bfloat16), plain(DType::bfloat16, false);
    const int before = launches();
    for (uint64_t seed = 1; seed < 4; ++seed) {
        // Another schedule of as many steps is the same graph.
        const DenoiseInputs in = inputs_of(seed, 2, true, {1, 0.9 / static_cast<double>(seed), 0});
        const Denoised a = graph.denoiser->run(in), b = plain.denoiser->run(in);
        CHECK(a.latents.data == b.latents.data && a.pixels.data == b.pixels.data);
    }
    CHECK(launches() - before == 2);
}

void test_a_refused_capture_falls_back() {
    fake<void(int)>("fake_refuse_capture")(1);
    Setup s(DType::float32);
    const int before = launches();
    for (uint64_t seed = 1; seed < 4; ++seed) {
        const DenoiseInputs in = inputs_of(seed, 1, false);
        const Denoised out = s.denoiser->run(in);
        CHECK(largest_difference(out.latents, expected(in, DType::float32).latents) <= 1e-5f);
        CHECK(out.pixels.data.empty());
    }
    CHECK(launches() == before);
    fake<void(int)>("fake_refuse_capture")(0);
}

void test_plans_are_bounded() {
    const auto live = fake<int()>("fake_live_allocations");
    const int before = live();
    {
        Setup s(DType::float32);
        int most = 0;
        for (size_t steps = 1; steps < 12; ++steps) {
            std::vector<double> sigmas;
            for (size_t i = 0; i <= steps; ++i)
                sigmas.push_back(1 - static_cast<double>(i) / static_cast<double>(steps));
            const DenoiseInputs in = inputs_of(steps, 1, true, sigmas);
            const Denoised out = s.denoiser->run(in);
            CHECK(largest_difference(out.latents, expected(in, DType::float32).latents) <= 1e-4f);
            most = std::max(most, live() - before);
        }
        CHECK(most == 4 * 3);  // tensors, scratch and pinned memory of four plans
    }
    CHECK(live() == before);
}

void test_threads() {
    Setup s(DType::float16);
    std::vector<Denoised> alone;
    for (uint64_t seed = 0; seed < 8; ++seed) alone.push_back(s.denoiser->run(inputs_of(seed, 2, true)));
    std::vector<std::thread> threads;
    std::vector<int> equal(8);
    for (uint64_t seed = 0; seed < 8; ++seed) {
        threads.emplace_back([&, seed] {
            for (int i = 0; i < 10; ++i) {
                const Denoised out = s.denoiser->run(inputs_of(seed, 2, true));
                equal[seed] +=
                    out.latents.data == alone[seed].latents.data && out.pixels.data == alone[seed].pixels.data;
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    CHECK(equal == std::vector<int>(8, 10));
}

void test_inputs_that_do_not_fit() {
    Setup s(DType::float32);
    const auto refused = [&](void (*change)(DenoiseInputs &)) {
        DenoiseInputs in = inputs_of(1, 2, true);
        change(in);
        try {
            s.denoiser->run(in);
        } catch (const Error &e) {
            return e.status == ARCFLOW_INTERNAL_ERROR;
        }
        return false;
    };
    CHECK(refused([](DenoiseInputs &in) { in.groups[0].images[0] = 3; }));
    CHECK(refused([](DenoiseInputs &in) { in.groups[0].images[0] = -1; }));
    CHECK(refused([](DenoiseInputs &in) { in.groups[0].images[0] = 1; }));
    CHECK(refused([](DenoiseInputs &in) { in.groups[0].prompts[1] = 2; }));
    CHECK(refused([](DenoiseInputs &in) { in.groups.pop_back(); }));
    CHECK(refused([](DenoiseInputs &in) { in.sigmas.pop_back(); }));
    CHECK(refused([](DenoiseInputs &in) { in.groups[1].states = random_tensor(1, {2, 7, TEXT}); }));
}

void test_an_engine_on_host_tensors() {
    const auto device = std::make_shared<const cuda::Device>();
    Part part = manifest_in(DType::float16).parts.at("backbone");
    const auto session = std::make_shared<FakeSession>("backbone", DType::float16, true);
    const auto engine = make_trt_engine(device, session, "backbone", part);
    for (const int64_t tokens : {6, 6, 9}) {
        Tensors in;
        in["latents"] = cast(random_tensor(1, {2, tokens, C}), DType::float16);
        in["encoder_hidden_states"] = cast(random_tensor(2, {2, 4, TEXT}), DType::float16);
        in["modulation"] = cast(random_tensor(3, {2, M}), DType::float16);
        in["image_rotary"] = random_tensor(4, {2, tokens, HALF_HEAD});
        in["text_rotary"] = random_tensor(5, {2, 4, HALF_HEAD});
        const Tensors out = engine->run(in);
        Tensors wanted = in;
        wanted["means"] = Tensor(DType::float16, {2, tokens, K, C});
        wanted["logweights"] = Tensor(DType::float16, {2, tokens, K, P});
        wanted["loggammas"] = Tensor(DType::float16, {2, tokens, K - 1, P});
        std::map<std::string, std::byte *> at;
        for (auto &[name, tensor] : wanted) at[name] = tensor.data.data();
        backbone(shapes_of(in), at, DType::float16);
        CHECK(out.size() == 3);
        for (const auto &[name, tensor] : out) {
            CHECK(tensor.shape == wanted.at(name).shape && tensor.data == wanted.at(name).data);
        }
    }
    CHECK(session->contexts == 2);  // one per shape
}

}  // namespace

int main() {
    test_agrees_with_the_host();
    test_graph_and_enqueue_give_equal_bits();
    test_a_refused_capture_falls_back();
    test_plans_are_bounded();
    test_threads();
    test_inputs_that_do_not_fit();
    test_an_engine_on_host_tensors();
    std::puts("ok");
    return 0;
}
