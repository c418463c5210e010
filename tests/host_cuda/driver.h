// Declarations shared by the driver's sources: its objects, its one lock, and how work is queued, captured and run.
//
// cuda.h declares CUstream_st and the like without a body; this file defines them. Every handle is looked up before it
// is used, so a handle of a destroyed object is an error and not a crash.
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

// The point in a stream after its first `count` pieces of work.
struct Position {
    Stream stream;
    uint64_t count;
};

// A piece of work. `run` is called without the lock. It records `events`, and runs after the positions `also`.
struct Work {
    const char *kind;
    std::function<CUresult()> run;
    std::vector<Event> events;
    std::vector<Position> also;
};

// A piece of work in a graph, which runs after the nodes whose numbers are in `after`.
struct Node {
    Work work;
    std::vector<size_t> after;
};

// A capture in progress; several streams may take part in it.
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
    Position last;  // of the last launch; launches of one executable run one after the other
};

}  // namespace host_cuda

struct CUstream_st {
    bool blocking;  // ordered with the legacy stream
    unsigned flags;
    int priority;
    std::deque<host_cuda::Work> queue;
    uint64_t submitted = 0, done = 0;
    bool running = false;
    std::shared_ptr<host_cuda::Capture> capture;
    std::vector<size_t> last;  // nodes that the next captured node depends on
};

struct CUevent_st {
    unsigned flags;
    host_cuda::Position at{nullptr, 0};  // where it was last recorded; no stream if it never was
    std::chrono::steady_clock::time_point reached;
    std::shared_ptr<host_cuda::Capture> capture;  // set if it was last recorded in a capture
    std::vector<size_t> nodes;
};

// An object of the program that graphs keep alive.
struct CUuserObject_st {
    void *content;
    CUhostFn destroy;
    unsigned held;  // references that the program itself holds
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

// The driver's whole state. Members may be used only while `mutex` is held.
struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool initialized = false, present = true;
    int contexts = 0;  // how often the primary context is retained
    CUresult lost = CUDA_SUCCESS;
    std::string fault;
    std::map<CUstream, Stream> streams;
    std::map<CUevent, Event> events;
    std::map<CUgraph, Graph> graphs;
    std::map<CUgraphExec, std::shared_ptr<Executable>> executables;
    std::map<CUuserObject, std::shared_ptr<CUuserObject_st>> objects;  // with references of the program
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

// The start of one driver call: takes the lock, counts the call, and sets `error` if the call must fail.
class Call {
public:
    Call(const char *function, Needs needs);

    CUresult error = CUDA_SUCCESS;
    Lock lock;

    // For calls that CUDA names "potentially unsafe" during a capture. If a capture forbids the call, invalidates the
    // capture, sets `error` and returns true.
    bool unsafe();
};

#define HOST_CUDA_CALL(needs) \
    ::host_cuda::Call call(__func__, ::host_cuda::Needs::needs); \
    if (call.error != CUDA_SUCCESS) return call.error

// The calling thread's context, and whether it runs a host function, which must not call the driver.
CUcontext current_context();
extern thread_local bool in_host_function;

// The injected failure for this call, or for this work if `is_work`; CUDA_SUCCESS if there is none.
CUresult due(const std::string &name, bool is_work);

// The stream of a handle, which may be one of the two default streams; null if the handle is invalid.
Stream find(CUstream handle);

// Enqueues work, or records it if the stream is capturing.
CUresult submit(const Stream &stream, Work work);
CUresult submit(CUstream handle, Work work);

// Runs the stream's work up to a position.
CUresult wait(Lock &lock, const Position &position);

// CUDA_ERROR_STREAM_CAPTURE_IMPLICIT if a blocking stream is capturing, which forbids use of the legacy stream; then
// also invalidates that capture.
CUresult legacy_conflict();

void invalidate(Capture &capture);

// Whether the calling thread has begun a capture.
bool captures_here();

// The host address of `bytes` bytes of device or pinned memory. If they are not in one live allocation, returns null
// and sets State::fault. Takes the lock.
void *resolve(CUdeviceptr address, size_t bytes, const char *what);

// The kind of memory at an address. `invalid`: device or pinned memory that does not have `bytes` bytes from there on.
enum class Where { pageable, device, pinned, invalid };
Where where(CUdeviceptr address, size_t bytes);

size_t live_device_bytes();
size_t live_pinned_bytes();
size_t live_modules();
void set_memory(size_t bytes);
void forget_memory();
size_t memory();

}  // namespace host_cuda
