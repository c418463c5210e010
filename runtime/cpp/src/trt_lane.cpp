// One stream and one workspace that the engines, plans and denoiser of a pipeline share; see trt_lane.h.
#include "trt_lane.h"

#include <utility>

#include "error.h"

namespace arcflow {
namespace {

// 1234567 as "1,234,567".
std::string grouped(size_t number) {
    std::string text = std::to_string(number);
    for (size_t i = text.size(); i > 3;) text.insert(i -= 3, ",");
    return text;
}

}  // namespace

Lane::Lane(std::shared_ptr<const cuda::Device> device_) : device(std::move(device_)) {
    const cuda::Current current(*device);
    stream_ = std::make_unique<cuda::Stream>();
}

Lane::~Lane() {
    try {
        const Hold hold(*this);
        settle();
        workspace_.reset();
        stream_.reset();
    } catch (const Error &) {  // the device is lost, so there is nothing to free
    }
}

const cuda::Memory &Lane::workspace(size_t bytes, const std::string &part) {
    if (!workspace_ || workspace_->bytes < bytes) {
        release_workspace();
        workspace_ = allocate(bytes, part + ": activations");
    }
    return *workspace_;
}

bool Lane::release_workspace() {
    if (!workspace_) return false;
    settle();
    workspace_.reset();
    ++generation_;
    return true;
}

void Lane::remove_engine() {
    if (--engines_ == 0) release_workspace();
}

void Lane::settle() noexcept {
    for (int attempt = 0; attempt < 2; ++attempt) {  // a wait that failed may not have waited
        try {
            return stream_->wait();
        } catch (const std::exception &) {
        }
    }
}

std::unique_ptr<cuda::Memory> Lane::allocate(size_t bytes, const std::string &what) {
    try {
        return std::make_unique<cuda::Memory>(bytes);
    } catch (const Error &e) {
        if (e.status != ARCFLOW_OUT_OF_MEMORY) throw;
        throw Error(ARCFLOW_OUT_OF_MEMORY, what + " need " + grouped(bytes) + " bytes of " + device->gpu.name +
                                               "'s memory, " + grouped(cuda::free_bytes()) + " are free; " +
                                               save_memory);
    }
}

std::unique_ptr<cuda::Pinned> Lane::allocate_pinned(size_t bytes, const std::string &part) {
    try {
        return std::make_unique<cuda::Pinned>(bytes);
    } catch (const Error &e) {
        if (e.status != ARCFLOW_OUT_OF_MEMORY) throw;
        throw Error(ARCFLOW_OUT_OF_MEMORY, part + ": " + grouped(bytes) +
                                               " bytes of page-locked host memory cannot be allocated; ask for fewer "
                                               "or smaller images");
    }
}

}  // namespace arcflow
