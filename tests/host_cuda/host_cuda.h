/* What a test sees of the CUDA driver of host memory, beside cuda.h: its settings, what it counted, what it shall fail.
 *
 * The driver (`libcuda.so.1`, built by build.py) has one device. Its memory is this process's, filled with 0xFF, which
 * is NaN in every float type, before use and after it. A device address is never readable by the host, as on a GPU:
 * reading one ends the process. Work in a stream is run by whoever waits for it, no earlier and no further than needed.
 *
 * All functions may be called from any thread. Nothing in here needs a context.
 */
#pragma once

#include <stddef.h>

#include <cuda.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Start again: no counts, no failures to come. What is allocated stays, unless the context was lost: then everything is
 * gone, as when a process ends. */
void host_cuda_reset(void);

/* The device has `bytes` of memory; 8 GiB at the start, or what the environment's HOST_CUDA_BYTES says. At most 32 GiB.
 */
void host_cuda_set_memory(size_t bytes);

/* Whether there is a device; the environment's HOST_CUDA_DEVICES=0 says no. A context that was made stays. */
void host_cuda_set_present(int present);

enum host_cuda_when {
    HOST_CUDA_ALWAYS = 0,
    HOST_CUDA_IN_CAPTURE = 1, /* count only calls by a thread that captures; the failure invalidates the capture */
    HOST_CUDA_LOST = 2,       /* the context is lost: from then on every call gives this error */
};

/* The n-th call from now on (1 is the next) of a driver function, by its name without version, gives `error` and does
 * nothing. "*" counts every call that needs a context but does not give something back: what is not given back would be
 * lost. "run" counts work that is run, "run:copy", "run:memset",
 * "run:kernel", "run:engine", "run:host" and "run:graph" those of one kind; such an error is told by the next wait,
 * and the context is lost. Several failures may be pending. `when` is a sum of host_cuda_when. */
void host_cuda_fail(const char *function, long nth, CUresult error, int when);

/* How many failures are still to come. */
int host_cuda_failures_pending(void);

/* Calls of a function since the last reset; of "run..." as above: how often such work was run. */
long host_cuda_calls(const char *function);

/* The names of the calls that need a context since the last reset, one a line, at most the first 100,000 bytes. The
 * text is the calling thread's until it asks again. */
const char *host_cuda_log(void);

enum host_cuda_kind {
    HOST_CUDA_DEVICE_BYTES,
    HOST_CUDA_PINNED_BYTES,
    HOST_CUDA_STREAMS,
    HOST_CUDA_EVENTS,
    HOST_CUDA_GRAPHS,
    HOST_CUDA_EXECUTABLES, /* instantiated graphs */
    HOST_CUDA_MODULES,     /* modules and libraries */
    HOST_CUDA_PENDING,     /* work that was given to streams and not run */
};

/* What there is now. */
size_t host_cuda_live(int kind);

/* What the last CUDA_ERROR_ILLEGAL_ADDRESS or refused copy was about, "" if there was none. As host_cuda_log. */
const char *host_cuda_fault(void);

/* Where `bytes` from a device address on lie in this process, for work that runs; null if not all of it is one live
 * allocation. Addresses of pinned memory are given back as they are. */
void *host_cuda_at(CUdeviceptr address, size_t bytes);

/* Enqueue work of other code in a stream, as a kernel of an engine's would be: captured where the stream captures, run
 * as late as allowed. `work` gives 0, or another number if it failed: the context is then lost with
 * CUDA_ERROR_LAUNCH_FAILED. It must not call the driver. */
CUresult host_cuda_enqueue(CUstream stream, int (*work)(void *), void *user);

#ifdef __cplusplus
}
#endif
