// Objects that one caller uses at a time and the next may use again, such as the requests of an engine.
#pragma once

#include <mutex>
#include <utility>
#include <vector>

namespace arcflow {

// Keeps as many objects as there were callers at once; `Object` can be moved. Safe to use from several threads.
template <class Object> class Pool {
public:
    // One that nobody uses, or what `make` gives.
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
