// Tests of the core against facts from elsewhere: published test vectors, torch's numbers, IEEE 754 and float64.
// tests/test_cpp_core.py compares it with the Python runtime.
#include "core_test.h"

#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "json_text.h"
#include "recent.h"
#include "sha256.h"
#include "tensor.h"

using arcflow::DType;
using arcflow::Tensor;

namespace {

// SHA-256: FIPS 180-2, appendix B.
void test_sha256() {
    CHECK(arcflow::sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(arcflow::sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    const std::string million(1000000, 'a');
    const std::string expected = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
    CHECK(arcflow::sha256(million) == expected);
    const Folder folder;
    write(folder.path() / "a", million);
    CHECK(arcflow::sha256_file(folder.path() / "a") == expected);
    // Longer than one block of 4 MiB, and not a multiple.
    const std::string long_text(9999999, 'x');
    write(folder.path() / "x", long_text);
    CHECK(arcflow::sha256_file(folder.path() / "x") == arcflow::sha256(long_text));
    fails([&] { arcflow::sha256_file(folder.path() / "none"); }, "none cannot be read; check its permissions");
}

void test_recent_values() {
    arcflow::Recent<char, int> cache(3, 10);
    const auto kept = [&] {
        std::string found;
        for (const char key : {'a', 'b', 'c', 'd'})
            if (cache.get(key)) found += key;
        return found;
    };
    for (const char key : {'a', 'b', 'c'}) cache.put(key, std::make_shared<int>(key), 4);
    CHECK(kept() == "bc");  // by bytes
    cache.put('b', std::make_shared<int>(1), 6);
    CHECK(kept() == "bc" && *cache.get('b') == 1);
    cache.put('d', std::make_shared<int>(2), 11);
    CHECK(kept() == "d");  // the last one stays
    for (const char key : {'a', 'b', 'c', 'd'}) cache.put(key, std::make_shared<int>(key), 1);
    CHECK(kept() == "bcd");  // by number
}

// The value of a 16-bit float by the definition of IEEE 754, in float64; `bias` is the exponent's.
double defined(uint16_t bits, int mantissa_bits, int bias) {
    const int exponent_bits = 15 - mantissa_bits, exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1)
        return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    const int scale = std::max(exponent, 1) - bias - mantissa_bits;
    return sign * std::ldexp(mantissa + (exponent ? 1 << mantissa_bits : 0), scale);
}

// Every value survives a round trip, and each number between two neighbours goes to the nearer one, halfway to the even
// one.
void test_rounding(uint16_t (*to)(float), float (*from)(uint16_t), int mantissa_bits, int bias) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto narrow = static_cast<uint16_t>(bits);
        const double value = defined(narrow, mantissa_bits, bias);
        if (std::isnan(value)) {
            CHECK(std::isnan(from(narrow)) && std::isnan(from(to(from(narrow)))));
            continue;
        }
        CHECK(static_cast<double>(from(narrow)) == value && to(from(narrow)) == narrow);
        CHECK(std::signbit(from(narrow)) == ((narrow & 0x8000) != 0));
        // The neighbour away from zero; behind the largest number, where the format's next would be.
        if (std::isinf(value)) continue;
        const auto next = static_cast<uint16_t>(narrow + 1);
        double after = defined(next, mantissa_bits, bias);
        if (std::isinf(after)) after = 2 * value - defined(static_cast<uint16_t>(narrow - 1), mantissa_bits, bias);
        if (std::abs(after) > static_cast<double>(std::numeric_limits<float>::max())) continue;
        const auto middle = static_cast<float>((value + after) / 2);  // exact, as float32 has more bits
        CHECK(to(middle) == (narrow % 2 == 0 ? narrow : next));
        CHECK(to(std::nextafter(middle, 0.0f)) == narrow);
        CHECK(to(std::nextafter(middle, static_cast<float>(after))) == next);
    }
}

void test_tensors() {
    test_rounding(arcflow::to_half, arcflow::from_half, 10, 15);
    test_rounding(arcflow::to_bfloat16, arcflow::from_bfloat16, 7, 127);
    CHECK(arcflow::round_to(3504.9f, DType::bfloat16) == 3504.0f);
    CHECK(arcflow::round_to(0.1f, DType::float32) == 0.1f);
    Tensor tensor(DType::float32, {2, 3});
    CHECK(tensor.describe() == "float32[2, 3]" && tensor.count() == 6 && tensor.as<float>()[5] == 0);
    tensor.as<float>()[5] = 1.0009765625f;  // the half after 1, and half way between bfloat16's 1 and its next
    CHECK(arcflow::from_half(arcflow::cast(tensor, DType::float16).as<uint16_t>()[5]) == 1.0009765625f);
    CHECK(arcflow::from_bfloat16(
              arcflow::cast(arcflow::cast(tensor, DType::float16), DType::bfloat16).as<uint16_t>()[5]) == 1.0f);
    const std::byte *data = tensor.data.data();
    CHECK(arcflow::cast(std::move(tensor), DType::float32).data.data() == data);
    CHECK(Tensor(DType::int64, {}).count() == 1 && Tensor(DType::uint8, {0, 5}).count() == 0);
    fails([] { arcflow::cast(Tensor(DType::int64, {1}), DType::float32); }, "int64[1] cannot be cast to float32");
    fails([] { Tensor(DType::float32, {int64_t{1} << 31, int64_t{1} << 31}); }, "does not fit in memory");
    fails([] { Tensor(DType::float32, {-1}); }, "at least 0, got [-1]");
}

// Numbers and canonical text as Python's json.dumps writes them.
void test_texts() {
    CHECK(arcflow::json_text(3.2) == "3.2" && arcflow::json_text(10000.0) == "10000.0" &&
          arcflow::json_text(1e-6) == "1e-06");
    CHECK(arcflow::json_text(1e16) == "1e+16" && arcflow::json_text(-0.0) == "-0.0" &&
          arcflow::json_text(-2.5e-300) == "-2.5e-300");
    CHECK(arcflow::json_text(3.2f) == "3.2" && arcflow::json_text("it's\n") == "\"it's\\n\"");
    const std::string text =
        "{\"a/\": {\"b\": 1, \"a\": -2.5}, \"\": 0, \"\\u00e9\\u007f\\\"\\\\\\n\\u0001\\ud83d\\ude00\": "
        "[1e-06, 1e16, 3.2, 10000.0, 1e15, 123456789012345680.0, 0.0001, 0.00001, -0.0, 5e-324, "
        "1.7976931348623157e308, -1, 18446744073709551615, 100000, 1e22, 1e23, 0.1, true, false, null, {}, []]}";
    CHECK(arcflow::canonical(arcflow::read_json(text, where)) ==
          "{\"\":0,\"a/\":{\"a\":-2.5,\"b\":1},\"\\u00e9\\u007f\\\"\\\\\\n\\u0001\\ud83d\\ude00\":"
          "[1e-06,1e+16,3.2,10000.0,1000000000000000.0,1.2345678901234568e+17,0.0001,1e-05,-0.0,5e-324,"
          "1.7976931348623157e+308,-1,18446744073709551615,100000,1e+22,1e+23,0.1,true,false,null,{},[]]}");
}

// Hostile JSON is refused quickly and without deep recursion.
void test_json() {
    const auto read = [](const std::string &text) { return [text] { arcflow::read_json(text, where); }; };
    const auto nested = [](size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
    arcflow::canonical(arcflow::read_json(nested(65), where));
    fails(read(nested(66)), "manifest.json must not be nested deeper than 64 levels");
    fails(read(std::string(10 << 20, '[')), "manifest.json must not be nested deeper than 64 levels");
    fails(read("{\"a\": {\"b\": 1, \"b\": 2}}"), "manifest.json: an object has the key \"b\" twice");
    arcflow::read_json("[{\"a\": {\"a\": 1}}, {\"a\": 2}]", where);
    for (const char *bad : {"", "{", "[1,]", "{} {}", "nan", "[NaN]", "[Infinity]", "[1e400]", "'a'", "[01]",
                            "\"\x80\"", "\"\\ud800\"", "\"\n\"", "// {}"}) {
        fails(read(bad), "manifest.json is not valid JSON (");
    }
}

}  // namespace

int main() {
    test_sha256();
    test_recent_values();
    test_tensors();
    test_texts();
    test_json();
    test_bundle();
    test_maths();
    test_request();
    test_negative_prompts();
    std::puts("ok");
    return 0;
}
