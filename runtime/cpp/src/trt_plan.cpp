// Lays out, enqueues and captures the GPU's work for one request shape.
#include "trt_plan.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "trt_engine.h"

namespace arcflow {
namespace {

int64_t at(const std::vector<int64_t> &shape, size_t axis, const char *what) {
    if (axis >= shape.size()) throw Error(ARCFLOW_INTERNAL_ERROR, std::string(what) + " has too few axes");
    return shape[axis];
}

}  // namespace

PlanTypes::PlanTypes(const Part &backbone) {
    const auto input = [&](const char *name) { return spec_of(backbone.inputs, name, "backbone").dtype; };
    const auto output = [&](const char *name) { return spec_of(backbone.outputs, name, "backbone").dtype; };
    latents = input("latents");
    states = input("encoder_hidden_states");
    modulation = input("modulation");
    image_rotary = input("image_rotary");
    text_rotary = input("text_rotary");
    heads = output("means");
    if (output("logweights") != heads || output("loggammas") != heads)
        throw engine_error("backbone: means, logweights and loggammas must be in one dtype; export the bundle again");
}

PlanShape::PlanShape(const DenoiseInputs &inputs, const Latents &latents)
    : batch(inputs.shape[0]),
      tokens(inputs.shape[1]),
      channels(inputs.shape[2]),
      height(inputs.height_px / (latents.patch_size * latents.vae_scale_factor)),
      width(inputs.width_px / (latents.patch_size * latents.vae_scale_factor)),
      steps(inputs.sigmas.size() - 1),
      decode(inputs.decode) {
    for (const TextGroup &group : inputs.groups)
        groups.emplace_back(static_cast<int64_t>(group.images.size()), group.states.shape[1]);
}

bool PlanShape::operator==(const PlanShape &other) const {
    return batch == other.batch && tokens == other.tokens && channels == other.channels && height == other.height &&
           width == other.width && steps == other.steps && decode == other.decode && groups == other.groups;
}

void check_inputs(const DenoiseInputs &inputs) {
    const auto fits = [](bool ok, const char *what) {
        if (!ok) throw Error(ARCFLOW_INTERNAL_ERROR, std::string("denoiser: ") + what + " does not fit the request");
    };
    const int64_t batch = at(inputs.shape, 0, "latents"), steps = static_cast<int64_t>(inputs.sigmas.size()) - 1;
    fits(inputs.shape.size() == 3 && batch > 0 && inputs.shape[2] % noise_group == 0 && steps > 0, "latents' shape");
    fits(static_cast<int64_t>(inputs.streams.size()) == batch, "noise");
    const auto &modulation = inputs.modulation.shape;
    fits(modulation.size() == 3 && modulation[0] == steps && modulation[1] > 0, "modulation");
    std::vector<bool> seen(static_cast<size_t>(batch));
    int64_t images = 0;
    for (const TextGroup &group : inputs.groups) {
        const auto size = static_cast<int64_t>(group.images.size());
        fits(size > 0 && group.prompts.size() == group.images.size(), "a group");
        fits(group.states.shape.size() == 3 && group.states.shape[0] == size, "a group's states");
        fits(group.rotary->shape.size() == 3 && group.rotary->shape[1] == group.states.shape[1],
             "a group's rotary table");
        for (size_t i = 0; i < group.images.size(); ++i) {
            const int64_t image = group.images[i], prompt = group.prompts[i];
            fits(image >= 0 && image < batch && !seen[static_cast<size_t>(image)], "an image's place");
            fits(prompt >= 0 && (modulation[1] == 1 || prompt < modulation[1]), "a prompt's place");
            seen[static_cast<size_t>(image)] = true;
        }
        images += size;
    }
    fits(images == batch, "the number of images");
}

size_t Plan::Layout::add(size_t bytes) {
    const size_t offset = end_;
    end_ += aligned(bytes);
    return offset;
}

Plan::Plan(PlanShape shape_, const DenoiseInputs &inputs, const PlanTypes &types, const Latents &latents,
           TrtSession &backbone, TrtSession &decoder, cuda::Stream &stream)
    : shape(std::move(shape_)), types_(types), latents_(latents) {
    lay_out(inputs);
    for (size_t g = 0; g < shape.groups.size(); ++g)
        groups_[g].context = backbone.context(group_shapes(g, inputs), stream);
    if (shape.decode) {
        decoder_ = decoder.context({{"latents", {shape.batch, shape.height, shape.width, shape.channels}}}, stream);
        pixel_shape_ = decoder_->shape("images");
        pixel_bytes_ = bytes_of(pixel_shape_, DType::uint8, "vae_decoder: images");
    }
    pixels_ = layout_.add(pixel_bytes_);
    device_ = std::make_unique<cuda::Memory>(layout_.bytes());
    host_ = std::make_unique<cuda::Pinned>(fed_bytes_ + latent_bytes_ + pixel_bytes_);
    bind();
    use_scratch();
}

void Plan::fill(const DenoiseInputs &inputs) {
    std::memcpy(host_->data + sigmas_, inputs.sigmas.data(), inputs.sigmas.size() * sizeof(double));
    put(image_rotary_, *inputs.image_rotary, types_.image_rotary);
    const int64_t prompts = at(inputs.modulation.shape, 1, "modulation");
    const Tensor modulation = cast(inputs.modulation, types_.modulation);
    const size_t row = modulation.data.size() / (shape.steps * static_cast<size_t>(prompts));
    int64_t *stream = reinterpret_cast<int64_t *>(host_->data + streams_);
    for (size_t g = 0; g < groups_.size(); ++g) {
        const TextGroup &given = inputs.groups[g];
        const Group &group = groups_[g];
        for (const int64_t image : given.images) {
            const NoiseStream &from = inputs.streams[static_cast<size_t>(image)];
            *stream++ = from.seed;
            *stream++ = from.first;
        }
        put(group.states, given.states, types_.states);
        put(group.rotary, *given.rotary, types_.text_rotary);
        for (size_t step = 0; step < shape.steps; ++step) {
            for (size_t i = 0; i < given.prompts.size(); ++i) {
                const size_t prompt = prompts > 1 ? static_cast<size_t>(given.prompts[i]) : 0;
                const size_t from = step * static_cast<size_t>(prompts) + prompt;
                std::memcpy(host_->data + group.modulation[step] + i * row, modulation.data.data() + from * row, row);
            }
        }
    }
}

void Plan::run(cuda::Stream &stream, Kernels &kernels) {
    if (graph_) graph_->launch(stream.handle);
    else enqueue(stream, kernels);
}

std::string Plan::capture(cuda::Stream &stream, Kernels &kernels) {
    if (tried_) return "";
    tried_ = true;
    bool capturable = !decoder_ || decoder_->capturable();
    for (const Group &group : groups_) capturable = capturable && group.context->capturable();
    if (!capturable) return "an engine cannot be captured";
    std::string why, failed;
    stream.begin_capture();
    try {
        enqueue(stream, kernels);
    } catch (const Error &e) {
        failed = e.what();
    }
    graph_ = stream.end_capture(why);
    if (!failed.empty()) graph_.reset();
    return failed.empty() ? why : failed;
}

Denoised Plan::take(const DenoiseInputs &inputs) const {
    Denoised out;
    out.latents = Tensor(DType::float32, {shape.batch, shape.tokens, shape.channels});
    out.stages_ms = times_ms();
    scatter(host_->data + fed_bytes_, inputs, out.latents);
    if (!shape.decode) return out;
    out.pixels = Tensor(DType::uint8, pixel_shape_);
    scatter(host_->data + fed_bytes_ + latent_bytes_, inputs, out.pixels);
    return out;
}

// The backbone's inputs for one group: the row `backbone` in the table of rule B9, docs/bundle.md.
Shapes Plan::group_shapes(size_t g, const DenoiseInputs &inputs) const {
    const auto [images, text] = shape.groups[g];
    return {{"latents", {images, shape.tokens, shape.channels}},
            {"encoder_hidden_states", {images, text, at(inputs.groups[g].states.shape, 2, "states")}},
            {"modulation", {images, at(inputs.modulation.shape, 2, "modulation")}},
            {"image_rotary", inputs.image_rotary->shape},
            {"text_rotary", inputs.groups[g].rotary->shape}};
}

// Lay out the device's memory. First come the inputs that the host writes, at the same offsets as in pinned memory.
void Plan::lay_out(const DenoiseInputs &inputs) {
    groups_.resize(shape.groups.size());
    const auto count = [](const std::vector<int64_t> &sizes, DType dtype) {
        return bytes_of(sizes, dtype, "backbone");
    };
    sigmas_ = layout_.add((shape.steps + 1) * sizeof(double));
    latent_bytes_ = count({shape.batch, shape.tokens, shape.channels}, DType::float32);
    streams_ = layout_.add(count({shape.batch, 2}, DType::int64));
    image_rotary_ = layout_.add(count(inputs.image_rotary->shape, types_.image_rotary));
    for (size_t g = 0; g < groups_.size(); ++g) {
        const Shapes shapes = group_shapes(g, inputs);
        groups_[g].states = layout_.add(count(shapes.at("encoder_hidden_states"), types_.states));
        groups_[g].rotary = layout_.add(count(shapes.at("text_rotary"), types_.text_rotary));
        for (size_t step = 0; step < shape.steps; ++step)
            groups_[g].modulation.push_back(layout_.add(count(shapes.at("modulation"), types_.modulation)));
    }
    fed_bytes_ = layout_.bytes();
    state_ = layout_.add(latent_bytes_);
    for (size_t g = 0; g < groups_.size(); ++g) {
        const int64_t images = shape.groups[g].first, k = latents_.num_gaussians, p = latents_.logweights_channels;
        groups_[g].input = layout_.add(count({images, shape.tokens, shape.channels}, types_.latents));
        groups_[g].means = layout_.add(count({images, shape.tokens, k, shape.channels}, types_.heads));
        groups_[g].logweights = layout_.add(count({images, shape.tokens, k, p}, types_.heads));
        groups_[g].loggammas = layout_.add(count({images, shape.tokens, k - 1, p}, types_.heads));
    }
}

void Plan::bind() {
    for (Group &group : groups_) {
        group.context->bind("latents", address(group.input));
        group.context->bind("encoder_hidden_states", address(group.states));
        group.context->bind("modulation", address(group.modulation[0]));
        group.context->bind("image_rotary", address(image_rotary_));
        group.context->bind("text_rotary", address(group.rotary));
        group.context->bind("means", address(group.means));
        group.context->bind("logweights", address(group.logweights));
        group.context->bind("loggammas", address(group.loggammas));
    }
    if (!decoder_) return;
    decoder_->bind("latents", address(state_));
    decoder_->bind("images", address(pixels_));
}

// Contexts run one after the other, so all share one scratch memory of the largest size.
void Plan::use_scratch() {
    std::vector<TrtContext *> contexts;
    for (Group &group : groups_) contexts.push_back(group.context.get());
    if (decoder_) contexts.push_back(decoder_.get());
    size_t most = 0;
    for (TrtContext *context : contexts) most = std::max(most, context->scratch_bytes());
    scratch_ = std::make_unique<cuda::Memory>(most);
    for (TrtContext *context : contexts) context->use_scratch(scratch_->address, most);
}

void Plan::enqueue(cuda::Stream &stream, Kernels &kernels) {
    marks_.clear();
    mark(stream, "start");
    stream.to_device(device_->address, host_->data, fed_bytes_);
    mark(stream, "copy");
    size_t streams = streams_, noise = state_;
    for (size_t g = 0; g < groups_.size(); ++g) {
        const int64_t images = shape.groups[g].first, patch = latents_.patch_size;
        const NoiseShape noise_shape{static_cast<int32_t>(images),
                                     static_cast<int32_t>(latents_.channels),
                                     static_cast<int32_t>(shape.height * patch),
                                     static_cast<int32_t>(shape.width * patch),
                                     static_cast<int32_t>(patch),
                                     types_.latents};
        kernels.noise(stream, noise_shape, address(streams), address(noise), address(groups_[g].input));
        streams += static_cast<size_t>(images) * 2 * sizeof(int64_t);
        noise += static_cast<size_t>(images * shape.tokens * shape.channels) * sizeof(float);
    }
    mark(stream, "noise");
    for (size_t step = 0; step < shape.steps; ++step) {
        size_t state = state_;
        for (size_t g = 0; g < groups_.size(); ++g) {
            Group &group = groups_[g];
            group.context->bind("modulation", address(group.modulation[step]));
            group.context->enqueue();
            mark(stream, "backbone");
            const int64_t tokens = shape.groups[g].first * shape.tokens;
            const UpdateShape update{tokens,
                                     static_cast<int32_t>(latents_.num_gaussians),
                                     static_cast<int32_t>(shape.channels),
                                     static_cast<int32_t>(latents_.logweights_channels),
                                     types_.heads,
                                     types_.latents};
            const bool last = step + 1 == shape.steps;  // no backbone call follows that would read the input
            kernels.update(stream, update,
                           {address(group.means), address(group.logweights), address(group.loggammas), address(state),
                            address(state), last ? 0 : address(group.input), address(sigmas_)},
                           static_cast<int32_t>(step));
            mark(stream, "update");
            state += static_cast<size_t>(tokens * shape.channels) * sizeof(float);
        }
    }
    if (decoder_) {
        decoder_->enqueue();
        mark(stream, "decode");
    }
    stream.to_host(host_->data + fed_bytes_, address(state_), latent_bytes_);
    stream.to_host(host_->data + fed_bytes_ + latent_bytes_, address(pixels_), pixel_bytes_);
    mark(stream, "copy");
}

// Mark the end of `stage`.
void Plan::mark(cuda::Stream &stream, const char *stage) {
    if (marks_.size() == events_.size()) events_.push_back(std::make_unique<cuda::Event>());
    stream.record(*events_[marks_.size()]);
    marks_.push_back(stage);
}

std::vector<std::pair<std::string, double>> Plan::times_ms() const {
    std::vector<std::pair<std::string, double>> times;
    for (size_t i = 1; i < marks_.size(); ++i) {
        const double ms = events_[i]->ms_since(*events_[i - 1]);
        const std::string stage = marks_[i];
        const auto known = std::find_if(times.begin(), times.end(), [&](const auto &t) { return t.first == stage; });
        if (known == times.end()) times.emplace_back(stage, ms);
        else known->second += ms;
    }
    return times;
}

void Plan::put(size_t offset, const Tensor &tensor, DType dtype) {
    if (tensor.dtype != dtype) return put(offset, cast(tensor, dtype), dtype);
    std::memcpy(host_->data + offset, tensor.data.data(), tensor.data.size());
}

// Copy images from group order to the request's order.
void Plan::scatter(const std::byte *from, const DenoiseInputs &inputs, Tensor &to) const {
    const size_t image_bytes = to.data.size() / static_cast<size_t>(shape.batch);
    for (const TextGroup &group : inputs.groups) {
        for (const int64_t image : group.images) {
            std::memcpy(to.data.data() + static_cast<size_t>(image) * image_bytes, from, image_bytes);
            from += image_bytes;
        }
    }
}

}  // namespace arcflow
