// Reads and replaces cache files.
#include "trt_runtime_cache.h"

#include <fcntl.h>
#include <pwd.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <system_error>

#include "sha256.h"

namespace arcflow {
namespace {

namespace fs = std::filesystem;

constexpr size_t digits = 32;  // number of hexadecimal digits of the key's SHA-256 in the file name

std::string file_name(const std::vector<std::string> &key) {
    std::string joined;
    for (const std::string &part : key) joined += (&part == &key.front() ? "" : "\n") + part;
    return "tensorrt-rtx-" + sha256(joined).substr(0, digits) + ".cache";
}

std::string environment(const char *name) {
    const char *value = std::getenv(name);
    return value == nullptr ? "" : value;
}

std::optional<fs::path> home() {
    if (const char *named = std::getenv("HOME")) return *named == '\0' ? "/" : named;
    constexpr size_t room = 16384;
    std::vector<char> text(room);
    passwd entry{}, *found = nullptr;
    if (getpwuid_r(getuid(), &entry, text.data(), text.size(), &found) != 0 || found == nullptr) return std::nullopt;
    return found->pw_dir;
}

// An open file descriptor, closed by the destructor, which also releases its lock.
struct File {
    explicit File(int number_) : number(number_) {}
    ~File() {
        if (number >= 0) ::close(number);
    }
    File(const File &) = delete;
    File &operator=(const File &) = delete;

    const int number;
};

constexpr mode_t rights = 0666;  // the umask takes away from these

// Write a whole file. Returns 0 or an errno.
int write_whole(const fs::path &path, std::string_view data) {
    const File file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, rights));
    if (file.number < 0) return errno;
    while (!data.empty()) {
        const ssize_t count = ::write(file.number, data.data(), data.size());
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return errno;
        data.remove_prefix(static_cast<size_t>(count));
    }
    return 0;
}

}  // namespace

int replace_whole(const fs::path &path, std::string_view data) {
    std::error_code failed;
    fs::create_directories(path.parent_path(), failed);
    if (failed) return failed.value();
    fs::path lock_path = path, partial = path;
    lock_path.replace_extension(".lock");
    partial += "." + std::to_string(getpid()) + ".partial";
    const File lock(::open(lock_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, rights));
    if (lock.number < 0) return errno;
    while (flock(lock.number, LOCK_EX) != 0)
        if (errno != EINTR) return errno;
    int error = write_whole(partial, data);
    if (error == 0 && std::rename(partial.c_str(), path.c_str()) != 0) error = errno;
    if (error != 0) ::unlink(partial.c_str());
    return error;
}

std::optional<std::string> read_whole(const fs::path &path, uint64_t max_bytes) {
    // Size and content come from one open file, since another process may replace the file meanwhile.
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    const auto end = file ? static_cast<std::streamoff>(file.tellg()) : std::streamoff{-1};
    if (end < 0 || static_cast<uint64_t>(end) > max_bytes) return std::nullopt;
    std::string data(static_cast<size_t>(end), '\0');
    file.seekg(0);
    if (!file.read(data.data(), static_cast<std::streamsize>(end))) return std::nullopt;
    return data;
}

std::optional<fs::path> cache_folder() {
    if (std::string named = environment("ARCFLOW_CACHE"); !named.empty()) return named;
    if (const std::string named = environment("XDG_CACHE_HOME"); !named.empty()) return fs::path(named) / "arcflow";
    const std::optional<fs::path> of_user = home();
    return of_user ? std::optional(*of_user / ".cache" / "arcflow") : std::nullopt;
}

RuntimeCacheFile::RuntimeCacheFile(const std::vector<std::string> &key, const fs::path &folder)
    : path(folder / file_name(key)) {}

std::optional<std::string> RuntimeCacheFile::read(uint64_t max_bytes) {
    std::optional<std::string> data = read_whole(path, max_bytes);
    if (data) written_ = sha256(*data);
    return data;
}

void RuntimeCacheFile::write(std::string_view data) {
    const std::string digest = sha256(data);
    if (digest == written_) return;
    if (const int error = replace_whole(path, data); error != 0) {
        std::fprintf(stderr, "arcflow: what TensorRT-RTX compiled cannot be kept in %s: %s\n",
                     path.parent_path().c_str(), std::generic_category().message(error).c_str());
    }
    written_ = digest;
}

void RuntimeCache::open(std::unique_ptr<CompiledKernels> kernels) {
    kernels_ = std::move(kernels);
    if (kernels_ == nullptr) return;
    if (const std::optional<std::string> kept = file_.read()) kernels_->take(*kept);
}

void RuntimeCache::save() {
    if (kernels_ == nullptr) return;
    if (const std::string data = kernels_->bytes(); !data.empty()) file_.write(data);
}

}  // namespace arcflow
