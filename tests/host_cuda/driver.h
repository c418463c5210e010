// What the driver's sources share: its objects, the one lock, and how work is queued, captured and run.
//
// cuda.h declares CUstream_st and the others without a body; theirs are here. Handles are looked up before they are
// used, so a stale one is an error and not a crash.
#pragma once

#include <cuda.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "host_cuda.h"

namespace host_cuda {

using Stream = std::shared_ptr<CUstream_st>;
using Event = std::shared_ptr<CUevent_st>;
using Graph = std::shared_ptr<CUgraph_st>;
using Lock = std::unique_lock<std::mutex>;

// A point in a stream's work: after as many pieces of it.
struct Position {
    Stream stream;
    uint64_t count;
};

// A piece of work. It runs without the lock. `events` are those that it records; `also` must have been run before it.
struct Work {
    const char *kind;
    std::function<CUresult()> run;
    std::vector<Event> events;
    std::vector<Position> also;
};

// A piece of work in a graph, and the numbers of those that come before it.
struct Node {
    Work work;
    std::vector<size_t> after;
};

// What is being recorded, perhaps from several streams.
struct Capture {
    unsigned long long id;
    Stream origin;
    std::thread::id thread;
    CUstreamCaptureMode mode;
    bool valid;
    CUgraph handle;
    Graph graph;
};

struct Executable {
    std::shared_ptr<const CUgraph_st> graph;
    Position last;  // launches of one executable come one after the other
};

}  // namespace host_cuda

struct CUstream_st {
    bool blocking;  // works in turn with the legacy stream
    unsigned flags;
    int priority;
    std::deque<host_cuda::Work> queue;
    uint64_t submitted = 0, done = 0;
    bool running = false;
    std::shared_ptr<host_cuda::Capture> capture;
    std::vector<size_t> last;  // nodes that the next captured one comes after
};

struct CUevent_st {
    unsigned flags;
    host_cuda::Position at{nullptr, 0};  // what was recorded last; no stream if nothing was
    std::chrono::steady_clock::time_point reached;
    std::shared_ptr<host_cuda::Capture> capture;  // what it was last recorded in
    std::vector<size_t> nodes;
};

// Something of the program's that lives as long as the graphs that hold it.
struct CUuserObject_st {
    void *content;
    CUhostFn destroy;
    unsigned held;  // by the program itself
    ~CUuserObject_st() { destroy(content); }
};

struct CUgraph_st {
    std::vector<host_cuda::Node> nodes;
    std::vector<std::shared_ptr<CUuserObject_st>> objects;
};

namespace host_cuda {

struct Failure {
    std::string function;
    long left;
    CUresult error;
    int when;
};

// Everything there is. Members are used under `mutex` only.
struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool initialized = false, present = true;
    int contexts = 0;  // times that the primary context is retained
    CUresult lost = CUDA_SUCCESS;
    std::string fault;
    std::map<CUstream, Stream> streams;
    std::map<CUevent, Event> events;
    std::map<CUgraph, Graph> graphs;
    std::map<CUgraphExec, std::shared_ptr<Executable>> executables;
    std::map<CUuserObject, std::shared_ptr<CUuserObject_st>> objects;  // that the program holds
    std::vector<Stream> unnamed;  // without a handle: destroyed ones whose work may not be done, and threads' own
    std::vector<std::shared_ptr<Capture>> captures;
    Stream legacy;
    unsigned long long next_capture = 1;
    std::map<std::string, long> calls;
    std::string log;
    std::vector<Failure> failures;
};

State &state();

enum class Needs { nothing, driver, context };

// One call of the driver: takes the lock, counts, and has the error if the call must not go on.
class Call {
public:
    Call(const char *function, Needs needs);

    // Gives an error after this call, which an API function returns.
    CUresult error = CUDA_SUCCESS;
    Lock lock;

    // For calls that a capture does not see and that could break it: invalidates the captures and sets `error`.
    bool unsafe();
};

#define HOST_CUDA_CALL(needs) \
    ::host_cuda::Call call(__func__, ::host_cuda::Needs::needs); \
    if (call.error != CUDA_SUCCESS) return call.error

// Of this thread.
CUcontext current_context();
extern thread_local bool in_host_function;  // which must not call the driver

// The failure that is due for a call or work of this name, if any.
CUresult due(const std::string &name, bool is_work);

// The stream of a handle, the two special ones too; null if there is none.
Stream find(CUstream handle);

// Enqueues or captures.
CUresult submit(const Stream &stream, Work work);
CUresult submit(CUstream handle, Work work);

// Runs a stream's work until as many pieces are done.
CUresult wait(Lock &lock, const Position &position);

// What keeps the legacy stream from being used: a capture of a stream that works in turn with it, which is invalidated.
CUresult legacy_conflict();

void invalidate(Capture &capture);

// Whether this thread captures.
bool captures_here();

// A device or pinned address of at least so many bytes as it is in this process; null, and the reason in `fault`, if
// it is none. Takes the lock.
void *resolve(CUdeviceptr address, size_t bytes, const char *what);

// Whether an address is of the device or pinned, and then whether so many bytes from it on are.
enum class Where { pageable, device, pinned, invalid };
Where where(CUdeviceptr address, size_t bytes);

size_t live_device_bytes();
size_t live_pinned_bytes();
size_t live_modules();
void set_memory(size_t bytes);
void forget_memory();
size_t memory();

}  // namespace host_cuda
