// Keeps objects for reuse, such as the requests of an engine; each is used by one caller at a time.
#pragma once

#include <mutex>
#include <utility>
#include <vector>

namespace arcflow {

// Holds as many objects as there were simultaneous callers. Safe to use from several threads.
template <class Object> class Pool {
public:
    // An idle object, or a new one from `make`.
    template <class Make> Object take(const Make &make) {
        {
            const std::lock_guard lock(lock_);
            if (!idle_.empty()) {
                Object object = std::move(idle_.back());
                idle_.pop_back();
                return object;
            }
        }
        return make();
    }

    void give_back(Object object) {
        const std::lock_guard lock(lock_);
        idle_.push_back(std::move(object));
    }

private:
    std::mutex lock_;
    std::vector<Object> idle_;
};

}  // namespace arcflow
