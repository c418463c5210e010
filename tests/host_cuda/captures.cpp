// Captures and graphs: what a capture records, what invalidates it, and how a graph runs.
//
// The rules come from the CUDA programming guide ("Prohibited and Unhandled Operations" and "Invalidation" of stream
// capture) and from cuThreadExchangeStreamCaptureMode in cuda.h. CUDA does not list all "potentially unsafe" calls.
// Here every call that allocates, frees, loads code or waits is one.
#include <algorithm>

#include "driver.h"

namespace host_cuda {
namespace {

thread_local CUstreamCaptureMode mode_of_thread = CU_STREAM_CAPTURE_MODE_GLOBAL;

// Runs the nodes in the order that shows missing dependencies: of the nodes that may run next, the one captured last.
CUresult run(const CUgraph_st &graph) {
    std::vector<bool> done(graph.nodes.size());
    for (size_t count = 0; count < graph.nodes.size(); ++count) {
        size_t next = graph.nodes.size();
        while (next-- > 0) {
            const auto &after = graph.nodes[next].after;
            if (!done[next] && std::all_of(after.begin(), after.end(), [&](size_t n) { return done[n]; })) break;
        }
        const Work &work = graph.nodes[next].work;
        CUresult result;
        {
            const Lock lock(state().mutex);
            ++state().calls["run"];
            ++state().calls[std::string("run:") + work.kind];
            result = due(std::string("run:") + work.kind, true);
        }
        if (result == CUDA_SUCCESS) result = work.run();
        if (result != CUDA_SUCCESS) return result;
        done[next] = true;
    }
    return CUDA_SUCCESS;
}

std::vector<Event> events_of(const CUgraph_st &graph) {
    std::vector<Event> all;
    for (const Node &node : graph.nodes) all.insert(all.end(), node.work.events.begin(), node.work.events.end());
    return all;
}

// Whether all nodes are among those in `last` or come before them.
bool joined(const CUgraph_st &graph, const std::vector<size_t> &last) {
    std::vector<bool> seen(graph.nodes.size());
    std::vector<size_t> left = last;
    while (!left.empty()) {
        const size_t node = left.back();
        left.pop_back();
        if (seen[node]) continue;
        seen[node] = true;
        left.insert(left.end(), graph.nodes[node].after.begin(), graph.nodes[node].after.end());
    }
    return std::all_of(seen.begin(), seen.end(), [](bool s) { return s; });
}

// Takes all streams out of a capture. Without success, destroys the graph too.
void end(const std::shared_ptr<Capture> &capture, bool success) {
    for (const auto &[handle, stream] : state().streams) {
        if (stream->capture != capture) continue;
        stream->capture = nullptr;
        stream->last.clear();
    }
    for (const Stream &stream : state().unnamed)
        if (stream->capture == capture) stream->capture = nullptr;
    auto &all = state().captures;
    all.erase(std::find(all.begin(), all.end(), capture));
    if (!success) state().graphs.erase(capture->handle);
}

// Destroys an object, without the lock, because it may own objects of the program.
template <class Map> CUresult take(Call &call, Map &map, typename Map::key_type handle) {
    const auto node = map.extract(handle);
    call.lock.unlock();
    return node.empty() ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult instantiate(CUgraphExec *executable, CUgraph graph) {
    const auto found = state().graphs.find(graph);
    if (found == state().graphs.end()) return CUDA_ERROR_INVALID_VALUE;
    const auto made = std::make_shared<Executable>();
    made->graph = std::make_shared<CUgraph_st>(*found->second);
    made->last = {nullptr, 0};
    *executable = reinterpret_cast<CUgraphExec>(made.get());
    state().executables[*executable] = made;
    return CUDA_SUCCESS;
}

}  // namespace

void invalidate(Capture &capture) { capture.valid = false; }

bool captures_here() {
    return std::any_of(state().captures.begin(), state().captures.end(),
                       [](const auto &c) { return c->thread == std::this_thread::get_id(); });
}

CUresult legacy_conflict() {
    CUresult result = CUDA_SUCCESS;
    for (const auto &[handle, stream] : state().streams) {
        if (!stream->blocking || stream->capture == nullptr) continue;
        invalidate(*stream->capture);
        result = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    return result;
}

bool Call::unsafe() {
    if (mode_of_thread == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
    for (const auto &capture : state().captures) {
        const bool own = capture->thread == std::this_thread::get_id();
        const bool conflicts =
            own ? capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED
                : mode_of_thread == CU_STREAM_CAPTURE_MODE_GLOBAL && capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (!conflicts) continue;
        invalidate(*capture);
        error = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return error != CUDA_SUCCESS;
}

}  // namespace host_cuda

using namespace host_cuda;

extern "C" {

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    HOST_CUDA_CALL(driver);
    if (mode == nullptr || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, mode_of_thread);
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
    HOST_CUDA_CALL(context);
    const Stream stream = find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    if (stream == state().legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
    const auto graph = std::make_shared<CUgraph_st>();
    state().graphs[graph.get()] = graph;
    stream->capture = std::make_shared<Capture>(
        Capture{state().next_capture++, stream, std::this_thread::get_id(), mode, true, graph.get(), graph});
    stream->last.clear();
    state().captures.push_back(stream->capture);
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph *graph) {
    Call call(__func__, Needs::context);
    if (graph != nullptr) *graph = nullptr;
    const Stream stream = find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const auto capture = stream->capture;
    if (call.error != CUDA_SUCCESS) {  // a failed call ends the capture too
        if (capture != nullptr) end(capture, false);
        return call.error;
    }
    if (capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
    if (capture->origin != stream) {
        invalidate(*capture);
        return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    }
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id())
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    CUresult result = capture->valid ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (result == CUDA_SUCCESS && !joined(*capture->graph, stream->last)) result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    end(capture, result == CUDA_SUCCESS);
    if (result == CUDA_SUCCESS && graph != nullptr) *graph = capture->handle;
    return result;
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
    HOST_CUDA_CALL(context);
    const Stream stream = find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream == state().legacy) {  // does not invalidate the capture
        for (const auto &[other, blocking] : state().streams)
            if (blocking->blocking && blocking->capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    *status = stream->capture == nullptr ? CU_STREAM_CAPTURE_STATUS_NONE
              : stream->capture->valid   ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                         : CU_STREAM_CAPTURE_STATUS_INVALIDATED;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
                                const CUgraphNode **dependencies, const CUgraphEdgeData **edges, size_t *count) {
    HOST_CUDA_CALL(context);
    if (dependencies != nullptr || edges != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
    const Stream stream = find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const auto &capture = stream->capture;
    *status = capture == nullptr ? CU_STREAM_CAPTURE_STATUS_NONE
              : capture->valid   ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                 : CU_STREAM_CAPTURE_STATUS_INVALIDATED;
    if (*status != CU_STREAM_CAPTURE_STATUS_ACTIVE) return CUDA_SUCCESS;
    if (id != nullptr) *id = capture->id;
    if (graph != nullptr) *graph = capture->handle;
    if (count != nullptr) *count = stream->last.size();
    return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long) {
    HOST_CUDA_CALL(context);
    return instantiate(executable, graph);
}

CUresult cuGraphInstantiateWithParams(CUgraphExec *executable, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *params) {
    HOST_CUDA_CALL(context);
    const CUresult result = instantiate(executable, graph);
    params->result_out = result == CUDA_SUCCESS ? CUDA_GRAPH_INSTANTIATE_SUCCESS : CUDA_GRAPH_INSTANTIATE_ERROR;
    return result;
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    HOST_CUDA_CALL(context);
    const auto found = state().executables.find(handle);
    const Stream stream = find(stream_handle);
    if (found == state().executables.end() || stream == nullptr) return CUDA_ERROR_INVALID_VALUE;
    Executable &executable = *found->second;
    const bool captured = stream->capture != nullptr;
    const CUresult result = submit(
        stream,
        {"graph", [graph = executable.graph] { return run(*graph); }, events_of(*executable.graph), {executable.last}});
    if (result == CUDA_SUCCESS && !captured) executable.last = {stream, stream->submitted};
    return result;
}

CUresult cuGraphUpload(CUgraphExec handle, CUstream stream) {
    HOST_CUDA_CALL(context);
    return state().executables.count(handle) && find(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode *nodes, size_t *count) {
    HOST_CUDA_CALL(context);
    const auto found = state().graphs.find(graph);
    if (found == state().graphs.end() || nodes != nullptr) return CUDA_ERROR_INVALID_VALUE;
    *count = found->second->nodes.size();
    return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
    HOST_CUDA_CALL(context);
    return take(call, state().executables, handle);
}

CUresult cuGraphDestroy(CUgraph graph) {
    HOST_CUDA_CALL(context);
    return take(call, state().graphs, graph);
}

CUresult cuUserObjectCreate(CUuserObject *object, void *content, CUhostFn destroy, unsigned count, unsigned flags) {
    HOST_CUDA_CALL(driver);
    if (count == 0 || flags != CU_USER_OBJECT_NO_DESTRUCTOR_SYNC) return CUDA_ERROR_INVALID_VALUE;
    const std::shared_ptr<CUuserObject_st> made(new CUuserObject_st{content, destroy, count});
    state().objects[made.get()] = made;
    *object = made.get();
    return CUDA_SUCCESS;
}

CUresult cuUserObjectRelease(CUuserObject object, unsigned count) {
    HOST_CUDA_CALL(driver);
    const auto found = state().objects.find(object);
    if (found == state().objects.end() || count > object->held) return CUDA_ERROR_INVALID_VALUE;
    object->held -= count;
    return object->held > 0 ? CUDA_SUCCESS : take(call, state().objects, object);
}

CUresult cuGraphRetainUserObject(CUgraph graph, CUuserObject object, unsigned count, unsigned flags) {
    HOST_CUDA_CALL(driver);
    const auto found = state().objects.find(object);
    if (found == state().objects.end() || state().graphs.count(graph) == 0) return CUDA_ERROR_INVALID_VALUE;
    const bool moves = flags & CU_GRAPH_USER_OBJECT_MOVE;
    if (moves && count > object->held) return CUDA_ERROR_INVALID_VALUE;
    graph->objects.insert(graph->objects.end(), count, found->second);
    if (moves) object->held -= count;
    if (object->held == 0) state().objects.erase(found);
    return CUDA_SUCCESS;
}

CUresult cuGraphReleaseUserObject(CUgraph graph, CUuserObject object, unsigned count) {
    HOST_CUDA_CALL(driver);
    if (state().graphs.count(graph) == 0) return CUDA_ERROR_INVALID_VALUE;
    std::vector<std::shared_ptr<CUuserObject_st>> released;
    auto &all = graph->objects;
    for (; count > 0; --count) {
        const auto found = std::find_if(all.begin(), all.end(), [=](const auto &o) { return o.get() == object; });
        if (found == all.end()) return CUDA_ERROR_INVALID_VALUE;
        released.push_back(*found);
        all.erase(found);
    }
    call.lock.unlock();  // the destructor calls the program
    return CUDA_SUCCESS;
}
}
