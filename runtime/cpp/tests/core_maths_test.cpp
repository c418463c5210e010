// Tests of noise, schedule, rotary tables and update against torch and float64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "core_test.h"
#include "maths.h"
#include "sha256.h"

namespace {

using arcflow::DType;
using arcflow::Tensor;

// SHA-256 of torch.randn(count, generator=torch.Generator().manual_seed(seed)) of torch 2.13 on a CPU with AVX2.
void test_noise() {
    struct Case {
        uint64_t seed;
        size_t count;
        const char *sha256;
    };
    for (const Case &c : {
             Case{0, 5, "210d4d6ce714b81456f146a6465cfc9dc80bb7bc33efdb12c6bf76d9c30b5431"},
             Case{42, 5, "af33577995d9ae23a3bed3a80bfb2c79db2803eb7e55c090eca9e39fafc79a60"},
             Case{42, 15, "8db9a5331024e1ef6641fb105e2cef40e44a0fc808368674795ee3b09096fe02"},
             Case{7, 16, "c14326a9b25c0a68d010c5bca1aa4bb33028c08e914d39d36c5074d7b312221a"},
             Case{42, 17, "2ae700cddb7c7bef2727381a13feed04c35ad67793a9695d51da507ac5c359f2"},
             Case{UINT64_MAX, 100, "e508440be3284b2e1c5c11889e81abdc1f03580537d8106a1938b1cd760c8a5a"},
             Case{1234567890123, 100, "f970444258db3717764aba1369b42006bea5e2054d3a580a53221b13efef8138"},
             Case{42, 40000, "50469934153700f7e5d255f509ce83b5fae17be7637b8a5c1677e213731f4658"},
             Case{3, 40001, "b3f85867263e8fe0cd9c79e45e29c2ea9f4ef57640245921972066876ac558dc"},
         }) {
        std::vector<float> noise(c.count);
        arcflow::randn(c.seed, c.count, noise.data());
        CHECK(arcflow::sha256({reinterpret_cast<const char *>(noise.data()), 4 * c.count}) == c.sha256);
    }
    const arcflow::Latents latents{3, 2, 8, 16, 4};
    const Tensor packed = arcflow::packed_noise({5}, 2, latents, 4, 6);
    CHECK(packed.describe() == "float32[2, 6, 12]");
    std::vector<float> noise(2 * 3 * 4 * 6);
    arcflow::randn(5, noise.size(), noise.data());
    for (size_t b = 0; b < 2; ++b)
        for (size_t c = 0; c < 3; ++c)
            for (size_t y = 0; y < 4; ++y)
                for (size_t x = 0; x < 6; ++x) {
                    const size_t token = y / 2 * 3 + x / 2, channel = c * 4 + y % 2 * 2 + x % 2;
                    CHECK(packed.as<float>()[(b * 6 + token) * 12 + channel] == noise[((b * 3 + c) * 4 + y) * 6 + x]);
                }
    const Tensor each = arcflow::packed_noise({5, 6}, 2, latents, 4, 6),
                 alone = arcflow::packed_noise({6}, 1, latents, 4, 6);
    CHECK(std::equal(alone.data.begin(), alone.data.end(), each.data.begin() + 4 * 6 * 12));
    // Image i of a batch with one seed begins behind the numbers of the images before it; of 64 bits 32 count.
    const auto same = [](const std::vector<arcflow::NoiseStream> &found,
                         const std::vector<std::pair<uint32_t, int64_t>> &expected) {
        return std::equal(found.begin(), found.end(), expected.begin(), expected.end(),
                          [](const auto &a, const auto &b) { return a.seed == b.first && a.first == b.second; });
    };
    CHECK(same(arcflow::noise_streams({5}, 3, 96), {{5, 0}, {5, 96}, {5, 192}}));
    CHECK(same(arcflow::noise_streams({5, uint64_t{1} << 32 | 7, 5}, 3, 96), {{5, 0}, {7, 0}, {5, 0}}));
    CHECK(same(arcflow::noise_streams({9}, 1, 96), {{9, 0}}));
    fails([&] { arcflow::packed_noise({1, 2}, 3, latents, 4, 6); }, "noise needs one seed, or one per image, 3, got 2");
    fails([&] { arcflow::packed_noise({1}, 1, latents, 3, 6); }, "latent sizes must be multiples of 2, got 3 x 6");
}

void test_schedule() {
    const arcflow::Schedule schedule{3.2, 1.0, 2};
    const std::vector<double> two = arcflow::sigmas(2, schedule, 1);
    // sigma(1/2) = 1.6 / 2.1.
    CHECK(two.size() == 3 && two[0] == 1 && std::abs(two[1] - 1.6 / 2.1) < 1e-15 && two[2] == 0);
    const auto seen = [&](arcflow::Family family, DType dtype) {
        return arcflow::conditioning_timesteps(two, family, dtype, arcflow::Sampler::momentum).at(1);
    };
    CHECK(seen(arcflow::Family::flux, DType::bfloat16) == 760.0f);
    CHECK(seen(arcflow::Family::qwen_image, DType::bfloat16) == 761.71875f);
    CHECK(seen(arcflow::Family::flux, DType::float32) == static_cast<float>(1.6 / 2.1) * 1000.0f);
    CHECK(arcflow::conditioning_guidance(3.5f, DType::bfloat16) == 3504.0f);
    CHECK(arcflow::conditioning_guidance(3.5f, DType::float32) == 3500.0f);
    fails([&] { arcflow::sigmas(0, schedule, 1); }, "num_inference_steps must be at least 1, got 0; the default is 2");
}

// Each pair of numbers is cosine and sine of the position's angle, to half an ulp of numbers below 1.
void test_rotary() {
    const arcflow::Manifest q = parsed(qwen_manifest());
    const Tensor image = arcflow::image_rotary(q, 3, 4), text = arcflow::text_rotary(q, 3, 4, 2);
    CHECK(image.describe() == "float32[2, 12, 16]" && text.describe() == "float32[2, 2, 16]");
    const auto is = [](const Tensor &table, int64_t token, int64_t i, double angle) {
        const float *row = table.as<float>() + token * 16 + i;
        const double cosine = row[0], sine = row[table.count() / 2];
        return std::abs(cosine - std::cos(angle)) <= 0x1p-24 && std::abs(sine - std::sin(angle)) <= 0x1p-24;
    };
    // Token (2, 1) of 3 x 4 stands at y = 2 - 2 = 0, x = 1 - 2 = -1; of the first axis all angles are 0.
    CHECK(is(image, 9, 3, 0) && is(image, 9, 4, 0) && is(image, 9, 10, -1) &&
          is(image, 9, 11, -std::pow(1e4, -1.0 / 6)));
    CHECK(is(image, 0, 4, -2) && is(text, 1, 0, 3) && is(text, 1, 10, 3));
    const arcflow::Manifest f = parsed(flux_manifest());  // positions (0, y, x), rounded to bfloat16
    const Tensor rounded = arcflow::image_rotary(f, 3, 4);
    const auto cosine_of_x3 = static_cast<float>(std::cos(3.0));
    CHECK(rounded.as<float>()[3 * 16 + 10] == arcflow::round_to(cosine_of_x3, DType::bfloat16));
    const Tensor still = arcflow::text_rotary(f, 3, 4, 1);
    CHECK(std::all_of(still.as<float>(), still.as<float>() + 16, [](float x) { return x == 1; }));
    CHECK(std::all_of(still.as<float>() + 16, still.as<float>() + 32, [](float x) { return x == 0; }));
}

Tensor random(std::mt19937 &generator, std::vector<int64_t> shape, float spread) {
    Tensor tensor(DType::float32, std::move(shape));
    std::uniform_real_distribution<float> uniform(-spread, spread);
    for (int64_t i = 0; i < tensor.count(); ++i) tensor.as<float>()[i] = uniform(generator);
    return tensor;
}

// Compare one step, with heads in `dtype` and P = `sub_pixels`, with float64.
void test_update(DType dtype, int64_t modes, int64_t channels, int64_t sub_pixels) {
    std::mt19937 generator(1);
    const Tensor start = random(generator, {2, 3, channels}, 4);
    Tensor latents = start;
    const auto head = [&](std::vector<int64_t> shape, float spread) {
        return arcflow::cast(random(generator, std::move(shape), spread), dtype);
    };
    const Tensor means = head({2, 3, modes, channels}, 3), logweights = head({2, 3, modes, sub_pixels}, 4);
    Tensor loggammas = head({2, 3, modes - 1, sub_pixels}, 20);
    for (int64_t i = 0; i < loggammas.count(); i += 5) std::fill_n(loggammas.data.begin() + i * 2, 2, std::byte{0});
    const double sigma = 1, next = 1.6 / 2.1, step = sigma - next;
    arcflow::update(latents, means, logweights, loggammas, sigma, next);
    const auto exact = [](const Tensor &tensor) {
        const Tensor floats = arcflow::cast(tensor, DType::float32);
        return std::vector<double>(floats.as<float>(), floats.as<float>() + floats.count());
    };
    const auto x = exact(start), m = exact(means), w = exact(logweights), g = exact(loggammas);
    for (int64_t i = 0; i < latents.count(); ++i) {
        const int64_t token = i / channels, c = i % channels, p = c % sub_pixels;
        double sum = 0, velocity = 0, size = 0;
        for (int64_t k = 0; k < modes; ++k)
            sum += std::exp(w[static_cast<size_t>((token * modes + k) * sub_pixels + p)]);
        for (int64_t k = 0; k < modes; ++k) {
            const double gamma = k == 0 ? 0 : g[static_cast<size_t>((token * (modes - 1) + k - 1) * sub_pixels + p)];
            const double z = gamma * step, phi = z == 0 ? 1 : std::expm1(z) / z;
            const double weight = std::exp(w[static_cast<size_t>((token * modes + k) * sub_pixels + p)]) / sum;
            const double term = step * weight * phi * m[static_cast<size_t>((token * modes + k) * channels + c)];
            velocity += term;
            size += std::abs(term);
        }
        const double expected = x[static_cast<size_t>(i)] - velocity;
        // Half an ulp, 2^-24, of each term for its coefficient, its product and up to K sums, and of the result.
        const double bound = 0x1p-24 * ((static_cast<double>(modes) + 2) * size + std::abs(expected));
        CHECK(std::abs(static_cast<double>(latents.as<float>()[i]) - expected) <= bound);
    }
}

void test_updates() {
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) test_update(dtype, 16, 64, 4);
    test_update(DType::float32, 3, 15, 1);
    test_update(DType::float32, 1, 18, 9);
    Tensor latents(DType::float32, {1, 2, 8});
    const Tensor means(DType::float32, {1, 2, 3, 8}), weights(DType::float32, {1, 2, 3, 4}),
        gammas(DType::float32, {1, 2, 2, 4});
    fails([&] { arcflow::update(latents, means, weights, weights, 1, 0); },
          "backbone: loggammas must be float32[1, 2, 2, 4] in a float type, got float32[1, 2, 3, 4]; export the bundle "
          "again");
    fails([&] { arcflow::update(latents, Tensor(DType::int64, {1, 2, 3, 8}), weights, gammas, 1, 0); },
          "backbone: means must be float32[1, 2, 3, 8] in a float type, got int64[1, 2, 3, 8]");
    fails([&] { arcflow::update(latents, means, means, gammas, 1, 0); }, "loggammas must be float32[1, 2, 2, 8]");
    Tensor broken = weights;
    broken.as<float>()[5] = std::numeric_limits<float>::quiet_NaN();
    arcflow::update(latents, means, broken, gammas, 1, 0);
    CHECK(std::isnan(latents.as<float>()[1]) && std::isnan(latents.as<float>()[5]) && latents.as<float>()[0] == 0);
}

}  // namespace

void test_maths() {
    test_noise();
    test_schedule();
    test_rotary();
    test_updates();
}
