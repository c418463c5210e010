// A file mapped into memory: the system reads pages when they are accessed and may drop them again.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

#include "error.h"

namespace arcflow {

class MappedFile {
public:
    // Map a file that must have exactly `size` bytes, at least one. Throws Error(ARCFLOW_ENGINE_ERROR).
    MappedFile(const std::filesystem::path &path, uint64_t size) : bytes(static_cast<size_t>(size)) {
        const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
        struct stat status{};
        const bool fits = file >= 0 && fstat(file, &status) == 0 && static_cast<uint64_t>(status.st_size) == size;
        void *found = fits ? mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
        if (file >= 0) ::close(file);
        if (found == MAP_FAILED) {
            throw engine_error(path.string() + (file < 0 || fits ? " cannot be read; check its permissions"
                                                                 : " was changed while it was loaded; load it again"));
        }
        data = static_cast<const std::byte *>(found);
    }
    ~MappedFile() { munmap(const_cast<std::byte *>(data), bytes); }
    MappedFile(const MappedFile &) = delete;
    MappedFile &operator=(const MappedFile &) = delete;

    const size_t bytes;
    const std::byte *data = nullptr;
};

}  // namespace arcflow
