// Gives OpenVINO's model of an int8 part (B15) the form that its CPU plugin computes with 8-bit kernels.
#pragma once

#include <memory>
#include <string>

#include <openvino/openvino.hpp>

namespace arcflow {

// Replaces every integer product of a part, with its cast and two scales, by a product of the input and the stored
// weight. Throws if one has another form than B15's. The plugin then quantises inputs itself, with the properties
// below.
void multiply_stored_weights(ov::Model &model, const std::string &part);

// One scale for each group of features of a token; this property turns 8-bit products on.
ov::AnyMap int8_properties();

}  // namespace arcflow
