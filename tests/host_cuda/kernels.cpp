// Modules and kernel launches. A module must be code for a GPU that contains the kernel's name. A launch runs the
// kernel's source built for the CPU (kernel_host.cpp).
#include <elf.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "driver.h"

extern "C" {
int emulate(const char *name, unsigned int grid, unsigned int block, size_t shared_bytes, const void *means,
            const void *logweights, const void *loggammas, const float *latents, float *next, void *input,
            const double *sigmas, long long tokens, int step, int modes, int channels, int sub_pixels);
int emulate_euler(const char *name, unsigned int grid, unsigned int block, const void *velocity, const void *negative,
                  const float *latents, float *next, void *input, const double *sigmas, const float *scale,
                  long long tokens, int step, int channels);
int emulate_noise(const char *input_type, unsigned int grid, unsigned int block, size_t shared_bytes,
                  const long long *streams, float *latents, void *input, int channels, int height, int width,
                  int patch);
}

namespace host_cuda {
namespace {

constexpr unsigned fatbin_magic = 0xBA55ED50, most_threads = 1024, most_shared_bytes = 48 << 10;
const std::string update_prefix = "arcflow_update_", euler_prefix = "arcflow_euler_", noise_prefix = "arcflow_noise_";

struct Kernel {
    std::string name;
};

struct Module {
    std::string code;
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
};

struct Loaded {
    std::map<void *, std::unique_ptr<Module>> modules;
    std::map<void *, Kernel *> kernels;  // by handle, of all modules
    std::mutex running;                  // kernel_host.cpp runs one block at a time
};

Loaded &loaded() {
    static auto *const all = new Loaded;
    return *all;
}

// Copies a cubin, a fatbin or PTX, whose length the caller does not pass; nothing if it is neither.
std::optional<std::string> image(const void *code) {
    const char *const bytes = static_cast<const char *>(code);
    if (std::memcmp(bytes, ELFMAG, SELFMAG) == 0) {
        Elf64_Ehdr header;
        std::memcpy(&header, bytes, sizeof header);
        const size_t sections = header.e_shoff + size_t{header.e_shnum} * header.e_shentsize;
        const size_t segments = header.e_phoff + size_t{header.e_phnum} * header.e_phentsize;
        return std::string(bytes, std::max(sections, segments));
    }
    struct {
        unsigned magic;
        unsigned short version, header_bytes;
        unsigned long long bytes;
    } fatbin;
    std::memcpy(&fatbin.magic, bytes, sizeof fatbin.magic);
    if (fatbin.magic == fatbin_magic) {
        std::memcpy(&fatbin, bytes, sizeof fatbin);
        return std::string(bytes, fatbin.header_bytes + fatbin.bytes);
    }
    std::string text(bytes);
    if (text.find(".version") != std::string::npos) return text;
    return std::nullopt;
}

CUresult load(void **handle, const void *code) {
    if (handle == nullptr || code == nullptr) return CUDA_ERROR_INVALID_VALUE;
    auto found = image(code);
    if (!found) return CUDA_ERROR_INVALID_IMAGE;
    auto module = std::make_unique<Module>();
    module->code = std::move(*found);
    *handle = module.get();
    loaded().modules[*handle] = std::move(module);
    return CUDA_SUCCESS;
}

CUresult unload(void *handle) {
    const auto found = loaded().modules.find(handle);
    if (found == loaded().modules.end()) return CUDA_ERROR_INVALID_HANDLE;
    for (const auto &[name, kernel] : found->second->kernels) loaded().kernels.erase(kernel.get());
    loaded().modules.erase(found);
    return CUDA_SUCCESS;
}

CUresult kernel(void **handle, void *module, const char *name) {
    const auto found = loaded().modules.find(module);
    if (found == loaded().modules.end()) return CUDA_ERROR_INVALID_HANDLE;
    Module &all = *found->second;
    if (all.code.find(name) == std::string::npos) return CUDA_ERROR_NOT_FOUND;
    auto &made = all.kernels[name];
    if (made == nullptr) made = std::make_unique<Kernel>(Kernel{name});
    loaded().kernels[made.get()] = made.get();
    *handle = made.get();
    return CUDA_SUCCESS;
}

size_t bytes_of(const std::string &type) { return type == "float32" ? 4 : 2; }

// The host address of a kernel's argument, looked up when the kernel runs. Sets `good` to false if it is invalid.
void *at(CUdeviceptr address, size_t bytes, const char *what, bool &good, bool optional = false) {
    if (optional && address == 0) return nullptr;
    void *const found = resolve(address, bytes, what);
    good = good && found != nullptr;
    return found;
}

std::function<CUresult()> update(const std::string &name, unsigned grid, unsigned block, size_t shared, void **given) {
    CUdeviceptr address[7];
    for (size_t i = 0; i < 7; ++i) address[i] = *static_cast<CUdeviceptr *>(given[i]);
    const auto tokens = *static_cast<long long *>(given[7]);
    int number[4];  // step, modes, channels, sub_pixels
    for (size_t i = 0; i < 4; ++i) number[i] = *static_cast<int *>(given[8 + i]);
    const std::string types = name.substr(update_prefix.size());
    const size_t middle = types.find('_'), head = bytes_of(types.substr(0, middle));
    const size_t input = bytes_of(types.substr(middle + 1)), n = static_cast<size_t>(tokens);
    const size_t step = static_cast<size_t>(number[0]), modes = static_cast<size_t>(number[1]);
    const size_t channels = static_cast<size_t>(number[2]), sub_pixels = static_cast<size_t>(number[3]);
    return [=] {
        bool good = true;
        const void *means = at(address[0], n * modes * channels * head, "update: means", good);
        const void *logweights = at(address[1], n * modes * sub_pixels * head, "update: logweights", good);
        const void *loggammas =
            at(address[2], n * (modes - 1) * sub_pixels * head, "update: loggammas", good, modes == 1);
        const void *latents = at(address[3], n * channels * sizeof(float), "update: latents", good);
        void *next = at(address[4], n * channels * sizeof(float), "update: next latents", good);
        void *made = at(address[5], n * channels * input, "update: engine input", good, true);
        const void *sigmas = at(address[6], (step + 2) * sizeof(double), "update: sigmas", good);
        if (!good) return CUDA_ERROR_ILLEGAL_ADDRESS;
        const Lock one(loaded().running);
        const int failed =
            emulate(name.c_str(), grid, block, shared, means, logweights, loggammas,
                    static_cast<const float *>(latents), static_cast<float *>(next), made,
                    static_cast<const double *>(sigmas), tokens, number[0], number[1], number[2], number[3]);
        return failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
    };
}

std::function<CUresult()> euler(const std::string &name, unsigned grid, unsigned block, void **given) {
    CUdeviceptr address[7];
    for (size_t i = 0; i < 7; ++i) address[i] = *static_cast<CUdeviceptr *>(given[i]);
    const auto tokens = *static_cast<long long *>(given[7]);
    const int step = *static_cast<int *>(given[8]), channels = *static_cast<int *>(given[9]);
    const std::string types = name.substr(euler_prefix.size());
    const size_t middle = types.find('_'), count = static_cast<size_t>(tokens) * static_cast<size_t>(channels);
    const size_t head = bytes_of(types.substr(0, middle)), input = bytes_of(types.substr(middle + 1));
    return [=] {
        bool good = true;
        const void *velocity = at(address[0], count * head, "euler: velocity", good);
        const void *negative = at(address[1], count * head, "euler: negative", good, true);
        const void *latents = at(address[2], count * sizeof(float), "euler: latents", good);
        void *next = at(address[3], count * sizeof(float), "euler: next latents", good);
        void *made = at(address[4], count * input, "euler: engine input", good, true);
        const void *sigmas = at(address[5], (static_cast<size_t>(step) + 2) * sizeof(double), "euler: sigmas", good);
        const void *scale = at(address[6], sizeof(float), "euler: scale", good, address[1] == 0);
        if (!good) return CUDA_ERROR_ILLEGAL_ADDRESS;
        const Lock one(loaded().running);
        const int failed =
            emulate_euler(name.c_str(), grid, block, velocity, negative, static_cast<const float *>(latents),
                          static_cast<float *>(next), made, static_cast<const double *>(sigmas),
                          static_cast<const float *>(scale), tokens, step, channels);
        return failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
    };
}

std::function<CUresult()> noise(const std::string &name, unsigned grid, unsigned block, size_t shared, void **given) {
    CUdeviceptr address[3];
    for (size_t i = 0; i < 3; ++i) address[i] = *static_cast<CUdeviceptr *>(given[i]);
    int number[4];  // channels, height, width, patch
    size_t count = grid;
    for (size_t i = 0; i < 4; ++i) number[i] = *static_cast<int *>(given[3 + i]);
    for (size_t i = 0; i < 3; ++i) count *= static_cast<size_t>(number[i]);
    const std::string type = name.substr(noise_prefix.size());
    return [=] {
        bool good = true;
        const void *streams = at(address[0], grid * 2 * sizeof(long long), "noise: streams", good);
        void *latents = at(address[1], count * sizeof(float), "noise: latents", good);
        void *made = at(address[2], count * bytes_of(type), "noise: engine input", good, true);
        if (!good) return CUDA_ERROR_ILLEGAL_ADDRESS;
        const Lock one(loaded().running);
        const int failed =
            emulate_noise(type.c_str(), grid, block, shared, static_cast<const long long *>(streams),
                          static_cast<float *>(latents), made, number[0], number[1], number[2], number[3]);
        return failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
    };
}

CUresult launch(void *handle, const CUlaunchConfig &config, void **given) {
    const auto found = loaded().kernels.find(handle);
    if (found == loaded().kernels.end()) return CUDA_ERROR_INVALID_HANDLE;
    const std::string &name = found->second->name;
    const unsigned grid = config.gridDimX, block = config.blockDimX, shared = config.sharedMemBytes;
    const bool flat = config.gridDimY == 1 && config.gridDimZ == 1 && config.blockDimY == 1 && config.blockDimZ == 1;
    if (grid == 0 || block == 0 || block > most_threads || shared > most_shared_bytes || !flat || given == nullptr)
        return CUDA_ERROR_INVALID_VALUE;
    if (name.compare(0, noise_prefix.size(), noise_prefix) == 0)
        return submit(config.hStream, {"kernel", noise(name, grid, block, shared, given), {}, {}});
    if (name.compare(0, update_prefix.size(), update_prefix) == 0)
        return submit(config.hStream, {"kernel", update(name, grid, block, shared, given), {}, {}});
    if (name.compare(0, euler_prefix.size(), euler_prefix) == 0)
        return submit(config.hStream, {"kernel", euler(name, grid, block, given), {}, {}});
    return CUDA_ERROR_NOT_SUPPORTED;  // not a kernel of kernel_host.cpp
}

}  // namespace

size_t live_modules() { return loaded().modules.size(); }

}  // namespace host_cuda

using namespace host_cuda;

extern "C" {

CUresult cuModuleLoadData(CUmodule *module, const void *code) {
    HOST_CUDA_CALL(context);
    return call.unsafe() ? call.error : load(reinterpret_cast<void **>(module), code);
}

CUresult cuModuleUnload(CUmodule module) {
    HOST_CUDA_CALL(context);
    return call.unsafe() ? call.error : unload(module);
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    HOST_CUDA_CALL(context);
    return kernel(reinterpret_cast<void **>(function), module, name);
}

CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *, void **, unsigned, CUlibraryOption *,
                           void **, unsigned) {
    HOST_CUDA_CALL(driver);
    return call.unsafe() ? call.error : load(reinterpret_cast<void **>(library), code);
}

CUresult cuLibraryUnload(CUlibrary library) {
    HOST_CUDA_CALL(driver);
    return call.unsafe() ? call.error : unload(library);
}

CUresult cuLibraryGetKernel(CUkernel *function, CUlibrary library, const char *name) {
    HOST_CUDA_CALL(driver);
    return kernel(reinterpret_cast<void **>(function), library, name);
}

CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
    HOST_CUDA_CALL(context);
    *function = reinterpret_cast<CUfunction>(kernel);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void **arguments,
                        void **) {
    HOST_CUDA_CALL(context);
    return launch(function, {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, stream, nullptr, 0},
                  arguments);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **) {
    HOST_CUDA_CALL(context);
    return launch(function, *config, arguments);
}
}
