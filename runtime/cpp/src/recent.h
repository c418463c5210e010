// A cache of the most recently used values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

#include "constants.h"

namespace arcflow {

// Thread-safe. Values are shared, so a value that the cache drops stays alive for its users.
template <class Key, class Value>
class Recent {
public:
    explicit Recent(std::size_t size = cached_prompts) : size_(size) {}

    // The value, or null if the key is not in the cache.
    std::shared_ptr<const Value> get(const Key &key) {
        const std::lock_guard lock(lock_);
        const auto found = find(key);
        if (found == entries_.end()) return nullptr;
        entries_.splice(entries_.begin(), entries_, found);
        return found->second;
    }

    // Add a value. If the cache is full, it drops the least recently used key.
    void put(const Key &key, std::shared_ptr<const Value> value) {
        const std::lock_guard lock(lock_);
        if (const auto found = find(key); found != entries_.end()) entries_.erase(found);
        entries_.emplace_front(key, std::move(value));
        if (entries_.size() > size_) entries_.pop_back();
    }

private:
    using Entry = std::pair<Key, std::shared_ptr<const Value>>;

    typename std::list<Entry>::iterator find(const Key &key) {
        return std::find_if(entries_.begin(), entries_.end(), [&](const Entry &e) { return e.first == key; });
    }

    const std::size_t size_;
    std::mutex lock_;
    std::list<Entry> entries_;  // most recently used first
};

}  // namespace arcflow
