// Implements rows.h.
#include "rows.h"

#include <cstring>

#include "error.h"

namespace arcflow {

std::size_t bytes_of_row(const Tensor &tensor) {
    return tensor.shape[0] == 0 ? 0 : tensor.data.size() / static_cast<std::size_t>(tensor.shape[0]);
}

Tensor gather(const Tensor &tensor, const std::vector<int64_t> &places) {
    std::vector<int64_t> shape = tensor.shape;
    shape[0] = static_cast<int64_t>(places.size());
    Tensor out(tensor.dtype, shape);
    const std::size_t bytes = bytes_of_row(tensor);
    for (std::size_t i = 0; i < places.size(); ++i) {
        std::memcpy(out.data.data() + i * bytes, tensor.data.data() + static_cast<std::size_t>(places[i]) * bytes,
                    bytes);
    }
    return out;
}

void scatter(const Tensor &from, const std::vector<int64_t> &places, Tensor &to) {
    const std::size_t bytes = bytes_of_row(to);
    for (std::size_t i = 0; i < places.size(); ++i)
        std::memcpy(to.data.data() + static_cast<std::size_t>(places[i]) * bytes, from.data.data() + i * bytes, bytes);
}

Tensor join(const std::vector<const Tensor *> &tensors, const std::string &what) {
    std::vector<int64_t> shape = tensors.front()->shape;
    shape[0] = static_cast<int64_t>(tensors.size());
    Tensor out(tensors.front()->dtype, shape);
    const std::size_t bytes = bytes_of_row(out);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (tensors[i]->dtype != out.dtype || tensors[i]->shape != tensors.front()->shape) {
            throw engine_error(what + " must have one shape for all prompts, got " + tensors.front()->describe() +
                               " and " + tensors[i]->describe() + "; export the bundle again");
        }
        std::memcpy(out.data.data() + i * bytes, tensors[i]->data.data(), bytes);
    }
    return out;
}

}  // namespace arcflow
