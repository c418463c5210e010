// Streams and events. Work stays in its stream's queue until something waits for it. A synchronisation runs only what
// it waits for. A query runs one piece of work, and returns CUDA_ERROR_NOT_READY unless that was the last.
#include <algorithm>

#include "driver.h"

namespace host_cuda {
namespace {

Event find(CUevent handle) {
    const auto found = state().events.find(handle);
    return found == state().events.end() ? nullptr : found->second;
}

bool finished(const Position &position) {
    return position.stream == nullptr || position.stream->done >= position.count;
}

// Runs the first piece of a stream's work, and before it the positions that it must come after.
CUresult run_first(Lock &lock, CUstream_st &stream) {
    stream.running = true;
    Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    for (const Position &position : work.also) wait(lock, position);
    CUresult result = state().lost;
    if (result == CUDA_SUCCESS) {
        ++state().calls["run"];
        ++state().calls[std::string("run:") + work.kind];
        result = due(std::string("run:") + work.kind, true);
    }
    if (result == CUDA_SUCCESS) {
        lock.unlock();
        result = work.run();
        work = {};  // without the lock, because the work may own objects of the program
        lock.lock();
        if (result != CUDA_SUCCESS && state().lost == CUDA_SUCCESS) state().lost = result;
    }
    ++stream.done;
    stream.running = false;
    state().changed.notify_all();
    return result;
}

CUresult query(Call &call, const Position &position) {
    if (!finished(position) && !position.stream->running) run_first(call.lock, *position.stream);
    if (state().lost != CUDA_SUCCESS) return state().lost;
    return finished(position) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult create_stream(CUstream *handle, unsigned flags, int priority) {
    if (handle == nullptr || flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    const auto stream = std::make_shared<CUstream_st>();
    stream->blocking = flags != CU_STREAM_NON_BLOCKING;
    stream->flags = flags;
    stream->priority = priority;
    state().streams[stream.get()] = stream;
    *handle = stream.get();
    return CUDA_SUCCESS;
}

// For calls that a capture forbids: invalidates the capture.
CUresult refuse(Capture &capture, CUresult error) {
    if (!capture.valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    invalidate(capture);
    return error;
}

CUresult record(CUevent handle, CUstream stream_handle, bool external) {
    const Event event = find(handle);
    const Stream stream = host_cuda::find(stream_handle);
    if (event == nullptr || stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (external && stream->capture == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture != nullptr && !external) {
        if (!stream->capture->valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        event->capture = stream->capture;
        event->nodes = stream->last;
        return CUDA_SUCCESS;
    }
    event->capture = nullptr;
    return submit(stream, {"event",
                           [event] {
                               const Lock lock(state().mutex);
                               event->reached = std::chrono::steady_clock::now();
                               return CUDA_SUCCESS;
                           },
                           {event},
                           {}});
}

CUresult elapsed(float *ms, CUevent start, CUevent end) {
    const Event from = find(start), to = find(end);
    if (from == nullptr || to == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (from->capture != nullptr || to->capture != nullptr) return CUDA_ERROR_CAPTURED_EVENT;
    for (const Event &event : {from, to}) {
        if (event->at.stream == nullptr || event->flags & CU_EVENT_DISABLE_TIMING) return CUDA_ERROR_INVALID_HANDLE;
        if (!finished(event->at)) return CUDA_ERROR_NOT_READY;
    }
    *ms = std::chrono::duration<float, std::milli>(to->reached - from->reached).count();
    return CUDA_SUCCESS;
}

// A stream that waits for an event recorded in a capture joins that capture.
CUresult wait_captured(const Stream &stream, const Event &event) {
    const auto &capture = event->capture;
    const auto &all = state().captures;
    if (std::find(all.begin(), all.end(), capture) == all.end())
        return CUDA_ERROR_CAPTURED_EVENT;  // the capture has ended
    if (!capture->valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (stream == state().legacy) return refuse(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (stream->capture == nullptr) {
        stream->capture = capture;
        stream->last = event->nodes;
        return CUDA_SUCCESS;
    }
    if (stream->capture != capture) {
        invalidate(*stream->capture);
        return refuse(*capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
    }
    for (const size_t node : event->nodes) {
        auto &last = stream->last;
        if (std::find(last.begin(), last.end(), node) == last.end()) last.push_back(node);
    }
    return CUDA_SUCCESS;
}

}  // namespace

Stream find(CUstream handle) {
    static thread_local Stream of_thread;
    if (handle == nullptr || handle == CU_STREAM_LEGACY) return state().legacy;
    if (handle == CU_STREAM_PER_THREAD) {
        if (of_thread == nullptr) {
            of_thread = std::make_shared<CUstream_st>();
            of_thread->blocking = true;
            state().unnamed.push_back(of_thread);
        }
        return of_thread;
    }
    const auto found = state().streams.find(handle);
    return found == state().streams.end() ? nullptr : found->second;
}

CUresult submit(CUstream handle, Work work) {
    const Stream stream = find(handle);
    return stream == nullptr ? CUDA_ERROR_INVALID_HANDLE : submit(stream, std::move(work));
}

CUresult submit(const Stream &stream, Work work) {
    if (stream == state().legacy) {
        if (const CUresult conflict = legacy_conflict()) return conflict;
        for (const auto &[handle, other] : state().streams)
            if (other->blocking) work.also.push_back({other, other->submitted});
    } else if (stream->capture != nullptr) {
        Capture &capture = *stream->capture;
        if (!capture.valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        auto &nodes = capture.graph->nodes;
        nodes.push_back({std::move(work), stream->last});
        stream->last = {nodes.size() - 1};
        return CUDA_SUCCESS;
    } else if (stream->blocking) {
        work.also.push_back({state().legacy, state().legacy->submitted});
    }
    const Position position{stream, ++stream->submitted};
    for (const Event &event : work.events) event->at = position;
    stream->queue.push_back(std::move(work));
    return CUDA_SUCCESS;
}

CUresult wait(Lock &lock, const Position &position) {
    while (!finished(position))
        if (position.stream->running) state().changed.wait(lock);
        else run_first(lock, *position.stream);
    return state().lost;
}

}  // namespace host_cuda

using namespace host_cuda;

extern "C" {

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    HOST_CUDA_CALL(context);
    return create_stream(stream, flags, 0);
}

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    HOST_CUDA_CALL(context);
    return create_stream(stream, flags, priority);
}

CUresult cuStreamDestroy(CUstream handle) {
    HOST_CUDA_CALL(context);
    const auto found = state().streams.find(handle);
    if (found == state().streams.end()) return CUDA_ERROR_INVALID_HANDLE;
    if (found->second->capture != nullptr) invalidate(*found->second->capture);
    state().unnamed.push_back(found->second);
    state().streams.erase(found);
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle) {
    HOST_CUDA_CALL(context);
    const Stream stream = find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture != nullptr) return refuse(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (stream == state().legacy) {
        if (const CUresult conflict = legacy_conflict()) return conflict;
    }
    if (call.unsafe()) return call.error;
    return wait(call.lock, {stream, stream->submitted});
}

CUresult cuStreamQuery(CUstream handle) {
    HOST_CUDA_CALL(context);
    const Stream stream = find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture != nullptr) return refuse(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (call.unsafe()) return call.error;
    return query(call, {stream, stream->submitted});
}

CUresult cuStreamGetFlags(CUstream handle, unsigned *flags) {
    HOST_CUDA_CALL(context);
    const Stream stream = find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *flags = stream->flags;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetPriority(CUstream handle, int *priority) {
    HOST_CUDA_CALL(context);
    const Stream stream = find(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *priority = stream->priority;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext *context) {
    HOST_CUDA_CALL(context);
    if (find(handle) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *context = current_context();
    return CUDA_SUCCESS;
}

CUresult cuStreamGetDevice(CUstream handle, CUdevice *device) {
    HOST_CUDA_CALL(context);
    if (find(handle) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned flags) {
    HOST_CUDA_CALL(context);
    const Stream stream = find(stream_handle);
    const auto found = state().events.find(handle);
    if (stream == nullptr || found == state().events.end()) return CUDA_ERROR_INVALID_HANDLE;
    const Event event = found->second;
    const bool external = flags & CU_EVENT_WAIT_EXTERNAL;
    if (external && stream->capture == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (event->capture != nullptr) return wait_captured(stream, event);
    if (event->at.stream == nullptr) return CUDA_SUCCESS;
    if (stream->capture != nullptr && !external) return refuse(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    if (external) {  // waits for what the event stands for when the node runs
        return submit(stream, {"wait",
                               [event] {
                                   Lock lock(state().mutex);
                                   return wait(lock, event->at);
                               },
                               {},
                               {}});
    }
    return submit(stream, {"wait", [] { return CUDA_SUCCESS; }, {}, {event->at}});
}

CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *user) {
    HOST_CUDA_CALL(context);
    if (function == nullptr) return CUDA_ERROR_INVALID_VALUE;
    return submit(stream, {"host",
                           [=] {
                               in_host_function = true;
                               function(user);
                               in_host_function = false;
                               return CUDA_SUCCESS;
                           },
                           {},
                           {}});
}

CUresult cuEventCreate(CUevent *handle, unsigned flags) {
    HOST_CUDA_CALL(context);
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const auto event = std::make_shared<CUevent_st>();
    event->flags = flags;
    state().events[event.get()] = event;
    *handle = event.get();
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent handle) {
    HOST_CUDA_CALL(context);
    return state().events.erase(handle) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    HOST_CUDA_CALL(context);
    return record(event, stream, false);
}

CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) {
    HOST_CUDA_CALL(context);
    if (flags > CU_EVENT_RECORD_EXTERNAL) return CUDA_ERROR_INVALID_VALUE;
    return record(event, stream, flags == CU_EVENT_RECORD_EXTERNAL);
}

CUresult cuEventSynchronize(CUevent handle) {
    HOST_CUDA_CALL(context);
    const Event event = find(handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (event->capture != nullptr) return refuse(*event->capture, CUDA_ERROR_CAPTURED_EVENT);
    if (call.unsafe()) return call.error;
    return wait(call.lock, event->at);
}

CUresult cuEventQuery(CUevent handle) {
    HOST_CUDA_CALL(context);
    const Event event = find(handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (event->capture != nullptr) return refuse(*event->capture, CUDA_ERROR_CAPTURED_EVENT);
    if (call.unsafe()) return call.error;
    return query(call, event->at);
}

CUresult cuEventElapsedTime(float *ms, CUevent start, CUevent end) {
    HOST_CUDA_CALL(context);
    return elapsed(ms, start, end);
}

// Version 1 of the function, which programs built for older drivers load.
#undef cuEventElapsedTime
CUresult cuEventElapsedTime(float *ms, CUevent start, CUevent end) {
    HOST_CUDA_CALL(context);
    return elapsed(ms, start, end);
}
}
