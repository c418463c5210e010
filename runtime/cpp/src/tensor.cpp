// Host tensors, and conversions between float32, float16 and bfloat16.
#include "tensor.h"

#include <cstring>
#include <utility>

#include "error.h"

namespace arcflow {
namespace {

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Multiply in place; both are at least 0. False if the product exceeds int64.
bool multiply(int64_t &product, int64_t factor) { return !__builtin_mul_overflow(product, factor, &product); }

std::string text_of(const std::vector<int64_t> &shape) {
    std::string text = "[";
    for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

// Apply `convert` to each element: From[count] -> To[count].
template <class From, class To, class Convert>
void convert_all(const Tensor &from, Tensor &to, Convert convert) {
    const From *in = from.as<From>();
    To *out = to.as<To>();
    for (int64_t i = 0, count = from.count(); i < count; ++i) out[i] = convert(in[i]);
}

}  // namespace

size_t size_of(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return 4;
        case DType::float16:
        case DType::bfloat16:
            return 2;
        case DType::int64:
            return 8;
        case DType::uint8:
            return 1;
    }
    throw Error(ARCFLOW_INTERNAL_ERROR, "a tensor's dtype is none of the known ones");
}

bool is_float(DType dtype) { return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16; }

const char *name_of(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return "float32";
        case DType::float16:
            return "float16";
        case DType::bfloat16:
            return "bfloat16";
        case DType::int64:
            return "int64";
        case DType::uint8:
            return "uint8";
    }
    throw Error(ARCFLOW_INTERNAL_ERROR, "a tensor's dtype is none of the known ones");
}

Tensor::Tensor(DType dtype_, std::vector<int64_t> shape_) : dtype(dtype_), shape(std::move(shape_)) {
    int64_t bytes = static_cast<int64_t>(size_of(dtype));
    bool fits = true;
    for (const int64_t size : shape) {
        if (size < 0) throw Error(ARCFLOW_INTERNAL_ERROR, "a tensor's sizes must be at least 0, got " + text_of(shape));
        fits = fits && multiply(bytes, size);
    }
    if (!fits) throw Error(ARCFLOW_OUT_OF_MEMORY, "a tensor of shape " + text_of(shape) + " does not fit in memory");
    data.resize(static_cast<size_t>(bytes));
}

int64_t Tensor::count() const { return static_cast<int64_t>(data.size() / size_of(dtype)); }

std::string Tensor::describe() const { return name_of(dtype) + text_of(shape); }

Tensor cast(Tensor tensor, DType dtype) {
    if (tensor.dtype == dtype) return tensor;
    if (!is_float(tensor.dtype) || !is_float(dtype)) {
        throw Error(ARCFLOW_INTERNAL_ERROR,
                    tensor.describe() + " cannot be cast to " + name_of(dtype) + "; only float types are cast");
    }
    Tensor out(dtype, tensor.shape);
    if (tensor.dtype == DType::float32) {
        if (dtype == DType::float16) convert_all<float, uint16_t>(tensor, out, to_half);
        if (dtype == DType::bfloat16) convert_all<float, uint16_t>(tensor, out, to_bfloat16);
    } else if (tensor.dtype == DType::float16) {
        if (dtype == DType::float32) convert_all<uint16_t, float>(tensor, out, from_half);
        if (dtype == DType::bfloat16)
            convert_all<uint16_t, uint16_t>(tensor, out, [](uint16_t x) { return to_bfloat16(from_half(x)); });
    } else {
        if (dtype == DType::float32) convert_all<uint16_t, float>(tensor, out, from_bfloat16);
        if (dtype == DType::float16)
            convert_all<uint16_t, uint16_t>(tensor, out, [](uint16_t x) { return to_half(from_bfloat16(x)); });
    }
    return out;
}

uint16_t to_half(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u | ((magnitude >> 13) & 0x3FFu);  // NaN
    } else if (magnitude >= 0x477FF000u) {
        half = 0x7C00u;  // 65520 and above round to infinity
    } else if (magnitude < 0x38800000u) {
        // Below 2^-14, halves are multiples of 2^-24, which is the spacing of float32 numbers in [0.5, 1): adding 0.5
        // rounds to such a multiple.
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
        // Add just under half of the last kept bit, or half if that bit is odd: this rounds to nearest, ties to even.
        // Then change the exponent's bias.
        half = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
}

float from_half(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 0x1Fu, mantissa = bits & 0x3FFu;
    if (exponent == 0x1F) return float_of(sign | 0x7F800000u | (mantissa << 13));
    if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
    return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
}

uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

float round_to(float value, DType dtype) {
    switch (dtype) {
        case DType::float32:
            return value;
        case DType::float16:
            return from_half(to_half(value));
        case DType::bfloat16:
            return from_bfloat16(to_bfloat16(value));
        default:
            throw Error(ARCFLOW_INTERNAL_ERROR, std::string("numbers cannot be rounded to ") + name_of(dtype));
    }
}

}  // namespace arcflow
