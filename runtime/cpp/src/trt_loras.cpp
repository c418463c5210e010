// Pads LoRAs to the ranks of arenas, and copies them there.
#include "trt_loras.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace arcflow {
namespace {

// The ranks that arenas have; the largest is the bundle's. The first is also for requests without a LoRA, because an
// engine has no rank 0.
constexpr int64_t ranks[] = {8, 16, 32, 64, 128, 256, 512};

// The smallest arena's rank that holds rank `largest`.
int64_t padded_rank(const LoraSlots &slots, int64_t largest) {
    for (const int64_t rank : ranks)
        if (rank >= largest) return std::min(rank, slots.max_rank);
    return slots.max_rank;
}

// The largest rank among the inputs of slots.
int64_t rank_of(const LoraSlots &slots, const Tensors &inputs) {
    int64_t largest = 0;
    for (const auto &[layer, sizes] : slots.layers)
        if (const auto found = inputs.find(lora_a(layer)); found != inputs.end())
            largest = std::max(largest, found->second.shape[1] * found->second.shape[2]);
    return largest;
}

// Visit each input of the slots: its name, shape and dtype.
template <class Visit> void each_input(const LoraSlots &slots, int64_t rank, const Visit &visit) {
    const int64_t multiple = slots.rank_multiple, groups = rank / multiple;
    for (const auto &[layer, sizes] : slots.layers) {
        visit(lora_a(layer), std::vector<int64_t>{sizes.in_features, groups, multiple}, sizes.dtype);
        visit(lora_b(layer), std::vector<int64_t>{groups, multiple, sizes.out_features}, sizes.dtype);
    }
}

// Copy a factor [in, r, 8] or [r, 8, out] to the start of one of a larger rank, whose rest is zeros.
void fill(std::byte *target, size_t row_bytes, const Tensor &source) {
    const auto rows = static_cast<size_t>(source.shape[0]);
    const size_t bytes = rows == 0 ? 0 : source.data.size() / rows;
    for (size_t row = 0; row < rows; ++row)
        std::memcpy(target + row * row_bytes, source.data.data() + row * bytes, bytes);
}

size_t row_bytes(size_t bytes, const std::vector<int64_t> &shape) { return bytes / static_cast<size_t>(shape[0]); }

}  // namespace

Shapes slot_shapes(const LoraSlots &slots, int64_t rank) {
    Shapes shapes;
    each_input(slots, rank,
               [&](const std::string &name, std::vector<int64_t> shape, DType) { shapes[name] = std::move(shape); });
    return shapes;
}

Tensors pad_inputs(const LoraSlots &slots, const Tensors &inputs) {
    Tensors padded;
    const auto pad = [&](const std::string &name, const std::vector<int64_t> &shape, DType dtype) {
        Tensor &tensor = padded[name] = Tensor(dtype, shape);
        if (const auto found = inputs.find(name); found != inputs.end())
            fill(tensor.data.data(), row_bytes(tensor.data.size(), shape), found->second);
    };
    each_input(slots, padded_rank(slots, rank_of(slots, inputs)), pad);
    return padded;
}

LoraArenas::LoraArenas(Lane &lane, const Manifest &manifest, const std::vector<std::string> &parts, size_t sets,
                       size_t bytes)
    : lane_(lane), most_sets_(sets), most_bytes_(bytes) {
    for (const auto &[part, slots] : manifest.slots())
        if (std::find(parts.begin(), parts.end(), part) != parts.end()) slots_[part] = slots;
}

int64_t LoraArenas::rank(const PreparedLoras &loras) const {
    int64_t largest = 0, padded = 0;
    for (const auto &[part, slots] : slots_)
        if (const Tensors *inputs = loras.of(part)) largest = std::max(largest, rank_of(*slots, *inputs));
    for (const auto &[part, slots] : slots_) padded = std::max(padded, padded_rank(*slots, largest));
    return padded;
}

Shapes LoraArenas::shapes(const std::string &part, int64_t rank) const {
    const auto found = slots_.find(part);
    return found == slots_.end() ? Shapes() : slot_shapes(*found->second, rank);
}

std::map<std::string, cuda::Address> LoraArenas::addresses(const std::string &part, int64_t rank) {
    std::map<std::string, cuda::Address> found;
    if (slots_.count(part) == 0) return found;
    const cuda::Address base = arena(rank).memory->address;
    for (const auto &[name, shape] : shapes(part, rank)) found[name] = base + layout(rank)[name].offset;
    return found;
}

void LoraArenas::put(const PreparedLoras &loras, int64_t rank) {
    Arena &target = arena(rank);
    if (target.holds == loras.key) return;
    const cuda::Memory &source = set(loras, rank);
    target.holds.reset();
    lane_.stream().copy(target.memory->address, source.address, layout(rank).bytes());
    target.holds = loras.key;
}

void LoraArenas::forget() {
    for (auto &[rank, arena] : arenas_) arena.holds.reset();
}

void LoraArenas::drop(uint64_t number) {
    lane_.settle();  // a copy from the set may not have run yet
    sets_.remove_if([&](const Set &set) {
        return std::any_of(set.key.begin(), set.key.end(), [&](const auto &item) { return item.first == number; });
    });
}

bool LoraArenas::release() {
    if (arenas_.empty() && sets_.empty()) return false;
    lane_.settle();
    arenas_.clear();
    sets_.clear();
    return true;
}

const Layout &LoraArenas::layout(int64_t rank) {
    const auto [place, is_new] = layouts_.try_emplace(rank);
    // A linear has its slot in one part only (B14), so names are unique.
    for (const auto &[part, slots] : slots_) {
        if (!is_new) break;
        each_input(*slots, rank, [&](const std::string &name, const std::vector<int64_t> &shape, DType dtype) {
            place->second.add(name, bytes_of(shape, dtype, name), shape);
        });
    }
    return place->second;
}

LoraArenas::Arena &LoraArenas::arena(int64_t rank) {
    const auto found = arenas_.find(rank);
    if (found != arenas_.end()) return found->second;
    Arena made{lane_.allocate(layout(rank).bytes(), "LoRAs of rank " + std::to_string(rank)), {}};
    return arenas_.emplace(rank, std::move(made)).first->second;
}

// The set in device memory; made on first use. The least recently used sets beyond the limits are freed.
const cuda::Memory &LoraArenas::set(const PreparedLoras &loras, int64_t rank) {
    const auto found = std::find_if(sets_.begin(), sets_.end(),
                                    [&](const Set &set) { return set.rank == rank && set.key == loras.key; });
    if (found != sets_.end()) {
        sets_.splice(sets_.begin(), sets_, found);
    } else {
        make_room(layout(rank).bytes());
        sets_.push_front({rank, loras.key, upload(loras, rank)});
    }
    return *sets_.front().memory;
}

void LoraArenas::make_room(size_t bytes) {
    size_t held = bytes;
    for (const Set &set : sets_) held += set.memory->bytes;
    while (!sets_.empty() && (sets_.size() >= most_sets_ || held > most_bytes_)) {
        lane_.settle();  // the copy from the set may not have run yet
        held -= sets_.back().memory->bytes;
        sets_.pop_back();
    }
}

std::unique_ptr<cuda::Memory> LoraArenas::upload(const PreparedLoras &loras, int64_t rank) {
    const Layout &regions = layout(rank);
    const std::string what = "LoRAs of rank " + std::to_string(rank);
    std::unique_ptr<cuda::Memory> memory = lane_.allocate(regions.bytes(), what);
    const std::unique_ptr<cuda::Pinned> pinned = lane_.allocate_pinned(regions.bytes(), what);
    std::memset(pinned->data, 0, regions.bytes());
    for (const auto &[part, slots] : slots_) {
        const Tensors *inputs = loras.of(part);
        if (inputs == nullptr) continue;
        for (const auto &[name, tensor] : *inputs) {
            const Layout::Region &region = regions[name];
            fill(pinned->data + region.offset, row_bytes(region.bytes, region.shape), tensor);
        }
    }
    try {
        lane_.stream().copy(memory->address, pinned->address(), regions.bytes());
        lane_.stream().wait();
    } catch (...) {
        lane_.settle();  // the copy may still run, and reads what is freed now
        throw;
    }
    return memory;
}

}  // namespace arcflow
