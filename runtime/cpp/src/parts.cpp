// Opens the parts of a bundle, and checks the tensors that go in and come out.
#include "parts.h"

#include <algorithm>

#include "error.h"
#include "json_text.h"
#include "maths.h"

namespace arcflow {

namespace {

const std::pair<const std::string, Part> &find_part(const Bundle &bundle, const std::string &name) {
    const auto found = bundle.manifest.parts.find(name);
    if (found == bundle.manifest.parts.end()) {
        throw bundle_error(bundle.root.u8string() + ": the bundle has no part " + json_text(name) +
                           "; export it again");
    }
    return *found;
}

MemoryMode choose_mode(const Bundle &bundle, Backend &backend, std::optional<MemoryMode> given) {
    backend.check(bundle);
    return given ? *given : backend.fitting_memory(bundle);
}

}  // namespace

Parts::Parts(const Bundle &bundle, std::unique_ptr<Backend> backend, std::optional<MemoryMode> mode)
    : bundle_(bundle), backend_(std::move(backend)), mode_(choose_mode(bundle_, *backend_, mode)) {
    for (const auto &[name, part] : bundle_.manifest.parts)
        if (keeps(name)) engines_[name] = backend_->open(bundle_, name);
    // A GPU generates noise in whole groups, so the channels of a token must be a multiple of one.
    const Latents &latents = bundle_.manifest.latents;
    if (latents.channels * latents.patch_size * latents.patch_size % noise_group == 0)
        denoiser_ = backend_->open_denoiser(bundle_, *this);
    bundle_.check_unchanged();
}

std::shared_ptr<Engine> Parts::borrow(const std::string &part) {
    if (keeps(part)) return {std::shared_ptr<Engine>(), engines_.at(part).get()};  // this object's, not counted
    // Declared in this order, the engine is freed before the lock is released.
    struct Turn {
        std::unique_lock<std::mutex> lock;
        std::unique_ptr<Engine> engine;
    };
    const auto turn = std::make_shared<Turn>();
    turn->lock = std::unique_lock(turn_);
    bundle_.check_unchanged();
    turn->engine = backend_->open(bundle_, part);
    bundle_.check_unchanged();  // the bundle may have been replaced while the part was loaded
    return {turn, turn->engine.get()};
}

Parts::Use Parts::use(const std::string &part, const Tensors *slots) {
    const auto &[name, spec] = find_part(bundle_, part);
    return {name, spec, slots, borrow(part)};
}

Tensor Parts::Use::cast(const std::string &input, Tensor tensor) const {
    const auto found =
        std::find_if(part_.inputs.begin(), part_.inputs.end(), [&](const TensorSpec &s) { return s.name == input; });
    if (found == part_.inputs.end())
        throw bundle_error(name_ + ": the manifest lists no input " + json_text(input) + "; export the bundle again");
    return arcflow::cast(std::move(tensor), found->dtype);
}

Tensors Parts::Use::run(const Tensors &inputs, Stopwatch &watch) {
    const auto timed = watch("engines");
    return slots_ == nullptr ? engine_->run(inputs) : engine_->run_with_slots(inputs, *slots_);
}

Tensor Parts::Use::take(Tensors &outputs, const std::string &name, const std::vector<int64_t> &shape) const {
    const auto found = outputs.find(name);
    if (found == outputs.end())
        throw engine_error(name_ + ": the engine returned no output " + json_text(name) + "; export the bundle again");
    Tensor tensor = std::move(found->second);
    const bool fits = std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end(),
                                 [](int64_t expected, int64_t got) { return expected < 0 || expected == got; });
    if (!fits) {
        std::string expected;
        for (const int64_t size : shape)
            expected += (expected.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
        throw engine_error(name_ + ": output " + json_text(name) + " must have shape [" + expected + "], got " +
                           tensor.describe() + "; export the bundle again");
    }
    return tensor;
}

}  // namespace arcflow
