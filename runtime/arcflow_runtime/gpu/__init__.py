"""Pictures on a GPU with one host launch each: prompts' embeddings and noise -> latents and 8-bit RGB.

The data's way, per group of images whose texts have one length (see `DenoiseJob` in `engines/denoiser.py`):

    host                               pinned memory          device
    noise, text states, pooled,  --->  staging       --copy-> latents (float32 and the backbone's dtype), states, ...
    guidance (each picture)                                   conditioner -> modulation [S, B, M]   (or a table)
    rotary tables, sigmas, timesteps,                         each step: modulation[i] -> slot, backbone -> heads,
    modulation table  ---- once per plan -------------------> heads, latents, sigmas -> update kernel -> latents
                                                              vae_decoder: latents -> images
    latents, images  <---------------  results       <-copy-- latents float32, images uint8

Everything from the first copy to the last is one CUDA graph. Modules, in this order:

- `device.py`: what is asked of CUDA: memory, copies, streams, events, capture. `cuda.py` does it with cuda-python;
  nothing else imports that. `kernels.py` launches the update kernel.
- `engine.py`: a part on a device, run with addresses. `tensorrt.py` does it with TensorRT and TensorRT-RTX,
  `ort.py` with ONNX Runtime. `host.py` runs such an engine with arrays, for the text encoders.
- `shapes.py`: the shapes of every part's inputs and outputs. `layout.py`: named regions of one allocation.
- `lane.py`: one stream, one lock and one workspace for all engines of a pipeline, which never run at the same time.
- `plan.py`: fixed buffers and execution contexts for one shape (`PlanKey`), its enqueues and its graph.
- `denoiser.py`: plans in a bounded cache behind the pipeline's `Denoiser` interface.

A shape's first picture is enqueued plainly, which is the warm-up that engines want before capture, its second one is
captured, and later ones are replayed; `Pipeline.warm_up` does the first two ahead.

Locks are taken in this order: a denoiser's, `Parts`', a host engine's, the lane's.
"""
