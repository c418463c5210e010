// Fills in the weights of engines that were built without weights.
#include "trt_refit.h"

#include <cstring>
#include <list>
#include <map>

#include "error.h"
#include "json_text.h"
#include "mapped_file.h"
#include "onnx_graph.h"

namespace arcflow {
namespace {

constexpr const char *advice = "; build the engine again with `arcflow build`";
constexpr uintptr_t alignment = 8;  // alignment of the largest element type

// Gives pointers to a part's constants, in the mapped weights file or in aligned copies. They are valid as long as this
// object.
class Weights {
public:
    Weights(const Bundle &bundle, const std::string &part)
        : spec_(bundle.manifest.parts.at(part)),
          part_(part),
          initializers_(read_initializers(bundle, part)),
          file_(bundle.path(spec_.weights), bundle.manifest.files.at(spec_.weights).bytes) {}

    // The constant `name`, which must have the type and count in `wanted`. Throws Error.
    const void *find(const std::string &name, const WeightSpec &wanted) {
        const auto found = initializers_.find(name);
        if (found == initializers_.end()) {
            throw engine_error(part_ + ": " + spec_.graph + " lacks weights of the engine, such as " + json_text(name) +
                               "; build it again with `arcflow build`, without --strip-weights");
        }
        const Initializer &tensor = found->second;
        if (tensor.type != wanted.type || tensor.count != wanted.count) {
            throw engine_error(part_ + ": weight " + json_text(name) + " must have " + std::to_string(wanted.count) +
                               " values of ONNX's type " + std::to_string(wanted.type) + ", got " +
                               std::to_string(tensor.count) + " of type " + std::to_string(tensor.type) + " in " +
                               spec_.graph + advice);
        }
        const std::byte *data = tensor.is_external ? external(name, tensor) : raw(name, tensor);
        if (reinterpret_cast<uintptr_t>(data) % alignment == 0) return data;
        const auto bytes = static_cast<size_t>(*tensor.size());
        std::vector<uint64_t> &copy = copies_.emplace_back(bytes / sizeof(uint64_t) + 1);
        std::memcpy(copy.data(), data, bytes);
        return copy.data();
    }

private:
    const std::byte *raw(const std::string &name, const Initializer &tensor) const {
        if (!tensor.is_raw || tensor.size() != tensor.raw.size()) throw damaged(name, tensor, tensor.raw.size());
        return reinterpret_cast<const std::byte *>(tensor.raw.data());
    }

    const std::byte *external(const std::string &name, const Initializer &tensor) const {
        const auto size = tensor.size();
        const uint64_t rest = file_.bytes - tensor.offset;  // check_external_data has checked the offset
        if (!size || *size > rest || tensor.bytes.value_or(*size) != *size)
            throw damaged(name, tensor, tensor.bytes.value_or(rest));
        return file_.data + tensor.offset;
    }

    Error damaged(const std::string &name, const Initializer &tensor, uint64_t got) const {
        const auto size = tensor.size();
        return engine_error(part_ + ": weight " + json_text(name) + " must have " +
                            (size ? std::to_string(*size) + " bytes" : "a type that a bundle may have") + ", got " +
                            std::to_string(got) + " bytes of type " + std::to_string(tensor.type) + " in " +
                            (tensor.is_external ? spec_.weights : spec_.graph) + "; export the bundle again");
    }

    const Part &spec_;
    const std::string &part_;
    std::map<std::string, Initializer> initializers_;
    MappedFile file_;
    std::list<std::vector<uint64_t>> copies_;
};

}  // namespace

void check_can_refit(const TrtLibrary &library, TrtFlavour flavour, const std::string &part) {
    if (library.create_refitter != nullptr) return;
    throw engine_error(part + ": the engine has no weights, and " + library.file + " has no function " +
                       "createInferRefitter_INTERNAL to fill them in, as lean libraries do not; install the whole "
                       "library of " +
                       name_of(flavour) + ", or build the engine without --strip-weights");
}

void refit(TrtRefitter &refitter, const Bundle &bundle, const std::string &part) {
    const std::string &file = bundle.manifest.parts.at(part).weights;
    Weights weights(bundle, part);
    for (const std::string &name : refitter.weights()) {
        const WeightSpec wanted = refitter.spec(name);
        if (!refitter.set(name, wanted, weights.find(name, wanted))) {
            throw engine_error(part + ": weight " + json_text(name) + " of " + file + " does not fit the engine" +
                               refitter.said() + advice);
        }
    }
    const std::vector<std::string> missing = refitter.missing();
    if (!missing.empty()) {
        throw engine_error(part + ": " + file + " lacks weights of the engine, such as " + json_text(missing.front()) +
                           advice);
    }
    if (!refitter.refit())
        throw engine_error(part + ": the weights of " + file + " cannot be filled in" + refitter.said());
}

}  // namespace arcflow
