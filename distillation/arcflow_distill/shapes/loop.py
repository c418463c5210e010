"""Shared by the training stages of the small model: learning rate schedule, Muon, averaged weights, processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence

import torch

from arcflow_distill.errors import DistillError


def rate(step: int, total: int, warmup: int) -> float:
    """The factor for the learning rate at a step: linear warm-up, then half a cosine down to zero at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan): momentum, orthogonalised by Newton-Schulz iterations, for weights with two or more axes.

    torch.optim.Muon accepts only matrices. Here a convolution's kernel is treated as a matrix [out, in * height *
    width].
    """

    COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                update = self._orthogonal(gradient.lerp(state["momentum"], group["momentum"]).flatten(1))
                rows, columns = update.shape
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _orthogonal(self, update: torch.Tensor) -> torch.Tensor:
        a, b, c = self.COEFFICIENTS
        x = update / (update.norm() + 1e-7)
        tall = x.shape[0] > x.shape[1]
        x = x.mT if tall else x
        for _ in range(self.ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x


class Average:
    """Exponential moving average of parameters in float32; after n updates the decay is min(decay, (1+n)/(10+n))."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float):
        self.parameters, self.decay, self.count = list(parameters), decay, 0
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current parameters."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def store(self) -> None:
        """Overwrite the parameters with their average."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)


def launch(module: str, arguments: Sequence[str], processes: int = 1) -> None:
    """Run `python -m module` in `processes` processes that train one model together and share the cores.

    Raises:
        DistillError: the training failed; its message is on stderr.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", module, *arguments]
    code = subprocess.run(command, env=environment(cores() // processes)).returncode
    if code:
        raise DistillError(f"{module} failed with exit code {code}; the reason is above")


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(threads: int) -> dict[str, str]:
    """This process's environment, for a child process that computes with `threads` threads."""
    cpu = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    return os.environ | cpu | {"OMP_NUM_THREADS": str(max(1, threads))}
