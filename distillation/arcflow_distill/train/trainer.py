"""Train a student: base checkpoint and prompts -> an adapter. `arcflow distill` calls `distill`.

One iteration draws random noise and prompts and runs every step of the student. Each step is compared with the teacher
along its segment (`trajectory.walk_segment`) and back-propagated separately. Then the weights are updated once.

Each iteration seeds its own random generators from the run's seed, the iteration and the process. So a resumed run
continues exactly as if it had never stopped, and a checkpoint needs no generator state.

Differences from the reference implementation: the last normalisation, the heads and the integral are float32 instead of
bfloat16; phi is exact near 0; the optimizer is torch's AdamW in float32 instead of an 8-bit one; prompts are drawn with
replacement. As in the reference, gradients are not clipped during the warm-up, and an update with a gradient that is
not finite is skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from arcflow_distill.errors import DistillError
from arcflow_distill.train.adapter import write_adapter
from arcflow_distill.train.checkpoint import load_state, read_facts, save_state
from arcflow_distill.train.config import Config
from arcflow_distill.train.ema import Ema
from arcflow_distill.train.folders import check_out, training_folder
from arcflow_distill.train.interrupts import Interrupts
from arcflow_distill.train.networks import (
    Canvas,
    StudentNetwork,
    TeacherNetwork,
    base_family,
    count_by_kind,
    load_transformer,
)
from arcflow_distill.train.policy import Policy, warp
from arcflow_distill.train.progress import Figures, Log
from arcflow_distill.train.prompts import Encoder, TextSource, collate, read_prompts
from arcflow_distill.train.trajectory import Mixing, walk_segment
from arcflow_export.checkpoint.tensors import TensorIndex

#: Pixels per side of a packed token.
_TOKEN = 16
#: Learning rate at the first iteration of the warm-up, as a share of the full rate.
_WARMUP_FROM = 1e-3
#: The training fails after this many skipped updates in a row.
_MAX_SKIPPED = 20
#: Settings that may differ between a stopped run and the one that resumes it.
_FREE_TO_CHANGE = {"iterations", "save_every", "cached_prompts", "gradient_checkpointing", "adapter_dtype"}
_RECORDED = ("torch", "diffusers", "transformers", "peft", "accelerate")


def teacher_ratio(config: Config, iteration: int) -> float:
    """The teacher's share of the walk at an iteration, counted from 0; it falls linearly from 1 to 0."""
    if config.decay_iterations == 0:
        return 0.0
    return max(0.0, 1 - iteration / config.decay_iterations)


def learning_rate(config: Config, iteration: int) -> float:
    """The learning rate at an iteration, counted from 0."""
    if iteration < config.warmup:
        return config.learning_rate * (_WARMUP_FROM + (1 - _WARMUP_FROM) * iteration / config.warmup)
    if config.schedule == "constant":
        return config.learning_rate
    done = (iteration - config.warmup) / max(config.iterations - config.warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class Distillation:
    """One run on one process's device: teacher, student, optimizer, and the moving average of the student's weights."""

    def __init__(self, config: Config, base: Path, accelerator: Accelerator):
        """Encode the prompts and load the base; all random numbers come from the configuration's seed."""
        torch.manual_seed(config.seed)
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.family = base_family(base)
        dtype = getattr(torch, config.dtype)
        prompts = read_prompts(config)
        encoder = Encoder(base, self.family, dtype, self.device, config.max_sequence_length)
        self.text = TextSource(prompts, encoder, config.cached_prompts, self.device)
        del encoder
        transformer = load_transformer(base, self.family, dtype).to(self.device)
        self.base_config = dict(transformer.config)
        self.base_parameters = sum(p.numel() for p in transformer.parameters())
        self.teacher = TeacherNetwork(transformer, self.family, config.true_cfg_scale)
        student = StudentNetwork(transformer, self.family, config.modes, config.rank, config.lora_dropout)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.trained = student.trained()
        self.student = accelerator.prepare(student.train())
        self.ema = Ema(self.trained, config.ema_gamma, config.ema_start)
        self.optimizer = _optimizer(self.trained, config)
        self.mixing = Mixing(
            config.intermediate_states,
            config.substeps,
            config.window_substeps,
            config.mode_dropout,
            config.center_window,
        )
        self._generator = torch.Generator()
        self._skipped = 0

    def iterate(self, iteration: int) -> Figures:
        """Train on one batch; `iteration` counts from 0.

        Raises:
            DistillError: the gradient was not finite for many iterations in a row.
        """
        config, generator = self.config, self._generator
        seed = _seed(config.seed, iteration, self.accelerator.process_index)
        torch.manual_seed(seed)  # the LoRA factors' dropout
        generator.manual_seed(seed)
        ratio = teacher_ratio(config, iteration)
        height, width = config.resolutions[_seed(config.seed, iteration, -1) % len(config.resolutions)]
        canvas = Canvas(height // _TOKEN, width // _TOKEN, config.guidance_scale)
        prompts = self.text.draw(config.batch_size, generator)
        text = teacher_text = collate(prompts)
        if config.true_cfg_scale != 1:
            teacher_text = collate([self.text.negative] * len(prompts) + prompts)
        channels = self.base_config["in_channels"]
        x = torch.randn(config.batch_size, canvas.tokens, channels, generator=generator).to(self.device)
        length, total = 1 / config.steps, 0.0
        for step in range(config.steps):
            begin = 1 - step * length
            sigma = warp(torch.tensor(begin))
            last = step == config.steps - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.student):
                means, logweights, loggammas = self.student(x, sigma.to(self.device).expand(len(x)), text, canvas)
                error, x = walk_segment(
                    Policy.from_heads(means, logweights, loggammas, float(sigma)),
                    x,
                    begin,
                    length,
                    ratio,
                    lambda x, sigma: self.teacher(x, sigma, teacher_text, canvas),
                    self.mixing,
                    generator,
                )
                loss = 0.5 * config.loss_scale * length * error
                self.accelerator.backward(loss)
            total += loss.item()
        rate = learning_rate(config, iteration)
        return Figures(total, ratio, rate, self._update(iteration, rate))

    def _update(self, iteration: int, rate: float) -> float:
        """Step the optimizer and the weights' average; returns the gradient's norm before clipping."""
        limit = self.config.grad_clip if iteration >= self.config.warmup else math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.trained.values(), limit))
        if math.isfinite(norm):
            self._skipped = 0
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            self.optimizer.step()
        else:
            self._skipped += 1
            if self._skipped == _MAX_SKIPPED:
                raise DistillError(
                    f"the gradient was not finite in the last {_MAX_SKIPPED} iterations; "
                    "start again with a lower learning_rate"
                )
        self.optimizer.zero_grad()
        self.ema.update(self.trained, iteration)
        return norm


def distill(
    config: Config,
    base: Path,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_training: bool = False,
    progress: bool = True,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Distil a base checkpoint into an adapter of the released format.

    The checkpoint of a running distillation is `OUT.training/state.safetensors`. On Ctrl-C or SIGTERM, the current
    iteration is finished and the checkpoint written; then the signal has its usual effect.

    Args:
        config: the settings.
        base: directory of a FLUX or Qwen-Image pipeline in diffusers' format.
        out: the adapter's directory, written when training is done.
        resume: continue from the checkpoint.
        overwrite: replace an existing adapter and, if `resume` is False, a stopped run's checkpoint.
        keep_training: keep `OUT.training` with the last checkpoint.
        progress: print a summary and a progress bar to stderr.
        provenance: facts for the adapter's training.json, such as the command.

    Raises:
        DistillError: the run cannot start or continue.
        SourceError: the base is missing or damaged.
    """
    check_out(out, overwrite)
    accelerator = Accelerator(mixed_precision="no")  # the student sets its own autocast
    main = accelerator.is_main_process
    folder = out.absolute().with_name(f"{out.name}.training")
    state = folder / "state.safetensors"
    log = Log(progress and main)
    with training_folder(folder, resume, overwrite, keep_training) if main else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        facts = {
            "config": config.model_dump(mode="json"),
            "base_digest": TensorIndex.open(base / "transformer", "base checkpoint").digest(),
        }
        found = _resumable(state, facts) if resume else None
        run = Distillation(config, base, accelerator)
        log.say(_describe(run))
        start = 0
        if found is not None:
            load_state(state, run.trained, run.ema, run.optimizer)
            log.restore(found["log"])
            start = found["iteration"]
            log.say(f"resumed after {start} iterations")
        _train(run, state, facts, log, start)
        if main:
            dtype = getattr(torch, config.adapter_dtype)
            record = {**(provenance or {}), **facts, **_record(run), **log.state()}
            write_adapter(out, run.ema.tensors, run.base_config, run.family, config.modes, dtype, record)
    accelerator.wait_for_everyone()
    return out


def _train(run: Distillation, state: Path, facts: dict[str, Any], log: Log, start: int) -> None:
    config, accelerator = run.config, run.accelerator
    began, stopped = time.perf_counter() - log.seconds, False

    def save(done: int) -> None:
        if accelerator.is_main_process:
            log.seconds = time.perf_counter() - began
            save_state(state, run.trained, run.ema, run.optimizer, facts | {"iteration": done, "log": log.state()})

    with Interrupts(accelerator) as interrupts:
        with log.bar(start, config.iterations) as advance:
            for done in range(start + 1, config.iterations + 1):
                advance(done - 1, run.iterate(done - 1))
                stopped = interrupts.came()
                if stopped or done % config.save_every == 0 or done == config.iterations:
                    save(done)
                if stopped:
                    break
        if stopped:
            log.say(f"stopped after {done} iterations; --resume continues")
            interrupts.deliver()


def _resumable(state: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of the checkpoint to resume from; checks that its base and settings are the same."""
    found = read_facts(state)
    if found["base_digest"] != facts["base_digest"]:
        raise DistillError(f"--resume: {state} was trained from another base checkpoint; give that one")
    for name, value in facts["config"].items():
        before = found["config"].get(name)
        if name not in _FREE_TO_CHANGE and before != value:
            raise DistillError(
                f"--resume: {name} was {before!r} when the run began and is {value!r} now; give the same value"
            )
    if found["iteration"] > facts["config"]["iterations"]:
        raise DistillError(f"--resume: {found['iteration']} iterations are already done; give more --iterations")
    return found


def _optimizer(trained: dict[str, nn.Parameter], config: Config) -> torch.optim.AdamW:
    """AdamW with one group per learning rate factor; with one mode, the empty loggamma head is left out."""
    groups: dict[float, list[nn.Parameter]] = {1.0: [], config.gamma_rate: []}
    for name, parameter in trained.items():
        if parameter.numel():
            groups[config.gamma_rate if name.startswith("proj_out_loggamma.") else 1.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "factor": factor} for factor, params in groups.items() if params],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=0.0,
        fused=True,
    )


def _seed(*parts: int) -> int:
    """A seed that depends only on `parts`; a hash, so that seeds of neighbouring iterations are unrelated."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def _describe(run: Distillation) -> str:
    counts = count_by_kind(run.trained)
    total = sum(counts.values())
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    prompts = f"{run.text.count:,}, {'encoded once' if run.text.cached else 'encoded as they are drawn'}"
    return (
        f"prompts  {prompts}\n"
        f"base     {run.family}: {run.base_parameters:,} parameters, frozen, {run.config.dtype} on {run.device}\n"
        f"trained  {total:,} parameters, {total / run.base_parameters:.1%} of the base: {kinds}"
    )


def _record(run: Distillation) -> dict[str, Any]:
    return {
        "base_parameters": run.base_parameters,
        "trained_parameters": count_by_kind(run.trained),
        "processes": run.accelerator.num_processes,
        "device": str(run.device),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _RECORDED},
    }
