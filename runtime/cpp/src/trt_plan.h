// The GPU's work for one request shape: buffers, contexts and, once captured, a CUDA graph.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "trt_kernel.h"
#include "trt_session.h"

namespace arcflow {

// Dtypes of the backbone's tensors, from the manifest.
struct PlanTypes {
    // Throws Error if the update kernel cannot take the backbone's heads.
    explicit PlanTypes(const Part &backbone);

    DType latents, states, modulation, image_rotary, text_rotary, heads;
};

// The shape of a request; requests with equal shapes share a plan.
struct PlanShape {
    PlanShape(const DenoiseInputs &inputs, const Latents &latents);

    int64_t batch, tokens, channels, height, width;  // height and width of the decoder's grid
    size_t steps;
    bool decode;
    std::vector<std::pair<int64_t, int64_t>> groups;  // number of images, number of text tokens

    bool operator==(const PlanShape &other) const;
};

// Check that a request's tensors fit together, so that a plan's copies stay within their buffers. Throws Error.
void check_inputs(const DenoiseInputs &inputs);

// Used by one thread at a time. Images are stored in group order. The caller has checked the inputs, and waits for the
// stream before it frees the plan.
class Plan {
public:
    // Throws Error if an engine does not take this shape, or there is no memory.
    Plan(PlanShape shape, const DenoiseInputs &inputs, const PlanTypes &types, const Latents &latents,
         TrtSession &backbone, TrtSession &decoder, cuda::Stream &stream);

    const PlanShape shape;

    // Copy a request into pinned memory, in the dtypes that the backbone takes.
    void fill(const DenoiseInputs &inputs);

    // Enqueue the work, or launch the graph.
    void run(cuda::Stream &stream, Kernels &kernels);

    // Capture the work into a graph, without running it; tries once per plan. Returns why it cannot be captured, or "".
    std::string capture(cuda::Stream &stream, Kernels &kernels);

    // The results of the last run, in the request's order, with its times. The caller has waited for the stream.
    Denoised take(const DenoiseInputs &inputs) const;

private:
    // Offsets into one allocation, assigned before it is made.
    class Layout {
    public:
        size_t add(size_t bytes);
        size_t bytes() const { return end_; }

    private:
        size_t end_ = 0;
    };

    // A group's context, and the offsets of its tensors in device memory.
    struct Group {
        std::unique_ptr<TrtContext> context;
        size_t input = 0, states = 0, rotary = 0, means = 0, logweights = 0, loggammas = 0;
        std::vector<size_t> modulation;  // one for each step
    };

    Shapes group_shapes(size_t g, const DenoiseInputs &inputs) const;
    void lay_out(const DenoiseInputs &inputs);
    cuda::Address address(size_t offset) const { return device_->address + offset; }
    void bind();
    void use_scratch();
    void enqueue(cuda::Stream &stream, Kernels &kernels);
    void mark(cuda::Stream &stream, const char *stage);
    std::vector<std::pair<std::string, double>> times_ms() const;
    void put(size_t offset, const Tensor &tensor, DType dtype);
    void scatter(const std::byte *from, const DenoiseInputs &inputs, Tensor &to) const;

    PlanTypes types_;
    Latents latents_;
    Layout layout_;
    size_t sigmas_ = 0, streams_ = 0, state_ = 0, image_rotary_ = 0, pixels_ = 0;
    size_t fed_bytes_ = 0, latent_bytes_ = 0, pixel_bytes_ = 0;
    std::vector<int64_t> pixel_shape_;
    // Declared before contexts and graph, so that these are freed first.
    std::unique_ptr<cuda::Memory> device_, scratch_;
    std::unique_ptr<cuda::Pinned> host_;
    std::vector<Group> groups_;
    std::unique_ptr<TrtContext> decoder_;
    // Events that mark the ends of stages; the first marks the start. A captured graph holds its events, so each mark
    // keeps its own event.
    std::vector<std::unique_ptr<cuda::Event>> events_;
    std::vector<const char *> marks_;
    std::unique_ptr<cuda::Graph> graph_;
    bool tried_ = false;
};

}  // namespace arcflow
