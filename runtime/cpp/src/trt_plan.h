// Runs one job on the GPU: staged inputs -> results, enqueued stage by stage, or captured as a CUDA graph and replayed.
// docs/gpu.md has the graph, the memory plan and the order of streams and events.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "trt_buffers.h"
#include "trt_kernel.h"
#include "trt_lane.h"
#include "trt_loras.h"
#include "trt_session.h"

namespace arcflow {

// The buffers, execution contexts and CUDA graph of one key. Used by one thread at a time, in which the device's
// context is current and which does not hold the lane.
//
// If the parts stay loaded, so do their contexts. Otherwise each part is loaded for its stage and freed after it, and
// there is no graph; only the buffers stay.
class Plan {
public:
    // `parts` loads TrtEngines. `job`: any job of this key. Throws Error if an engine does not take the shapes, or
    // memory ran out.
    Plan(Lane &lane, const Manifest &manifest, PartSource &parts, LoraArenas &arenas, Kernels &kernels,
         const PlanKey &key, int64_t steps_at_once, const DenoiseJob &job);

    // Waits until the stream is idle, then frees everything.
    ~Plan();
    Plan(const Plan &) = delete;
    Plan &operator=(const Plan &) = delete;

    const PlanKey key;

    // Write a job's inputs into pinned memory. See Buffers::stage.
    void stage(const DenoiseJob &job, const Tensor *modulation) { buffers_->stage(job, modulation); }

    // Run the staged job, and wait for the result. The first run enqueues the work without a graph, the second captures
    // the graph, and later runs replay it. With `on_step`, or if the parts do not stay loaded, no graph is used: each
    // run enqueues the work. Throws what failed; the plan must then be freed, because half of its work may be enqueued.
    void run(const OnStep &on_step);

    // The results and times of the last run.
    Denoised take() const;

    // Why no graph could be captured, or "".
    const std::string &obstacle() const { return obstacle_; }

private:
    // Shapes of the inputs and outputs of a part that this plan runs.
    struct PartShapes {
        Shapes inputs, outputs;
    };

    // The contexts of a part under its name. With guidance, the backbone has a second one under `negative`, for the
    // negative prompts, whose texts may have another length.
    using Contexts = std::map<std::string, std::unique_ptr<TrtContext>>;
    static constexpr const char *negative = "negative";
    static std::string part_of(const std::string &context) { return context == negative ? "backbone" : context; }

    void prepare(const Manifest &manifest, int64_t steps_at_once, const DenoiseJob &job);
    void find_shapes(const Manifest &manifest, int64_t steps_at_once);
    std::unique_ptr<TrtContext> make_context(const std::string &name, TrtSession &session);
    std::shared_ptr<const Contexts> use(const std::string &part);
    std::shared_ptr<const Contexts> open_for_a_stage(const std::string &part);
    void bind();
    void capture();
    void run_kept(const OnStep &on_step);
    void enqueue(const OnStep &on_step);
    void enqueue_steps(const OnStep &on_step);
    void condition(TrtContext &context);
    void step(const Contexts &contexts, int64_t index);
    void copy_result(const std::string &name);
    void mark(const char *stage);
    std::vector<std::pair<std::string, double>> times_ms() const;

    Lane &lane_;
    PartSource &parts_;
    LoraArenas &arenas_;
    Kernels &kernels_;
    const bool keeps_;  // the parts
    NoiseShape noise_{};
    UpdateShape update_{};  // of a momentum student
    EulerShape euler_{};    // of a straight one
    bool straight_ = false;
    std::unique_ptr<Buffers> buffers_;
    std::map<std::string, PartShapes> shapes_;  // by context
    Contexts contexts_;                         // of parts that stay loaded
    std::string largest_;                       // the part that needs most activations
    size_t workspace_bytes_ = 0;
    uint64_t generation_ = 0;  // of the workspace that the contexts have
    bool bound_ = false, warm_ = false;
    // Events that mark the ends of stages; the first marks the start. A graph records the events that it captured, so
    // each mark keeps its own event.
    std::vector<std::unique_ptr<cuda::Event>> events_;
    std::vector<const char *> marks_;
    std::unique_ptr<cuda::Event> done_;
    std::unique_ptr<cuda::Graph> graph_;
    std::string obstacle_;
};

}  // namespace arcflow
