// A cache of the most recently used values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

#include "constants.h"

namespace arcflow {

// At most `size` values of at most `max_bytes` together, but always the last one. Thread-safe. Values are shared, so a
// value that the cache drops stays alive for its users.
template <class Key, class Value>
class Recent {
public:
    explicit Recent(std::size_t size = cached_prompts, std::size_t max_bytes = std::numeric_limits<std::size_t>::max())
        : size_(size), max_bytes_(max_bytes) {}

    // The value, or null if the key is not in the cache.
    std::shared_ptr<const Value> get(const Key &key) {
        const std::lock_guard lock(lock_);
        const auto found = find(key);
        if (found == entries_.end()) return nullptr;
        entries_.splice(entries_.begin(), entries_, found);
        return found->value;
    }

    // Add a value, which counts `bytes`. If the cache is full, it drops the least recently used keys.
    void put(const Key &key, std::shared_ptr<const Value> value, std::size_t bytes = 0) {
        const std::lock_guard lock(lock_);
        if (const auto found = find(key); found != entries_.end()) drop(found);
        entries_.push_front({key, std::move(value), bytes});
        bytes_ += bytes;
        while (entries_.size() > 1 && (entries_.size() > size_ || bytes_ > max_bytes_)) drop(std::prev(entries_.end()));
    }

private:
    struct Entry {
        Key key;
        std::shared_ptr<const Value> value;
        std::size_t bytes;
    };

    void drop(typename std::list<Entry>::iterator entry) {
        bytes_ -= entry->bytes;
        entries_.erase(entry);
    }

    typename std::list<Entry>::iterator find(const Key &key) {
        return std::find_if(entries_.begin(), entries_.end(), [&](const Entry &e) { return e.key == key; });
    }

    const std::size_t size_, max_bytes_;
    std::size_t bytes_ = 0;
    std::mutex lock_;
    std::list<Entry> entries_;  // most recently used first
};

}  // namespace arcflow
