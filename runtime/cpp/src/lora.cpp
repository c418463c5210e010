// Joins LoRAs into the inputs of slots, and keeps the sets that were used last.
#include "lora.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "constants.h"
#include "error.h"

namespace arcflow {
namespace {

bool is_encoder(const std::string &part) { return part.rfind("text_encoder", 0) == 0; }

LoraKey key_of(const std::vector<ScaledLora> &loras) {
    LoraKey key;
    for (const ScaledLora &given : loras) key.emplace_back(given.lora->number, given.scale);
    std::sort(key.begin(), key.end());
    return key;
}

// The factors of one linear, with the LoRA that they are from and its scale.
struct Found {
    const Lora *lora;
    const LoraFactors *factors;
    float scale;
};

std::vector<Found> find_factors(const std::vector<ScaledLora> &loras, const std::string &part,
                                const std::string &layer) {
    std::vector<Found> found;
    for (const ScaledLora &given : loras) {
        const auto place = given.lora->parts.find(part);
        if (place == given.lora->parts.end()) continue;
        const auto factors = place->second.find(layer);
        if (factors != place->second.end()) found.push_back({given.lora.get(), &factors->second, given.scale});
    }
    return found;
}

int64_t joined_rank(const std::string &layer, const std::vector<Found> &found, const LoraSlots &slots) {
    int64_t total = 0;
    std::string shown;
    for (const Found &f : found) {
        total += f.factors->rank();
        shown += (shown.empty() ? "" : ", ") + f.lora->name + " (" + std::to_string(f.factors->rank()) + ")";
    }
    if (total > slots.max_rank) {
        throw request_error("request.loras: the ranks at " + layer + " must add up to at most " +
                            std::to_string(slots.max_rank) + " in this bundle, got " + std::to_string(total) + ": " +
                            shown + "; give fewer LoRAs, or export with --lora-max-rank " + std::to_string(total));
    }
    return total;
}

bool is_finite(const Tensor &tensor) {
    const Tensor wide = cast(tensor, DType::float32);
    return std::all_of(wide.as<float>(), wide.as<float>() + wide.count(), [](float x) { return std::isfinite(x); });
}

// The second factor times `scale`, computed in float32 and rounded to its dtype.
Tensor scaled(const Tensor &factor, float scale) {
    Tensor wide = cast(factor, DType::float32);
    float *values = wide.as<float>();
    for (int64_t i = 0, count = wide.count(); i < count; ++i) values[i] *= scale;
    return cast(std::move(wide), factor.dtype);
}

// The inputs of one slot.
std::pair<Tensor, Tensor> join_factors(const std::string &name, const SlotLayer &slot, const std::vector<Found> &found,
                                       int64_t rank, int64_t multiple) {
    Tensor a(slot.dtype, {slot.in_features, rank / multiple, multiple});
    Tensor b(slot.dtype, {rank / multiple, multiple, slot.out_features});
    const size_t row = a.data.size() / static_cast<size_t>(slot.in_features);
    size_t column = 0, end = 0;  // bytes written so far in each row of `a`, and in `b`
    for (const Found &f : found) {
        const Tensor part = scaled(f.factors->b, f.scale);
        if (!is_finite(part) || !is_finite(f.factors->a)) {
            throw request_error("request.loras: the factors of " + f.lora->name + " at " + name +
                                " must be finite in " + name_of(slot.dtype) +
                                ", got values beyond its range; give a smaller scale");
        }
        const size_t bytes = f.factors->a.data.size() / static_cast<size_t>(slot.in_features);
        for (size_t i = 0; i < static_cast<size_t>(slot.in_features); ++i)
            std::memcpy(a.data.data() + i * row + column, f.factors->a.data.data() + i * bytes, bytes);
        std::memcpy(b.data.data() + end, part.data.data(), part.data.size());
        column += bytes;
        end += part.data.size();
    }
    return {std::move(a), std::move(b)};
}

// c A or (c A) B: [n, k] times [k, m], both float32, added to the first m of `stride` columns of `out`.
void add_product(const float *left, const float *right, int64_t n, int64_t k, int64_t m, float *out, int64_t stride) {
    std::vector<float> sums(static_cast<size_t>(m));
    for (int64_t i = 0; i < n; ++i) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t j = 0; j < k; ++j) {
            const float factor = left[i * k + j];
            const float *row = right + j * m;
            for (int64_t c = 0; c < m; ++c) sums[static_cast<size_t>(c)] += factor * row[c];
        }
        for (int64_t c = 0; c < m; ++c) out[i * stride + c] += sums[static_cast<size_t>(c)];
    }
}

}  // namespace

size_t PreparedLoras::bytes() const {
    size_t total = 0;
    for (const auto &[part, tensors] : inputs)
        for (const auto &[name, tensor] : tensors) total += tensor.data.size();
    return total;
}

const Tensors *PreparedLoras::of(const std::string &part) const {
    const auto found = inputs.find(part);
    return found == inputs.end() ? nullptr : &found->second;
}

PreparedLoras prepare_loras(const Manifest &manifest, std::vector<ScaledLora> loras) {
    // Sorted, so that the order in which a caller names the LoRAs makes no difference.
    std::sort(loras.begin(), loras.end(),
              [](const ScaledLora &a, const ScaledLora &b) { return a.lora->number < b.lora->number; });
    PreparedLoras made;
    made.key = key_of(loras);
    for (const auto &[part, slots] : manifest.slots()) {
        for (const auto &[name, slot] : slots->layers) {
            const std::vector<Found> found = find_factors(loras, part, name);
            if (found.empty()) continue;
            const int64_t rank = joined_rank(name, found, *slots);
            auto [a, b] = join_factors(name, slot, found, rank, slots->rank_multiple);
            Tensors &inputs = made.inputs[part];
            inputs.emplace(lora_a(name), std::move(a));
            inputs.emplace(lora_b(name), std::move(b));
        }
    }
    for (const ScaledLora &given : loras) {
        const auto &parts = given.lora->parts;
        if (std::any_of(parts.begin(), parts.end(), [](const auto &part) { return is_encoder(part.first); }))
            made.text_key.emplace_back(given.lora->number, given.scale);
    }
    return made;
}

Tensor changed_table(Tensor table, const Tensor &conditioning, const ModulationTable &spec, const Tensors &inputs) {
    const int64_t steps = table.shape[0], width = table.shape[1];
    for (const auto &[name, column] : *spec.columns) {
        const auto found = inputs.find(lora_a(name));
        if (found == inputs.end()) continue;
        const Tensor &a = found->second, &b = inputs.at(lora_b(name));
        const int64_t rank = a.shape[1] * a.shape[2];
        std::vector<float> low(static_cast<size_t>(steps * rank));
        add_product(conditioning.as<float>(), a.as<float>(), steps, a.shape[0], rank, low.data(), rank);
        add_product(low.data(), b.as<float>(), steps, rank, b.shape[2], table.as<float>() + column, width);
    }
    return table;
}

std::shared_ptr<const PreparedLoras> LoraSets::get(const std::vector<ScaledLora> &loras) {
    const LoraKey key = key_of(loras);
    if (auto kept = find(key)) return kept;
    const std::lock_guard making(making_);
    if (auto kept = find(key)) return kept;  // another thread made it meanwhile
    auto made = std::make_shared<const PreparedLoras>(prepare_loras(manifest_, loras));
    put(made, loras);
    return made;
}

void LoraSets::forget(const Lora &lora) {
    const std::lock_guard lock(lock_);
    entries_.remove_if([&](const Entry &entry) {
        const LoraKey &key = entry.set->key;
        return std::any_of(key.begin(), key.end(), [&](const auto &item) { return item.first == lora.number; });
    });
}

std::shared_ptr<const PreparedLoras> LoraSets::find(const LoraKey &key) {
    const std::lock_guard lock(lock_);
    const auto found =
        std::find_if(entries_.begin(), entries_.end(), [&](const Entry &entry) { return entry.set->key == key; });
    if (found == entries_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, found);
    return found->set;
}

void LoraSets::put(std::shared_ptr<const PreparedLoras> set, const std::vector<ScaledLora> &loras) {
    const std::lock_guard lock(lock_);
    // A LoRA may be closed while its set is prepared, after `forget`; such a set is dropped here.
    entries_.remove_if([](const Entry &entry) {
        return std::any_of(entry.loras.begin(), entry.loras.end(), [](const auto &lora) { return lora.expired(); });
    });
    Entry entry{std::move(set), {}};
    for (const ScaledLora &given : loras) entry.loras.emplace_back(given.lora);
    entries_.push_front(std::move(entry));
    size_t count = 0, bytes = 0;
    // The newest stays, whatever its size.
    for (auto place = entries_.begin(); place != entries_.end(); ++place) {
        bytes += place->set->bytes();
        ++count;
        if (count > 1 && (count > cached_lora_sets || bytes > cached_lora_bytes)) {
            entries_.erase(place, entries_.end());
            break;
        }
    }
}

}  // namespace arcflow
