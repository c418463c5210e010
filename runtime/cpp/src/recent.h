// The values of the keys used last.
#pragma once

#include <algorithm>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

namespace arcflow {

// Thread-safe. Values are shared, so that one that is dropped stays while it is used.
template <class Key, class Value>
class Recent {
public:
    static constexpr std::size_t size = 16;  // few enough to search

    // Null where it is not kept.
    std::shared_ptr<const Value> get(const Key &key) {
        const std::lock_guard lock(lock_);
        const auto found = find(key);
        if (found == entries_.end()) return nullptr;
        entries_.splice(entries_.begin(), entries_, found);
        return found->second;
    }

    // Beyond the bound, the key unused for longest is dropped.
    void put(const Key &key, std::shared_ptr<const Value> value) {
        const std::lock_guard lock(lock_);
        if (const auto found = find(key); found != entries_.end()) entries_.erase(found);
        entries_.emplace_front(key, std::move(value));
        if (entries_.size() > size) entries_.pop_back();
    }

private:
    using Entry = std::pair<Key, std::shared_ptr<const Value>>;

    typename std::list<Entry>::iterator find(const Key &key) {
        return std::find_if(entries_.begin(), entries_.end(), [&](const Entry &e) { return e.first == key; });
    }

    std::mutex lock_;
    std::list<Entry> entries_;  // used last first
};

}  // namespace arcflow
