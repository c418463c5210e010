"""Time a FLUX student of torch kernels at its real size: in the runtime's plan, and in a loop of torch.

The weights are random and made on the card, so that no checkpoint is needed. The student is conditioner and backbone:
the text states are given, and an image ends at its latents. Ways to run it:

- plain: the runtime's denoiser, which enqueues each kernel of an image;
- graph: the same, as one CUDA graph per image;
- torch loop: the same modules, and the update in torch, as the reference implementation does.

With `--compile`, torch.compile compiles the blocks, and "plain" is left out.

*Host* time of the runtime is an image's wall time without the time of its stages on the device. That of the torch loop
is the time until everything is enqueued, which runs beside the device.

    python benchmarks/gpu/flux_student.py --json FILE
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]
#: The exit status of a step that cannot run on this machine; its last line says why.
CANNOT_RUN = 3


class Student:
    """Both parts on the card, and a request."""

    def __init__(self, small: bool, host_driver: bool) -> None:
        import torch
        from flux_torch import random_student
        from torch_engine import Card, CudaCard

        from arcflow_runtime.gpu.cuda import open_device
        from tests.gpu.flux_bundle import TINY, FluxSizes, flux_bundle, make_job

        self.torch = torch
        self.sizes, self.size_px, text_tokens = (TINY, 64, 16) if small else (FluxSizes(), 1024, 512)
        self.torch_device = "cpu" if host_driver else "cuda"
        self.device = open_device()
        self.card: Card
        if host_driver:
            from tests.host_cuda.torch_card import HostCard

            self.card = HostCard()
        else:
            self.card = CudaCard()
        self.bundle = flux_bundle(self.sizes, "bfloat16")
        self.job = make_job(self.bundle, self.size_px, text_tokens, (1,))
        self.modules = random_student(self.sizes, torch.bfloat16, self.torch_device)

    def parameters(self) -> dict[str, int]:
        """Number of parameters by part."""
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self.modules.items()}

    def compile(self) -> None:
        """Compile the blocks: one compilation serves all blocks of a kind. On a CPU they are traced only."""
        from flux_torch import Backbone

        backend = "inductor" if self.torch_device == "cuda" else "eager"
        backbone = self.modules["backbone"]
        assert isinstance(backbone, Backbone)
        for block in (*backbone.double_blocks, *backbone.single_blocks):
            block.compile(dynamic=False, backend=backend)

    def wait(self) -> None:
        """Wait for the card."""
        if self.torch_device == "cuda":
            self.torch.cuda.synchronize()

    @contextmanager
    def runtime(self, graph: bool) -> Iterator[tuple[Callable[[], tuple[Any, dict[str, float]]], Any]]:
        """A function that generates an image with the runtime -> latents and the stages' times in ms; its denoiser."""
        from torch_engine import TorchEngine

        from arcflow_runtime.engines.stopwatch import Stopwatch
        from tests.gpu.stand_in import open_denoiser

        obstacle = None if graph else "measured without a graph"
        m = self.bundle.manifest
        denoiser, parts = open_denoiser(
            self.device, self.bundle, lambda part: TorchEngine(m, part, self.modules[part], self.card, obstacle)
        )

        def generate() -> tuple[Any, dict[str, float]]:
            watch = Stopwatch()
            return denoiser.denoise(self.job, watch).latents, dict(watch.ms)

        try:
            yield generate, denoiser
        finally:
            denoiser.close()
            parts.close()

    def torch_loop(self) -> tuple[Callable[[], Any], Any]:
        """A function that enqueues an image with torch alone -> latents on the card; the noise that it starts from."""
        from flux_torch import update

        from arcflow_runtime.maths.noise import draw_latents

        torch, job = self.torch, self.job
        side = self.size_px // 8
        noise = torch.from_numpy(draw_latents([1], 1, 16, side, side, 2)).to(self.torch_device)

        def put(array: Any, dtype: Any) -> Any:
            return torch.tensor(array).to(self.torch_device, dtype)

        text = job.texts[0]
        conditioning = {
            "timesteps": put(job.timesteps, torch.float32),
            "guidance": put([float(job.guidance or 0)], torch.float32),
            "pooled_projections": put(text.pooled, torch.bfloat16),
        }
        given = {
            "encoder_hidden_states": put(text.states, torch.bfloat16),
            "image_rotary": put(job.image_rotary, torch.float32),
            "text_rotary": put(job.text_rotary, torch.float32),
        }
        sigmas = [float(s) for s in job.sigmas]

        def generate() -> Any:
            with torch.no_grad():
                modulation = self.modules["conditioner"](**conditioning)["modulation"]
                latents = noise
                for step in range(len(job.timesteps)):
                    heads = self.modules["backbone"](
                        latents=latents.to(torch.bfloat16), modulation=modulation[step], **given
                    )
                    latents = update(latents, heads, sigmas[step], sigmas[step + 1])
                return latents

        return generate, noise


def time_runtime(student: Student, graph: bool, runs: int) -> tuple[dict[str, Any], Any]:
    """Measure the runtime's plan: a row of the results, and the latents."""
    with student.runtime(graph) as (generate, denoiser):
        first = generate()[0]
        for _ in range(2):  # the second captures
            latents, _ = generate()
        (plan,) = denoiser._plans.values()
        wall, host, cpu = [], [], []
        stages: dict[str, list[float]] = {}
        for _ in range(runs):
            begun, begun_cpu = time.perf_counter(), time.thread_time()
            latents, ms = generate()
            wall.append((time.perf_counter() - begun) * 1e3)
            cpu.append((time.thread_time() - begun_cpu) * 1e3)
            on_device = {stage: t for stage, t in ms.items() if stage != "stage"}  # "stage" is the host's copy
            host.append(wall[-1] - sum(on_device.values()))
            for stage, t in on_device.items():
                stages.setdefault(stage, []).append(t)
        row = {
            "way": "graph" if graph else "plain",
            "graph": plan.graph is not None,
            "obstacle": plan.obstacle,
            "wall": _spread(wall),
            "host": _spread(host),
            "host_cpu": _spread(cpu),
            "stages_ms": {stage: statistics.median(times) for stage, times in stages.items()},
            "same_bits_as_first": bool((first == latents).all()),
        }
    return row, latents


def time_torch(student: Student, runs: int) -> tuple[dict[str, Any], Any]:
    """Measure the loop of torch: a row of the results, and the latents."""
    generate, _ = student.torch_loop()
    begun = time.perf_counter()
    generate()
    student.wait()
    first_s = time.perf_counter() - begun
    for _ in range(2):
        generate()
    student.wait()
    wall, host = [], []
    for _ in range(runs):
        begun = time.perf_counter()
        latents = generate()
        host.append((time.perf_counter() - begun) * 1e3)
        student.wait()
        wall.append((time.perf_counter() - begun) * 1e3)
    row = {"way": "torch loop", "first_image_s": first_s, "wall": _spread(wall), "host": _spread(host)}
    return row, latents.float().cpu().numpy()


def _spread(ms: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(ms, n=10)
    return {"median_ms": statistics.median(ms), "p10_ms": deciles[0], "p90_ms": deciles[-1]}


def relative(a: Any, b: Any) -> float:
    """The norm of the difference, relative to that of `b`."""
    return float(((a - b) ** 2).sum() ** 0.5 / (b**2).sum() ** 0.5)


def cannot_run(host_driver: bool) -> str | None:
    """Why this machine cannot run it, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not host_driver and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    return None


def main() -> int:
    """Measure each way, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="write the results here, after each way")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--runs", type=int, default=20, help="timed images of each way; at least 2")
    parser.add_argument("--small", action="store_true", help="a student of 0.6 million parameters at 64 px")
    parser.add_argument("--host-driver", action="store_true", help="torch on the CPU, the plan on tests/host_cuda/")
    args = parser.parse_args()
    if (why := cannot_run(args.host_driver)) is not None:
        print(why, file=sys.stderr)
        return CANNOT_RUN
    begun = time.perf_counter()
    student = Student(args.small, args.host_driver)
    student.wait()
    data: dict[str, Any] = {
        "compiled": args.compile,
        "size_px": student.size_px,
        "parameters": student.parameters(),
        "made_in_s": time.perf_counter() - begun,
        "rows": [],
    }
    latents: dict[str, Any] = {}
    if args.compile:
        student.compile()
    ways: dict[str, Callable[[], tuple[dict[str, Any], Any]]] = {
        "plain": lambda: time_runtime(student, False, args.runs),
        "graph": lambda: time_runtime(student, True, args.runs),
        "torch loop": lambda: time_torch(student, args.runs),
    }
    # What torch.compile compiles, it compiles in the loop.
    for way in ("torch loop", "graph") if args.compile else ("plain", "graph", "torch loop"):
        row, made = ways[way]()
        latents[way] = made
        row["finite"] = bool(abs(made).max() < float("inf"))
        data["rows"].append(row)
        data["relative_difference_from_torch_loop"] = {
            name: relative(found, latents["torch loop"]) for name, found in latents.items() if "torch loop" in latents
        }
        if "plain" in latents and "graph" in latents:
            data["graph_has_the_bits_of_plain"] = bool((latents["plain"] == latents["graph"]).all())
        if student.torch_device == "cuda":
            data["peak_torch_bytes"] = student.torch.cuda.max_memory_allocated()
        args.json.write_text(json.dumps(data, indent=2) + "\n")
        print(f"{way}: {row['wall']['median_ms']:.2f} ms an image, host {row['host']['median_ms']:.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
