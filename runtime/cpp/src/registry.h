// Maps the handles of the C API to objects. A handle is a number that is used once, so a stale or invented handle is
// detected and never dereferenced.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace arcflow {

// `Handle` is an incomplete type of the C header. Safe to use from several threads.
template <class Handle, class Object> class Registry {
public:
    Handle *add(std::shared_ptr<Object> object) {
        const std::lock_guard lock(lock_);
        objects_.emplace(next_, std::move(object));
        return reinterpret_cast<Handle *>(next_++);
    }

    // The object, or null if the handle is unknown or was removed.
    std::shared_ptr<Object> find(const Handle *handle) const {
        const std::lock_guard lock(lock_);
        const auto found = objects_.find(reinterpret_cast<std::uintptr_t>(handle));
        return found == objects_.end() ? nullptr : found->second;
    }

    // Remove the object and return it; null as for `find`. If several threads call this, one gets the object.
    std::shared_ptr<Object> remove(const Handle *handle) {
        const std::lock_guard lock(lock_);
        const auto found = objects_.find(reinterpret_cast<std::uintptr_t>(handle));
        if (found == objects_.end()) return nullptr;
        std::shared_ptr<Object> object = std::move(found->second);
        objects_.erase(found);
        return object;
    }

    // How many objects there are.
    size_t size() const {
        const std::lock_guard lock(lock_);
        return objects_.size();
    }

private:
    mutable std::mutex lock_;
    std::uintptr_t next_ = 1;
    std::map<std::uintptr_t, std::shared_ptr<Object>> objects_;
};

}  // namespace arcflow
