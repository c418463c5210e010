// One shape's work: the inputs of a request -> latents and pixels, enqueued or captured once and launched as one.
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

// dtypes of the tensors that meet in a plan, from the manifest.
struct PlanTypes {
    // Throws Error where the backbone's heads are not what the update kernel takes.
    explicit PlanTypes(const Part &backbone);

    DType latents, states, modulation, image_rotary, text_rotary, heads;
};

// What a plan is made for; requests with equal ones share it.
struct PlanShape {
    PlanShape(const DenoiseInputs &inputs, const Latents &latents);

    int64_t batch, tokens, channels, height, width;  // the last two of the decoder's grid
    size_t steps;
    bool decode;
    std::vector<std::pair<int64_t, int64_t>> groups;  // images and text tokens

    bool operator==(const PlanShape &other) const;
};

// What a request must hold for a plan's copies to stay inside their regions; throws Error.
void check_inputs(const DenoiseInputs &inputs);

// Buffers, contexts and, once captured, the graph for one shape; used by one thread at a time. Images lie group by
// group. Inputs were checked, and are of the plan's shape. The stream's work is done before the plan is freed.
class Plan {
public:
    // Throws Error where an engine takes no such shape, or there is no memory.
    Plan(PlanShape shape, const DenoiseInputs &inputs, const PlanTypes &types, const Latents &latents,
         TrtSession &backbone, TrtSession &decoder, cuda::Stream &stream);

    const PlanShape shape;

    // Copy a request into the pinned memory, in the dtypes that the backbone takes.
    void fill(const DenoiseInputs &inputs);

    // Enqueue one request, or launch the graph that holds it.
    void run(cuda::Stream &stream, Kernels &kernels);

    // Capture what `run` enqueued before, without running it; once per plan. Gives why it cannot be, "" if it was or
    // need not be.
    std::string capture(cuda::Stream &stream, Kernels &kernels);

    // What the last run left in the pinned memory, in the request's order, and its times; the stream was waited for.
    Denoised take(const DenoiseInputs &inputs) const;

private:
    // Regions of one allocation, laid out before it is made.
    class Layout {
    public:
        size_t add(size_t bytes);
        size_t bytes() const { return end_; }

    private:
        size_t end_ = 0;
    };

    // One group's context, and where its tensors are in the device's memory.
    struct Group {
        std::unique_ptr<TrtContext> context;
        size_t input = 0, states = 0, rotary = 0, means = 0, logweights = 0, loggammas = 0;
        std::vector<size_t> modulation;  // of each step
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
    // Contexts and the graph are freed before the memory that they work in.
    std::unique_ptr<cuda::Memory> device_, scratch_;
    std::unique_ptr<cuda::Pinned> host_;
    std::vector<Group> groups_;
    std::unique_ptr<TrtContext> decoder_;
    // Where stages end, after the start. A graph has its events in it, so each place keeps its own.
    std::vector<std::unique_ptr<cuda::Event>> events_;
    std::vector<const char *> marks_;
    std::unique_ptr<cuda::Graph> graph_;
    bool tried_ = false;
};

}  // namespace arcflow
