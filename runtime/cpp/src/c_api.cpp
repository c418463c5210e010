// Implements arcflow.h on top of Pipeline: handles, struct versions, and exceptions turned into statuses.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <nlohmann/json.hpp>

#include "arcflow/arcflow.h"
#include "constants.h"
#include "error.h"
#include "json_text.h"
#include "maths.h"
#include "registry.h"
#include "shared.h"
#include "signal_stack.h"

namespace {

using arcflow::Error;
using arcflow::Images;
using arcflow::request_error;
using arcflow::Shared;

// A LoRA, and the pipeline that it was opened for.
struct OpenLora {
    std::shared_ptr<const arcflow::Lora> lora;
    std::weak_ptr<Shared> pipeline;
};

struct Result {
    Images images;
    std::string warnings, timings;
};

// Never destroyed, so that other threads may still call while the process exits.
auto &pipelines() {
    static auto &registry = *new arcflow::Registry<arcflow_pipeline, Shared>();
    return registry;
}

auto &loras() {
    static auto &registry = *new arcflow::Registry<arcflow_lora, OpenLora>();
    return registry;
}

auto &results() {
    static auto &registry = *new arcflow::Registry<arcflow_result, Result>();
    return registry;
}

// The calling thread's last error; a fixed text if there is no memory for it.
thread_local std::string last_error;
thread_local const char *last_error_without_memory = nullptr;

arcflow_status fail(arcflow_status status, const char *before, const char *what) noexcept {
    try {
        last_error = before;
        last_error += what;
        last_error_without_memory = nullptr;
    } catch (...) {
        last_error_without_memory = "out of memory, also for the text of this error";
    }
    return status;
}

// Run the body of an API function. An exception becomes a status and the last error's text.
template <class Work> arcflow_status guarded(const Work &work) noexcept {
    const arcflow::KeptSignalStack signal_stack;
    last_error.clear();
    last_error_without_memory = nullptr;
    try {
        work();
        return ARCFLOW_OK;
    } catch (const Error &e) {
        return fail(e.status, "", e.what());
    } catch (const std::bad_alloc &) {
        return fail(ARCFLOW_OUT_OF_MEMORY, "", (std::string("out of memory; ") + arcflow::save_memory).c_str());
    } catch (const std::exception &e) {
        return fail(ARCFLOW_INTERNAL_ERROR, "unexpected error, please report it: ", e.what());
    } catch (...) {
        return fail(ARCFLOW_INTERNAL_ERROR, "", "unexpected error of no known kind, please report it");
    }
}

void check_not_null(const void *pointer, const char *name) {
    if (pointer == nullptr) throw request_error(std::string(name) + " must not be NULL");
}

// Copy a struct that the caller compiled with an older or newer header. Fields that the older header lacks keep their
// defaults. Fields that only the newer header has must be zero, which is their default.
template <class Struct> Struct versioned(const Struct &given, Struct out, size_t oldest, const char *name) {
    constexpr size_t largest = 4096;
    const size_t size = given.struct_size;
    if (size < oldest || size > largest) {
        throw request_error(std::string(name) + ".struct_size must be the struct's size, " + std::to_string(oldest) +
                            " or a little more, got " + std::to_string(size) + "; begin with its INIT macro");
    }
    const auto *bytes = reinterpret_cast<const unsigned char *>(&given);
    const auto *known = bytes + std::min(size, sizeof(Struct));
    if (std::any_of(known, bytes + size, [](unsigned char byte) { return byte != 0; })) {
        throw request_error(std::string(name) +
                            " sets what this library, version " ARCFLOW_VERSION ", does not know; " +
                            "install the version that the program was compiled with");
    }
    std::memcpy(&out, &given, std::min(size, sizeof(Struct)));
    out.struct_size = sizeof(Struct);
    return out;
}

// Sizes of the structs in the first release, the smallest that a caller can have.
constexpr size_t oldest_options = offsetof(arcflow_options, full_check) + sizeof(arcflow_options::full_check);
constexpr size_t oldest_request = offsetof(arcflow_request, user) + sizeof(arcflow_request::user);

// The memory mode that the options name; none to choose it by the free memory.
std::optional<arcflow::MemoryMode> memory_of(const arcflow_options &options) {
    using arcflow::MemoryMode;
    if (options.memory == nullptr) return options.low_memory != 0 ? std::optional(MemoryMode::low) : std::nullopt;
    for (const MemoryMode mode : {MemoryMode::resident, MemoryMode::balanced, MemoryMode::low}) {
        if (std::strcmp(options.memory, arcflow::name_of(mode)) != 0) continue;
        if (options.low_memory != 0 && mode != MemoryMode::low) {
            throw request_error(std::string("options.low_memory must be 0 with options.memory \"") + options.memory +
                                "\"; set only options.memory");
        }
        return mode;
    }
    throw request_error("options.memory must be \"resident\", \"balanced\" or \"low\", or NULL to choose by the free "
                        "memory, got " +
                        arcflow::json_text(options.memory));
}

arcflow::LoadOptions load_options(const arcflow_options *given) {
    if (given == nullptr) return {};
    const arcflow_options options = versioned(*given, ARCFLOW_OPTIONS_INIT, oldest_options, "options");
    if (options.threads < 0) {
        throw request_error("options.threads must be at least 0, got " + std::to_string(options.threads) +
                            "; 0 uses every core");
    }
    const unsigned cores = std::thread::hardware_concurrency();  // 0 if unknown
    if (cores > 0 && options.threads > static_cast<int64_t>(cores)) {
        throw request_error("options.threads must be at most " + std::to_string(cores) +
                            ", one per core of this machine, got " + std::to_string(options.threads) +
                            "; 0 uses every core");
    }
    return {options.backend == nullptr ? "" : options.backend, options.threads, memory_of(options),
            options.full_check != 0};
}

// The LoRAs of a request for this pipeline. A scale of 0 is no LoRA.
std::vector<arcflow::ScaledLora> loras_of(const arcflow_request &request, const std::shared_ptr<Shared> &pipeline) {
    // Checked first, since a wrong count would read past the caller's array.
    if (const size_t open = loras().size(); request.lora_count > open) {
        throw request_error("request.lora_count must be at most " + std::to_string(open) +
                            ", the number of open LoRAs, got " + std::to_string(request.lora_count) +
                            "; name each LoRA once");
    }
    if (request.lora_count > 0) check_not_null(request.loras, "request.loras");
    std::vector<arcflow::ScaledLora> found;
    std::set<uint64_t> numbers;
    for (size_t i = 0; i < request.lora_count; ++i) {
        const std::string name = "request.loras[" + std::to_string(i) + "]";
        const auto [handle, scale] = request.loras[i];
        const std::shared_ptr<OpenLora> open = loras().find(handle);
        if (open == nullptr)
            throw request_error(name + ".lora was closed, or is not a LoRA; open it with arcflow_lora_open");
        if (open->pipeline.lock() != pipeline) {
            throw request_error(name + ".lora must have been opened for this pipeline, got one of another; open the "
                                       "file with arcflow_lora_open for this one too");
        }
        if (!(std::abs(scale) <= arcflow::max_lora_scale)) {
            throw request_error(name + ".scale must be between -" + arcflow::json_text(arcflow::max_lora_scale) +
                                " and " + arcflow::json_text(arcflow::max_lora_scale) + ", got " +
                                arcflow::json_text(scale));
        }
        if (!numbers.insert(open->lora->number).second)
            throw request_error(name + ".lora must be named once, got it again; add the two scales");
        if (scale != 0) found.push_back({open->lora, scale});
    }
    return found;
}

std::string lines(const std::vector<std::string> &texts) {
    std::string out;
    for (const std::string &text : texts) out += (out.empty() ? "" : "\n") + text;
    return out;
}

std::string timings_json(const Images &images) {
    nlohmann::ordered_json json = nlohmann::ordered_json::object();
    for (const auto &[stage, ms] : images.timings_ms) json[stage] = ms;
    return json.dump();
}

// `get` of a result, or `otherwise` if the handle is stale.
template <class Value, class Get> Value of(const arcflow_result *handle, Value otherwise, const Get &get) noexcept {
    try {
        const std::shared_ptr<Result> result = results().find(handle);
        return result == nullptr ? otherwise : get(*result);
    } catch (...) {
        return otherwise;
    }
}

}  // namespace

uint32_t arcflow_abi_version(void) { return ARCFLOW_ABI_VERSION; }

const char *arcflow_version(void) { return ARCFLOW_VERSION; }

const char *arcflow_last_error(void) {
    return last_error_without_memory != nullptr ? last_error_without_memory : last_error.c_str();
}

const char *arcflow_backends(void) { return arcflow::backend_names(); }

arcflow_status arcflow_open(const char *bundle, const arcflow_options *options, arcflow_pipeline **pipeline) {
    if (pipeline != nullptr) *pipeline = nullptr;
    return guarded([&] {
        check_not_null(pipeline, "pipeline");
        check_not_null(bundle, "bundle");
        *pipeline = pipelines().add(std::make_shared<Shared>(std::filesystem::u8path(bundle), load_options(options)));
    });
}

void arcflow_close(arcflow_pipeline *pipeline) {
    guarded([&] {
        if (const std::shared_ptr<Shared> shared = pipelines().remove(pipeline)) shared->close();
    });
}

const char *arcflow_memory(const arcflow_pipeline *pipeline) {
    try {
        const std::shared_ptr<Shared> shared = pipelines().find(pipeline);
        return shared == nullptr ? "" : arcflow::name_of(shared->memory);
    } catch (...) {
        return "";
    }
}

arcflow_status arcflow_lora_open(arcflow_pipeline *pipeline, const char *path, arcflow_lora **lora) {
    if (lora != nullptr) *lora = nullptr;
    return guarded([&] {
        check_not_null(lora, "lora");
        check_not_null(pipeline, "pipeline");
        check_not_null(path, "path");
        const std::shared_ptr<Shared> shared = pipelines().find(pipeline);
        if (shared == nullptr) throw Shared::closed();
        *lora =
            loras().add(std::make_shared<OpenLora>(OpenLora{shared->open_lora(std::filesystem::u8path(path)), shared}));
    });
}

void arcflow_lora_close(arcflow_lora *lora) {
    guarded([&] {
        const std::shared_ptr<OpenLora> open = loras().remove(lora);
        if (open == nullptr) return;
        if (const std::shared_ptr<Shared> shared = open->pipeline.lock()) shared->forget_lora(*open->lora);
    });
}

arcflow_status arcflow_generate(arcflow_pipeline *pipeline, const arcflow_request *request, arcflow_result **result) {
    if (result != nullptr) *result = nullptr;
    return guarded([&] {
        check_not_null(result, "result");
        check_not_null(pipeline, "pipeline");
        check_not_null(request, "request");
        const arcflow_request arguments = versioned(*request, ARCFLOW_REQUEST_INIT, oldest_request, "request");
        const std::shared_ptr<Shared> shared = pipelines().find(pipeline);
        if (shared == nullptr) throw Shared::closed();
        auto made = std::make_shared<Result>();
        made->images = shared->generate(arguments, loras_of(arguments, shared));
        made->warnings = lines(made->images.warnings);
        made->timings = timings_json(made->images);
        *result = results().add(std::move(made));
    });
}

void arcflow_result_free(arcflow_result *result) {
    guarded([&] { results().remove(result); });
}

int32_t arcflow_result_batch(const arcflow_result *result) {
    return of(result, int32_t{0}, [](const Result &r) { return static_cast<int32_t>(r.images.batch); });
}

int32_t arcflow_result_height(const arcflow_result *result) {
    return of(result, int32_t{0}, [](const Result &r) { return static_cast<int32_t>(r.images.height_px); });
}

int32_t arcflow_result_width(const arcflow_result *result) {
    return of(result, int32_t{0}, [](const Result &r) { return static_cast<int32_t>(r.images.width_px); });
}

const uint8_t *arcflow_result_pixels(const arcflow_result *result) {
    const uint8_t *none = nullptr;
    return of(result, none, [&](const Result &r) {
        const arcflow::Tensor &pixels = r.images.pixels;
        return pixels.data.empty() ? none : pixels.as<uint8_t>();
    });
}

const float *arcflow_result_latents(const arcflow_result *result, int32_t *tokens, int32_t *channels) {
    if (tokens != nullptr) *tokens = 0;
    if (channels != nullptr) *channels = 0;
    const float *none = nullptr;
    return of(result, none, [&](const Result &r) {
        const arcflow::Tensor &latents = r.images.latents;
        if (tokens != nullptr) *tokens = static_cast<int32_t>(latents.shape[1]);
        if (channels != nullptr) *channels = static_cast<int32_t>(latents.shape[2]);
        return latents.as<float>();
    });
}

const uint64_t *arcflow_result_seeds(const arcflow_result *result, size_t *count) {
    if (count != nullptr) *count = 0;
    const uint64_t *none = nullptr;
    return of(result, none, [&](const Result &r) {
        if (count != nullptr) *count = r.images.seeds.size();
        return r.images.seeds.data();
    });
}

const char *arcflow_result_warnings(const arcflow_result *result) {
    return of(result, "", [](const Result &r) { return r.warnings.c_str(); });
}

const char *arcflow_result_timings(const arcflow_result *result) {
    return of(result, "", [](const Result &r) { return r.timings.c_str(); });
}

arcflow_status arcflow_noise(uint64_t seed, size_t count, float *noise) {
    return guarded([&] {
        check_not_null(noise, "noise");
        arcflow::randn(seed, count, noise);
    });
}
