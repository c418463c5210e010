// What stands behind the C ABI's handles: a handle is a number that is never given twice, so that one which is stale,
// or was never given, is found out and never followed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace arcflow {

// Objects by handle; `Handle` is an incomplete type of the C header. Safe to use from several threads.
template <class Handle, class Object> class Registry {
public:
    Handle *add(std::shared_ptr<Object> object) {
        const std::lock_guard lock(lock_);
        objects_.emplace(next_, std::move(object));
        return reinterpret_cast<Handle *>(next_++);
    }

    // Null for a handle that is not, or no longer, known.
    std::shared_ptr<Object> find(const Handle *handle) const {
        const std::lock_guard lock(lock_);
        const auto found = objects_.find(reinterpret_cast<std::uintptr_t>(handle));
        return found == objects_.end() ? nullptr : found->second;
    }

    // Takes the object out; null likewise. Of several threads, one gets it.
    std::shared_ptr<Object> remove(const Handle *handle) {
        const std::lock_guard lock(lock_);
        const auto found = objects_.find(reinterpret_cast<std::uintptr_t>(handle));
        if (found == objects_.end()) return nullptr;
        std::shared_ptr<Object> object = std::move(found->second);
        objects_.erase(found);
        return object;
    }

private:
    mutable std::mutex lock_;
    std::uintptr_t next_ = 1;
    std::map<std::uintptr_t, std::shared_ptr<Object>> objects_;
};

}  // namespace arcflow
