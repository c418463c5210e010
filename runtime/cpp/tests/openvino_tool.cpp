// Runs engines and tokenizers for tests/test_cpp_openvino.py; stdin and stdout are little-endian bytes.
//   openvino_tool run BUNDLE PART    each input in the manifest's order as rank, sizes (int64) and data; outputs
//   likewise openvino_tool ids BUNDLE NAME    texts each ended by a zero byte; a line of ids for each, after one for
//   the prefix
//                                    and one for the suffix
// Prints the library's error and returns 1 where there is one.
#include <cstdio>
#include <iostream>

#include "engine.h"
#include "error.h"
#include "tokenizer.h"

namespace {

arcflow::Tensor read_tensor(arcflow::DType dtype) {
    int64_t rank = 0;
    std::cin.read(reinterpret_cast<char *>(&rank), sizeof rank);
    std::vector<int64_t> shape(static_cast<size_t>(rank));
    std::cin.read(reinterpret_cast<char *>(shape.data()), rank * static_cast<int64_t>(sizeof(int64_t)));
    arcflow::Tensor tensor(dtype, shape);
    std::cin.read(reinterpret_cast<char *>(tensor.data.data()), static_cast<std::streamsize>(tensor.data.size()));
    return tensor;
}

void write_tensor(const arcflow::Tensor &tensor) {
    const auto rank = static_cast<int64_t>(tensor.shape.size());
    std::cout.write(reinterpret_cast<const char *>(&rank), sizeof rank);
    std::cout.write(reinterpret_cast<const char *>(tensor.shape.data()), rank * static_cast<int64_t>(sizeof(int64_t)));
    std::cout.write(reinterpret_cast<const char *>(tensor.data.data()),
                    static_cast<std::streamsize>(tensor.data.size()));
}

void print_ids(const std::vector<int64_t> &ids) {
    for (const int64_t id : ids) std::cout << id << ' ';
    std::cout << '\n';
}

void run(const arcflow::Bundle &bundle, const std::string &part) {
    const auto backend = arcflow::make_backend("openvino", 1);
    backend->check(bundle);
    const auto engine = backend->open(bundle, part);
    arcflow::Tensors inputs;
    for (const arcflow::TensorSpec &spec : bundle.manifest.parts.at(part).inputs)
        inputs.emplace(spec.name, read_tensor(spec.dtype));
    const arcflow::Tensors outputs = engine->run(inputs);
    for (const arcflow::TensorSpec &spec : bundle.manifest.parts.at(part).outputs) write_tensor(outputs.at(spec.name));
}

void ids(const arcflow::Bundle &bundle, const std::string &name) {
    const auto tokenizers = arcflow::open_tokenizers(bundle);
    const auto &tokenizer = tokenizers.at(name);
    print_ids(tokenizer->prefix);
    print_ids(tokenizer->suffix);
    for (std::string text; std::getline(std::cin, text, '\0');) print_ids(tokenizer->ids(text));
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 4) {
        std::fputs("usage: openvino_tool run|ids BUNDLE NAME\n", stderr);
        return 2;
    }
    try {
        const arcflow::Bundle bundle = arcflow::Bundle::open(argv[2], false);
        if (std::string(argv[1]) == "run") run(bundle, argv[3]);
        else ids(bundle, argv[3]);
    } catch (const std::exception &e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
    return 0;
}
