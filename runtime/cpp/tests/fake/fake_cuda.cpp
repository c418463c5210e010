// A libcuda.so.1 for tests without a GPU. Device memory is host memory; work in a stream runs at once or is captured;
// the kernels are loops over update_math.h and noise_math.h.
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "noise_math.h"

#pragma GCC visibility push(default)

namespace {

using Address = unsigned long long;
using Work = std::vector<std::function<void()>>;

struct Stream {
    bool capturing = false;
    Work captured;
};

// A time on the fake device's clock, which each kind of work advances by a fixed amount.
struct Event {
    bool recorded = false;
    double ms = 0;
};
constexpr double copy_ms = 0.25, noise_ms = 0.5, update_ms = 1, engine_ms = 10;
double now_ms = 0;

int live_allocations = 0, live_events = 0, graph_launches = 0;
bool refuse_capture = false;
constexpr int invalid = 1, not_ready = 600, stream_capture_unsupported = 900;

int enqueue(void *stream, double ms, std::function<void()> done) {
    auto *s = static_cast<Stream *>(stream);
    auto work = [ms, done = std::move(done)] {
        now_ms += ms;
        done();
    };
    if (s->capturing) s->captured.emplace_back(std::move(work));
    else work();
    return 0;
}

float load(const std::string &type, const void *from, long long i) {
    if (type == "float32") return static_cast<const float *>(from)[i];
    const unsigned short bits = static_cast<const unsigned short *>(from)[i];
    return type == "float16" ? arcflow_update::Float16::value(bits) : arcflow_update::BFloat16::value(bits);
}

void store(const std::string &type, void *to, long long i, float x) {
    if (type == "float32") {
        static_cast<float *>(to)[i] = x;
    } else {
        static_cast<unsigned short *>(to)[i] =
            type == "float16" ? arcflow_update::Float16::round(x) : arcflow_update::BFloat16::round(x);
    }
}

// The update kernel's arguments, in the order of update.cu.
struct Arguments {
    Address means, logweights, loggammas, latents, next, input, sigmas;
    long long tokens;
    int step, modes, channels, sub_pixels;
};

template <class T> const T *at(Address address) { return reinterpret_cast<const T *>(address); }

void update(const std::string &heads, const std::string &input, const Arguments &a) {
    const double *sigmas = at<double>(a.sigmas);
    const arcflow_update::Sum step = arcflow_update::step_of(sigmas[a.step], sigmas[a.step + 1]);
    for (long long i = 0; i < a.tokens * a.channels; ++i) {
        const long long token = i / a.channels, p = i % a.channels % a.sub_pixels;
        float top = -INFINITY, total = 0, mixed = 0;
        const auto logit = [&](int k) {
            return load(heads, at<void>(a.logweights), (token * a.modes + k) * a.sub_pixels + p);
        };
        for (int k = 0; k < a.modes; ++k) top = fmaxf(top, logit(k));
        for (int k = 0; k < a.modes; ++k) {
            const long long gamma = (token * (a.modes - 1) + k - 1) * a.sub_pixels + p;
            const auto mode =
                arcflow_update::mode_of(logit(k), top, k > 0 ? load(heads, at<void>(a.loggammas), gamma) : 0, step);
            const long long mean = (token * a.modes + k) * a.channels + i % a.channels;
            total += mode.weight;
            mixed = fmaf(mode.share, load(heads, at<void>(a.means), mean), mixed);
        }
        const float y = arcflow_update::stepped(at<float>(a.latents)[i], mixed, 1 / total);
        reinterpret_cast<float *>(a.next)[i] = y;
        if (a.input != 0) store(input, reinterpret_cast<void *>(a.input), i, y);
    }
}

// Gives the uniforms of an MT19937 generator one by one.
class Uniforms {
public:
    explicit Uniforms(long long seed) {
        words_[0] = static_cast<unsigned>(seed);
        for (unsigned i = 1; i < words_.size(); ++i) words_[i] = arcflow_random::seeded(words_[i - 1], i);
    }

    float next() {
        const size_t count = words_.size(), i = place_++ % count;
        words_[i] =
            arcflow_random::twisted(words_[i], words_[(i + 1) % count], words_[(i + arcflow_random::MIDDLE) % count]);
        return arcflow_random::uniform(words_[i]);
    }

private:
    std::array<unsigned, arcflow_random::WORDS> words_;
    size_t place_ = 0;
};

// The noise kernel's arguments, in the order of noise.cu.
struct NoiseArguments {
    Address streams, latents, input;
    int channels, height, width, patch;
};

void noise(const std::string &type, long long images, const NoiseArguments &a) {
    const long long area = static_cast<long long>(a.height) * a.width, numbers = a.channels * area, p = a.patch;
    constexpr int group = arcflow_random::GROUP;
    for (long long image = 0; image < images; ++image) {
        const long long first = at<long long>(a.streams)[2 * image + 1];
        Uniforms uniforms(at<long long>(a.streams)[2 * image]);
        for (long long i = 0; i < first; ++i) uniforms.next();
        for (long long i = 0; i < numbers; i += group) {
            float values[group];
            for (float &x : values) x = uniforms.next();
            for (int j = 0; j < group / 2; ++j) {
                const auto two = arcflow_random::box_muller(values[j], values[j + group / 2]);
                values[j] = two.first;
                values[j + group / 2] = two.second;
            }
            for (int j = 0; j < group; ++j) {
                const long long c = (i + j) / area, y = (i + j) % area / a.width, x = (i + j) % a.width;
                const long long token = y / p * (a.width / p) + x / p;
                const long long place = image * numbers + (token * a.channels + c) * p * p + y % p * p + x % p;
                reinterpret_cast<float *>(a.latents)[place] = values[j];
                if (a.input != 0) store(type, reinterpret_cast<void *>(a.input), place, values[j]);
            }
        }
    }
}

}  // namespace

extern "C" {

// Functions for the tests: enqueue work, count allocations, events and launches, and refuse captures.
void fake_enqueue(void *stream, void (*work)(void *), void *user) {
    enqueue(stream, engine_ms, [=] { work(user); });
}
int fake_live_allocations() { return live_allocations; }
int fake_live_events() { return live_events; }
int fake_graph_launches() { return graph_launches; }
void fake_refuse_capture(int refuse) { refuse_capture = refuse != 0; }

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) {
    *version = 13010;
    return 0;
}
int cuDeviceGet(int *device, int) { return *device = 0; }
int cuDeviceGetName(char *name, int size, int) {
    std::strncpy(name, "Fake GPU", static_cast<size_t>(size));
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == 75 ? 8 : 9;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int) {
    *context = context;
    return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxPushCurrent_v2(void *) { return 0; }
int cuCtxPopCurrent_v2(void **) { return 0; }
int cuGetErrorName(int error, const char **name) {
    *name = error == stream_capture_unsupported ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" : "CUDA_ERROR";
    return 0;
}
int cuGetErrorString(int, const char **text) {
    *text = "of the fake driver";
    return 0;
}
int cuMemAlloc_v2(Address *address, size_t bytes) {
    // Exactly as large as asked for, up to the alignment, so that the sanitizers see a write behind it.
    void *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xff, bytes);  // NaN in every float dtype
    *address = reinterpret_cast<Address>(memory);
    ++live_allocations;
    return 0;
}
int cuMemFree_v2(Address address) {
    std::free(reinterpret_cast<void *>(address));
    --live_allocations;
    return 0;
}
int cuMemHostAlloc(void **memory, size_t bytes, unsigned) {
    *memory = std::malloc(bytes);
    ++live_allocations;
    return 0;
}
int cuMemFreeHost(void *memory) {
    std::free(memory);
    --live_allocations;
    return 0;
}
int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *stream) {
    return enqueue(stream, copy_ms, [=] { std::memcpy(reinterpret_cast<void *>(to), from, bytes); });
}
int cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, void *stream) {
    return enqueue(stream, copy_ms, [=] { std::memcpy(to, at<void>(from), bytes); });
}
int cuStreamCreate(void **stream, unsigned) {
    *stream = new Stream;
    return 0;
}
int cuStreamDestroy_v2(void *stream) {
    delete static_cast<Stream *>(stream);
    return 0;
}
int cuStreamSynchronize(void *stream) { return static_cast<Stream *>(stream)->capturing ? invalid : 0; }
int cuStreamBeginCapture_v2(void *stream, int) {
    static_cast<Stream *>(stream)->capturing = true;
    return 0;
}
int cuStreamEndCapture(void *stream, void **graph) {
    auto *s = static_cast<Stream *>(stream);
    s->capturing = false;
    Work work;
    work.swap(s->captured);
    if (refuse_capture) return stream_capture_unsupported;
    *graph = new Work(std::move(work));
    return 0;
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
    *executable = new Work(*static_cast<Work *>(graph));
    return 0;
}
int cuGraphLaunch(void *executable, void *) {
    ++graph_launches;
    for (const auto &work : *static_cast<Work *>(executable)) work();
    return 0;
}
int cuGraphDestroy(void *graph) {
    delete static_cast<Work *>(graph);
    return 0;
}
int cuGraphExecDestroy(void *executable) {
    delete static_cast<Work *>(executable);
    return 0;
}
int cuEventCreate(void **event, unsigned) {
    *event = new Event;
    ++live_events;
    return 0;
}
int cuEventDestroy_v2(void *event) {
    delete static_cast<Event *>(event);
    --live_events;
    return 0;
}
int cuEventRecordWithFlags(void *event, void *stream, unsigned flags) {
    auto *e = static_cast<Event *>(event);
    // An event recorded in a capture without this flag has no time; outside a capture the flag is an error.
    if (static_cast<Stream *>(stream)->capturing != (flags == 1)) return invalid;
    return enqueue(stream, 0, [=] {
        e->recorded = true;
        e->ms = now_ms;
    });
}
int cuEventElapsedTime(float *ms, void *start, void *end) {
    const auto *a = static_cast<Event *>(start), *b = static_cast<Event *>(end);
    if (!a->recorded || !b->recorded) return not_ready;
    *ms = static_cast<float>(b->ms - a->ms);
    return 0;
}
int cuModuleLoadData(void **module, const void *) {
    *module = module;
    return 0;
}
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(void **function, void *, const char *name) {
    static const std::string types[] = {"float32", "float16", "bfloat16"};
    static std::string names[12];
    for (size_t i = 0; i < 12; ++i) {
        names[i] = i < 9 ? "arcflow_update_" + types[i / 3] + "_" + types[i % 3] : "arcflow_noise_" + types[i % 3];
        if (names[i] == name) {
            *function = &names[i];
            return 0;
        }
    }
    return invalid;
}
int cuLaunchKernel(void *function, unsigned grid, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   void *stream, void **given, void **) {
    const std::string name = *static_cast<std::string *>(function);
    const auto address = [&](size_t i) { return *static_cast<Address *>(given[i]); };
    const auto number = [&](size_t i) { return *static_cast<int *>(given[i]); };
    const std::string noise_of = "arcflow_noise_";
    if (name.compare(0, noise_of.size(), noise_of) == 0) {
        const NoiseArguments a{address(0), address(1), address(2), number(3), number(4), number(5), number(6)};
        return enqueue(stream, noise_ms, [=] { noise(name.substr(noise_of.size()), grid, a); });
    }
    const std::string types = name.substr(std::strlen("arcflow_update_"));
    const size_t middle = types.find('_');
    const Arguments a{address(0), address(1), address(2), address(3),
                      address(4), address(5), address(6), *static_cast<long long *>(given[7]),
                      number(8),  number(9),  number(10), number(11)};
    return enqueue(stream, update_ms, [=] { update(types.substr(0, middle), types.substr(middle + 1), a); });
}
}
