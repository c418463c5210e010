// Rows of tensors along their first axis: take some out, put them back, join tensors of one row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tensor.h"

namespace arcflow {

std::size_t bytes_of_row(const Tensor &tensor);

// The rows of `tensor` with these indices.
Tensor gather(const Tensor &tensor, const std::vector<int64_t> &places);

// Write the rows of `from` to these rows of `to`.
void scatter(const Tensor &from, const std::vector<int64_t> &places, Tensor &to);

// Join tensors of shape [1, ...]. Throws Error, which `what` names, if shapes or dtypes differ.
Tensor join(const std::vector<const Tensor *> &tensors, const std::string &what);

}  // namespace arcflow
