// What TensorRT-RTX compiles for a GPU when an engine first runs, kept on disk: bytes <-> one file per key, the same
// files as the Python runtime's. A file is replaced whole, under a lock that keeps two writers from doing it at once.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace arcflow {

// The user's folder for what is compiled: ARCFLOW_CACHE, or arcflow in XDG_CACHE_HOME or ~/.cache. None where the user
// has no home.
std::optional<std::filesystem::path> cache_folder();

// The file of one key: the engine's SHA-256, library's version, driver's version and GPU.
class RuntimeCacheFile {
public:
    RuntimeCacheFile(const std::vector<std::string> &key, const std::filesystem::path &folder);

    const std::filesystem::path path;

    // What an earlier run left; nothing where it cannot be read or has more than `max_bytes`.
    std::optional<std::string> read(uint64_t max_bytes = uint64_t{1} << 30);

    // Replace the file, unless it holds this already. That it cannot be written is said on stderr and costs time only.
    void write(std::string_view data);

private:
    std::string written_;  // digest of what the file holds
};

// The library's cache of one engine, behind an interface of ours.
class CompiledKernels {
public:
    virtual ~CompiledKernels() = default;

    // Take what `bytes` gave; false where they are damaged or from another machine.
    virtual bool take(std::string_view data) = 0;
    virtual std::string bytes() = 0;  // "" where there is nothing to keep
};

// One engine's cache, and the lock of whatever compiles for it: making contexts and their first runs.
class RuntimeCache {
public:
    explicit RuntimeCache(RuntimeCacheFile file) : file_(std::move(file)) {}

    std::mutex mutex;

    // The rest is for who holds the mutex. `open` fills the kernels from the file, whose failure only costs time.
    void open(std::unique_ptr<CompiledKernels> kernels);

    // Keep on disk what was compiled so far.
    void save();

    // Free the kernels, which must not outlive their engine.
    void close() { kernels_.reset(); }

private:
    RuntimeCacheFile file_;
    std::unique_ptr<CompiledKernels> kernels_;
};

}  // namespace arcflow
