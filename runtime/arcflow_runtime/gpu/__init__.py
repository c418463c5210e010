"""Generate images on a GPU with one launch from the host each: text states and seeds -> latents and 8-bit RGB.

How data flows, for a group of images whose texts have one length (see `DenoiseJob` in `engines/denoiser.py`):

    host                               pinned memory          device
    seeds, text states, pooled,  --->  staging       --copy-> noise kernel -> latents (float32 and the backbone's dtype)
    guidance (each call)                                      conditioner -> modulation [S, B, M]   (or a table)
    rotary tables, sigmas, timesteps,                         each step: modulation[i] -> slot, backbone -> heads,
    modulation table  ---- once per plan -------------------> heads, latents, sigmas -> update kernel -> latents
                                                              vae_decoder: latents -> images
    latents, images  <---------------  results       <-copy-- latents float32, images uint8

A straight student has one velocity in place of the heads, and with a negative prompt a second one from another run of
the backbone in each step. Everything from the first copy to the last is one CUDA graph. In the memory modes "balanced"
and "low" the conditioner is not in it: the modulation comes from the host, which caches it. The modules, from the
bottom up:

- `device.py`: the interface to CUDA: memory, copies, streams, events, capture. `cuda.py` implements it with
  cuda-python, which only `cuda.py`, `kernels.py` and `kernel_code.py` import. `kernels.py` launches the kernels.
- `engine.py`: the interface of a part on a device, which runs on device addresses. `tensorrt.py` implements it with
  TensorRT and TensorRT-RTX, `onnxruntime.py` with ONNX Runtime. `host.py` runs such an engine on numpy arrays, for the
  text encoders.
- `shapes.py`: the shapes of every part's inputs and outputs. `layout.py`: named regions of one allocation. `arrays.py`:
  which arrays a plan has.
- `lane.py`: the one stream, lock and workspace that all engines of a pipeline share; they never run at the same time.
- `buffers.py`, `plan.py`: fixed buffers and execution contexts for one shape (`PlanKey`), and its CUDA graph.
- `denoiser.py`: keeps a bounded number of plans, and implements the pipeline's `Denoiser` interface.
- `*_backend.py`: what `open_backend` returns for each library.

The first call with a shape enqueues its work without a graph; engines need this warm-up before capture. The second call
captures the graph, and later calls replay it. `Pipeline.warm_up` does the first two in advance.

Locks are taken in this order: the denoiser's, `Parts`', a host engine's, the lane's. `Lane.make_room` may be called
with any of the first three held. It takes the denoiser's only if that is free, and otherwise frees nothing.

When memory runs out, `OutOfDeviceMemory` is raised wherever it happens: in an allocation here, in a library that says
so in its log, or at a launch. The denoiser and `HostEngine` then free the plans that are not running, and try once
more.
"""
