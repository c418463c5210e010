// Device and pinned memory, copies and memsets.
//
// Device addresses come from a reserved range that is neither readable nor writable; each allocation's bytes are
// elsewhere in host memory. An address is reused only after the whole range was used, so that access to freed memory is
// an error.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "driver.h"

namespace host_cuda {
namespace {

constexpr size_t space_bytes = size_t{64} << 30, most_memory = size_t{32} << 30, alignment = 512;
constexpr size_t kept_bytes = size_t{64} << 20;
constexpr int poison = 0xFF;

struct Block {
    size_t bytes;
    std::shared_ptr<char[]> content;
};

struct Memory {
    CUdeviceptr space = 0, next = 0;
    size_t capacity = size_t{8} << 30, used = 0, pinned_bytes = 0;
    std::map<CUdeviceptr, Block> blocks;
    std::map<CUdeviceptr, size_t> pinned;
    std::deque<Block> freed;  // kept for a while, because work running in another thread may still write to it
    size_t freed_bytes = 0;

    Memory() {
        void *range = mmap(nullptr, space_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) std::abort();
        space = next = (reinterpret_cast<CUdeviceptr>(range) + alignment - 1) / alignment * alignment;
    }

    bool on_device(CUdeviceptr address) const { return address >= space && address < space + space_bytes - alignment; }
};

Memory &memories() {
    static auto *const all = new Memory;
    return *all;
}

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// The allocation that holds all of `bytes` bytes at an address; the end of the map if there is none.
template <class Map, class Bytes> auto holder(Map &map, CUdeviceptr address, size_t bytes, Bytes bytes_of) {
    auto found = map.upper_bound(address);
    if (found == map.begin()) return map.end();
    --found;
    const size_t offset = address - found->first, whole = bytes_of(found->second);
    return offset <= whole && bytes <= whole - offset && (offset < whole || bytes == 0) ? found : map.end();
}

// An unused address for an allocation and a gap after it; 0 if there is none.
CUdeviceptr room(size_t bytes) {
    Memory &m = memories();
    const size_t wanted = round_up(bytes, alignment) + alignment;
    for (int turn = 0; turn < 2; ++turn) {
        CUdeviceptr begin = m.next;
        while (begin + wanted <= m.space + space_bytes - alignment) {
            const auto above = m.blocks.lower_bound(begin);
            if (above == m.blocks.end() || above->first >= begin + wanted) {
                m.next = begin + wanted;
                return begin;
            }
            begin = above->first + round_up(above->second.bytes, alignment) + alignment;
        }
        m.next = m.space;
    }
    return 0;
}

CUresult allocate_pinned(void **memory, size_t bytes) {
    if (memory == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    const size_t whole = round_up(bytes, page());
    void *made = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(made, poison, bytes);
    memories().pinned[reinterpret_cast<CUdeviceptr>(made)] = bytes;
    memories().pinned_bytes += bytes;
    *memory = made;
    return CUDA_SUCCESS;
}

CUdeviceptr host(const void *memory) { return reinterpret_cast<CUdeviceptr>(memory); }

// Enqueues a copy. Invalid addresses are refused here; memory that is freed before the copy runs is a fault then.
CUresult copy(Call &call, CUdeviceptr target, CUdeviceptr source, size_t bytes, const Stream &stream) {
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const Where to = where(target, bytes), from = where(source, bytes);
    if (to == Where::invalid || from == Where::invalid) {
        state().fault = "copy of " + std::to_string(bytes) + " bytes";
        return CUDA_ERROR_INVALID_VALUE;
    }
    std::shared_ptr<char[]> staged;
    if (from == Where::pageable && stream->capture == nullptr) {  // the caller may change it after the call
        staged.reset(new char[bytes]);
        std::memcpy(staged.get(), reinterpret_cast<void *>(source), bytes);
    }
    const auto find = [](Where place, CUdeviceptr address, size_t count, const char *what) {
        return place == Where::pageable ? reinterpret_cast<void *>(address) : resolve(address, count, what);
    };
    const CUresult result = submit(stream, {"copy",
                                            [=] {
                                                void *const there = find(to, target, bytes, "copy's target");
                                                const void *const here =
                                                    staged ? staged.get() : find(from, source, bytes, "copy's source");
                                                if (there == nullptr || here == nullptr)
                                                    return CUDA_ERROR_ILLEGAL_ADDRESS;
                                                std::memmove(there, here, bytes);
                                                return CUDA_SUCCESS;
                                            },
                                            {},
                                            {}});
    // A copy to memory that is not pinned is complete when the call returns.
    if (result != CUDA_SUCCESS || to != Where::pageable || stream->capture != nullptr) return result;
    return wait(call.lock, {stream, stream->submitted});
}

CUresult copy_now(Call &call, CUdeviceptr target, CUdeviceptr source, size_t bytes) {
    if (call.unsafe()) return call.error;
    const Stream stream = state().legacy;
    const CUresult result = copy(call, target, source, bytes, stream);
    return result != CUDA_SUCCESS ? result : wait(call.lock, {stream, stream->submitted});
}

CUresult fill(CUdeviceptr target, std::vector<unsigned char> value, size_t count, const Stream &stream) {
    const size_t bytes = value.size() * count;
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (where(target, bytes) == Where::pageable || where(target, bytes) == Where::invalid)
        return CUDA_ERROR_INVALID_VALUE;
    return submit(stream, {"memset",
                           [=, value = std::move(value)] {
                               auto *const there =
                                   static_cast<unsigned char *>(resolve(target, bytes, "memset's target"));
                               if (there == nullptr) return CUDA_ERROR_ILLEGAL_ADDRESS;
                               for (size_t i = 0; i < bytes; ++i) there[i] = value[i % value.size()];
                               return CUDA_SUCCESS;
                           },
                           {},
                           {}});
}

std::vector<unsigned char> bytes_of(unsigned value) {
    std::vector<unsigned char> bytes(sizeof value);
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
}

}  // namespace

size_t live_device_bytes() { return memories().used; }
size_t live_pinned_bytes() { return memories().pinned_bytes; }

void forget_memory() {
    Memory &m = memories();
    for (const auto &[address, bytes] : m.pinned) munmap(reinterpret_cast<void *>(address), round_up(bytes, page()));
    m.pinned.clear();
    m.blocks.clear();
    m.used = m.pinned_bytes = 0;
}

void set_memory(size_t bytes) { memories().capacity = std::min(bytes, most_memory); }
size_t memory() { return memories().capacity; }

Where where(CUdeviceptr address, size_t bytes) {
    Memory &m = memories();
    if (m.on_device(address)) {
        const bool found = holder(m.blocks, address, bytes, [](const Block &b) { return b.bytes; }) != m.blocks.end();
        return found ? Where::device : Where::invalid;
    }
    const auto size = [](size_t all) { return all; };
    if (holder(m.pinned, address, 0, size) == m.pinned.end()) return address ? Where::pageable : Where::invalid;
    return holder(m.pinned, address, bytes, size) != m.pinned.end() ? Where::pinned : Where::invalid;
}

void *resolve(CUdeviceptr address, size_t bytes, const char *what) {
    const Lock lock(state().mutex);
    Memory &m = memories();
    switch (where(address, bytes)) {
        case Where::device: {
            const auto found = holder(m.blocks, address, bytes, [](const Block &b) { return b.bytes; });
            return found->second.content.get() + (address - found->first);
        }
        case Where::pinned:
            return reinterpret_cast<void *>(address);
        default:
            break;
    }
    state().fault = std::string(what) + ": " + std::to_string(bytes) + " bytes are not in one live allocation";
    return nullptr;
}

}  // namespace host_cuda

using namespace host_cuda;

extern "C" {

void *host_cuda_at(CUdeviceptr address, size_t bytes) { return resolve(address, bytes, "host_cuda_at"); }

CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) {
    HOST_CUDA_CALL(context);
    if (call.unsafe()) return call.error;
    if (address == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    Memory &m = memories();
    const CUdeviceptr found = bytes <= m.capacity - std::min(m.used, m.capacity) ? room(bytes) : 0;
    if (found == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    // Exactly `bytes`, so that sanitizers notice a write after the end.
    Block block{bytes, std::shared_ptr<char[]>(new char[bytes])};
    std::memset(block.content.get(), poison, bytes);
    m.blocks[found] = std::move(block);
    m.used += bytes;
    *address = found;
    return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr address) {
    HOST_CUDA_CALL(context);
    if (call.unsafe()) return call.error;
    if (address == 0) return CUDA_SUCCESS;
    Memory &m = memories();
    const auto found = m.blocks.find(address);
    if (found == m.blocks.end()) return CUDA_ERROR_INVALID_VALUE;
    std::memset(found->second.content.get(), poison, found->second.bytes);
    m.used -= found->second.bytes;
    m.freed_bytes += found->second.bytes;
    m.freed.push_back(std::move(found->second));
    m.blocks.erase(found);
    while (m.freed_bytes > kept_bytes) {
        m.freed_bytes -= m.freed.front().bytes;
        m.freed.pop_front();
    }
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t *available, size_t *total) {
    HOST_CUDA_CALL(context);
    const Memory &m = memories();
    if (available != nullptr) *available = m.capacity - std::min(m.used, m.capacity);
    if (total != nullptr) *total = m.capacity;
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void **memory, size_t bytes, unsigned) {
    HOST_CUDA_CALL(context);
    return call.unsafe() ? call.error : allocate_pinned(memory, bytes);
}

CUresult cuMemAllocHost(void **memory, size_t bytes) {
    HOST_CUDA_CALL(context);
    return call.unsafe() ? call.error : allocate_pinned(memory, bytes);
}

CUresult cuMemFreeHost(void *memory) {
    HOST_CUDA_CALL(context);
    if (call.unsafe()) return call.error;
    Memory &m = memories();
    const auto found = m.pinned.find(host(memory));
    if (found == m.pinned.end()) return CUDA_ERROR_INVALID_VALUE;
    m.pinned_bytes -= found->second;
    munmap(memory, round_up(found->second, page()));
    m.pinned.erase(found);
    return CUDA_SUCCESS;
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr *address, void *memory, unsigned) {
    HOST_CUDA_CALL(context);
    if (where(host(memory), 0) != Where::pinned) return CUDA_ERROR_INVALID_VALUE;
    *address = host(memory);
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
    HOST_CUDA_CALL(context);
    const Where place = where(address, 0);
    if (place == Where::pageable || place == Where::invalid) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *static_cast<unsigned *>(data) = place == Where::device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
            *static_cast<CUdeviceptr *>(data) = address;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            *static_cast<int *>(data) = 0;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED:
            *static_cast<bool *>(data) = false;
            return CUDA_SUCCESS;
        default:
            return CUDA_ERROR_NOT_SUPPORTED;
    }
}

CUresult cuMemcpy(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
    HOST_CUDA_CALL(context);
    return copy_now(call, target, source, bytes);
}

CUresult cuMemcpyHtoD(CUdeviceptr target, const void *source, size_t bytes) {
    HOST_CUDA_CALL(context);
    return copy_now(call, target, host(source), bytes);
}

CUresult cuMemcpyDtoH(void *target, CUdeviceptr source, size_t bytes) {
    HOST_CUDA_CALL(context);
    return copy_now(call, host(target), source, bytes);
}

CUresult cuMemcpyDtoD(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
    HOST_CUDA_CALL(context);
    return copy_now(call, target, source, bytes);
}

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    HOST_CUDA_CALL(context);
    return copy(call, target, source, bytes, find(stream));
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t bytes, CUstream stream) {
    HOST_CUDA_CALL(context);
    return copy(call, target, host(source), bytes, find(stream));
}

CUresult cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t bytes, CUstream stream) {
    HOST_CUDA_CALL(context);
    return copy(call, host(target), source, bytes, find(stream));
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    HOST_CUDA_CALL(context);
    return copy(call, target, source, bytes, find(stream));
}

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream) {
    HOST_CUDA_CALL(context);
    return fill(target, {value}, count, find(stream));
}

CUresult cuMemsetD32Async(CUdeviceptr target, unsigned value, size_t count, CUstream stream) {
    HOST_CUDA_CALL(context);
    return fill(target, bytes_of(value), count, find(stream));
}
}
