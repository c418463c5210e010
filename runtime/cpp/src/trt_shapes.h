// Shapes of the parts' inputs and outputs (rule B9 of docs/bundle.md): sizes of a job -> shapes by name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "manifest.h"
#include "trt_record.h"
#include "trt_session.h"

namespace arcflow {

// The sizes of a job: `batch` images of `height` x `width` tokens, with `text_tokens` text tokens each, in `steps`
// steps.
struct DenoiseShape {
    int64_t batch, height, width, text_tokens, steps;

    int64_t image_tokens() const { return height * width; }
    bool operator==(const DenoiseShape &other) const;
};

// Each throws Error if the manifest leaves a size open that rule B9 fixes, or overflows.
Shapes conditioner_inputs(const Manifest &manifest, int64_t batch, int64_t steps);
Shapes conditioner_outputs(const Manifest &manifest, int64_t batch, int64_t steps);
Shapes backbone_inputs(const Manifest &manifest, const DenoiseShape &size);
Shapes backbone_outputs(const Manifest &manifest, const DenoiseShape &size);
Shapes decoder_inputs(const Manifest &manifest, const DenoiseShape &size);
Shapes decoder_outputs(const Manifest &manifest, const DenoiseShape &size);

// For one prompt with `text_tokens` states; the encoder also sees the template's tokens.
Shapes encoder_inputs(const Manifest &manifest, const std::string &part, int64_t text_tokens);
Shapes encoder_outputs(const Manifest &manifest, const std::string &part, int64_t text_tokens);

// The first of an engine's profiles that takes inputs of these shapes; -1, and the reason in `wrong`, if none does.
using Profile = std::map<std::string, ProfileShapes>;
int32_t fitting_profile(const std::string &part, const std::vector<Profile> &profiles, const Shapes &inputs,
                        std::string &wrong);

// The entry `name` of a part's inputs or outputs. Throws Error if there is none.
const TensorSpec &spec_of(const std::vector<TensorSpec> &specs, const std::string &name, const std::string &part);

// Bytes of a tensor. Throws Error, which `what` names, if a size is negative or the product overflows.
size_t bytes_of(const std::vector<int64_t> &shape, DType dtype, const std::string &what);

// A shape for error messages: "[1, 16, 64]".
std::string text_of(const std::vector<int64_t> &shape);

}  // namespace arcflow
