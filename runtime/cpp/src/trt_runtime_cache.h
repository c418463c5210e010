// Keeps on disk what TensorRT-RTX compiles for a GPU when an engine first runs. There is one file per key, and the
// Python runtime uses the same files. Files are replaced as a whole, under a lock.
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

#include "constants.h"

namespace arcflow {

// The user's cache folder: ARCFLOW_CACHE, or `arcflow` in XDG_CACHE_HOME or ~/.cache. Nothing if the user has no home.
std::optional<std::filesystem::path> cache_folder();

// A file's content; nothing if it cannot be read or has more than `max_bytes`.
std::optional<std::string> read_whole(const std::filesystem::path &path, uint64_t max_bytes);

// Replace a file as a whole, under the lock `<stem>.lock` beside it; makes its folder. Returns 0 or an errno.
int replace_whole(const std::filesystem::path &path, std::string_view data);

// The cache file for a key: SHA-256 of the engine, version of the library, version of the driver, GPU.
class RuntimeCacheFile {
public:
    RuntimeCacheFile(const std::vector<std::string> &key, const std::filesystem::path &folder);

    const std::filesystem::path path;

    // The file's content; nothing if it cannot be read or has more than `max_bytes`.
    std::optional<std::string> read(uint64_t max_bytes = max_runtime_cache_bytes);

    // Replace the file unless it has this content already. If it cannot be written, prints a warning to stderr; the
    // next run then compiles again.
    void write(std::string_view data);

private:
    std::string written_;  // digest of the file's content
};

// The interface of TensorRT-RTX's runtime cache that this library needs.
class CompiledKernels {
public:
    virtual ~CompiledKernels() = default;

    // Load what an earlier `bytes` returned. False if it is damaged or from another machine.
    virtual bool take(std::string_view data) = 0;
    virtual std::string bytes() = 0;  // "" if there is nothing to keep
};

// The cache of one engine, with the lock for everything that compiles: making contexts and their first runs.
class RuntimeCache {
public:
    explicit RuntimeCache(RuntimeCacheFile file) : file_(std::move(file)) {}

    std::mutex mutex;

    // Lock `mutex` before calling what follows. `open` loads the file into the kernels; a file that cannot be used is
    // ignored.
    void open(std::unique_ptr<CompiledKernels> kernels);

    // Write what was compiled so far to disk.
    void save();

    // Free the kernels; must happen before the engine is freed.
    void close() { kernels_.reset(); }

private:
    RuntimeCacheFile file_;
    std::unique_ptr<CompiledKernels> kernels_;
};

}  // namespace arcflow
