// Opens the parts of a bundle, and checks the tensors that go in and come out.
#include "parts.h"

#include <algorithm>

#include "error.h"
#include "json_text.h"
#include "maths.h"

namespace arcflow {

Parts::Parts(const Bundle &bundle, std::unique_ptr<Backend> backend, bool keep)
    : bundle_(bundle), backend_(std::move(backend)), keep_(keep) {
    backend_->check(bundle_);
    if (!keep_) {
        bundle_.check_unchanged();
        return;
    }
    for (const auto &[name, part] : bundle_.manifest.parts) engines_[name] = backend_->open(bundle_, name);
    // A GPU generates noise in whole groups, so the channels of a token must be a multiple of one.
    const Latents &latents = bundle_.manifest.latents;
    if (latents.channels * latents.patch_size * latents.patch_size % noise_group == 0)
        denoiser_ = backend_->open_denoiser(bundle_);
    bundle_.check_unchanged();
}

Parts::Use Parts::use(const std::string &part, const Tensors *slots) {
    const auto found = bundle_.manifest.parts.find(part);
    if (found == bundle_.manifest.parts.end()) {
        throw bundle_error(bundle_.root.u8string() + ": the bundle has no part " + json_text(part) +
                           "; export it again");
    }
    Use use(found->first, found->second, slots);
    if (keep_) {
        use.engine_ = engines_.at(part).get();
    } else {
        use.alone_ = std::unique_lock(alone_);
        bundle_.check_unchanged();
        use.opened_ = backend_->open(bundle_, part);
        bundle_.check_unchanged();  // the bundle may have been replaced while the part was loaded
        use.engine_ = use.opened_.get();
    }
    return use;
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
