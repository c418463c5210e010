/* Controls for tests of the CUDA driver made of host memory: settings, counters and injected failures.
 *
 * build.py builds the driver as `libcuda.so.1`. It implements a part of cuda.h for one device:
 * - Device memory is host memory behind addresses that the host cannot read: reading one crashes, as on a GPU. Memory
 *   is filled with 0xFF, a NaN in every float type, when it is allocated and when it is freed.
 * - Work in a stream runs as late as CUDA allows: in the thread that waits for it, and only as far as the thread waits.
 *   So a missing wait shows in the results.
 * - Kernels are this project's, built for the host. Any other kernel is CUDA_ERROR_NOT_SUPPORTED.
 * - A function of cuda.h that is not implemented is not exported.
 *
 * With HOST_CUDA_DEVICES=0 in the environment there is no device.
 *
 * All functions are thread-safe, and only host_cuda_enqueue needs a current context. Returned strings belong to the
 * calling thread and are valid until it calls the same function again.
 */
#pragma once

#include <stddef.h>

#include <cuda.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Clear the counters and the pending failures. Allocations stay, unless the context was lost: then everything is freed,
 * as at the end of a process. */
void host_cuda_reset(void);

/* Set the device's memory, at most 32 GiB. Before, it is HOST_CUDA_BYTES of the environment, or 8 GiB. */
void host_cuda_set_memory(size_t bytes);

enum host_cuda_when {
    HOST_CUDA_ALWAYS = 0,
    HOST_CUDA_IN_CAPTURE = 1, /* count only calls of a thread that is capturing; the failure invalidates its capture */
    HOST_CUDA_LOST = 2,       /* lose the context: every later call returns the same error */
};

/* Make the n-th call of a driver function fail with `error` and do nothing; n = 1 is the next call. `when` is a sum of
 * host_cuda_when. Several failures may be pending. `function` is one of:
 * - a name from cuda.h without its version, such as "cuMemAlloc";
 * - "*": every call that needs a context, except those that free something;
 * - "run:copy", "run:memset", "run:kernel", "run:engine", "run:host" or "run:graph": the n-th time that such work runs;
 *   "run": work of any kind. The next wait returns the error, and the context is lost. */
void host_cuda_fail(const char *function, long nth, CUresult error, int when);

/* The number of failures that have not happened yet. */
int host_cuda_failures_pending(void);

/* The number of calls since the last reset. `function` is as for host_cuda_fail, but not "*". */
long host_cuda_calls(const char *function);

/* The names of the calls since the last reset that need a context, one per line, up to 100,000 bytes. */
const char *host_cuda_log(void);

enum host_cuda_kind {
    HOST_CUDA_DEVICE_BYTES,
    HOST_CUDA_PINNED_BYTES,
    HOST_CUDA_STREAMS,
    HOST_CUDA_EVENTS,
    HOST_CUDA_GRAPHS,
    HOST_CUDA_EXECUTABLES, /* instantiated graphs */
    HOST_CUDA_MODULES,     /* modules and libraries */
    HOST_CUDA_PENDING,     /* pieces of work that were given to streams and have not run */
};

/* The amount or number of a kind that exists now. */
size_t host_cuda_live(int kind);

/* What the last CUDA_ERROR_ILLEGAL_ADDRESS or refused copy accessed; "" if there was none since the last reset. */
const char *host_cuda_fault(void);

/* The host address of `bytes` bytes at a device address, for code that runs in a stream. Null if they do not all belong
 * to one live allocation. An address of pinned memory is returned as it is. */
void *host_cuda_at(CUdeviceptr address, size_t bytes);

/* Enqueue a host function in the place of an engine's kernels: a capturing stream records it, otherwise it runs as late
 * as CUDA allows. `work` returns 0, or another number if it failed; then the context is lost with
 * CUDA_ERROR_LAUNCH_FAILED. It must not call the driver. */
CUresult host_cuda_enqueue(CUstream stream, int (*work)(void *), void *user);

#ifdef __cplusplus
}
#endif
