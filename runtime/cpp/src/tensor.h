// A dense host array whose dtype is known at run time, and conversions between float types (to nearest, ties to even).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace arcflow {

enum class DType { float32, float16, bfloat16, int64, uint8 };

size_t size_of(DType dtype);
const char *name_of(DType dtype);
bool is_float(DType dtype);  // float32, float16 or bfloat16

// Row-major, contiguous. A copy copies the data.
struct Tensor {
    DType dtype = DType::float32;
    std::vector<int64_t> shape;
    std::vector<std::byte> data;

    Tensor() = default;
    Tensor(DType dtype,
           std::vector<int64_t> shape);  // filled with zeros; throws Error if a size is negative or the total overflows

    int64_t count() const;  // number of elements
    template <class T> T *as() { return reinterpret_cast<T *>(data.data()); }
    template <class T> const T *as() const { return reinterpret_cast<const T *>(data.data()); }
    std::string describe() const;  // "float32[1, 16, 64]"
};

// Convert to another float dtype. Moves `tensor` through if it has this dtype already.
Tensor cast(Tensor tensor, DType dtype);

uint16_t to_half(float value);
float from_half(uint16_t bits);
uint16_t to_bfloat16(float value);
float from_bfloat16(uint16_t bits);

// `value` rounded to float16 or bfloat16 and widened again; float32 is returned as it is.
float round_to(float value, DType dtype);

}  // namespace arcflow
