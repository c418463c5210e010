"""Train the small shapes model from nothing: judge, VAE, teacher, its students, and their evaluation.

`arcflow train-shapes` runs this. Each stage writes its directory atomically, and is skipped if the directory exists. So
a stopped run continues with the stage that it was in.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from arcflow_distill.errors import DistillError
from arcflow_distill.evaluate.options import EvaluationOptions
from arcflow_distill.evaluate.run import evaluate
from arcflow_distill.shapes import teacher, vae
from arcflow_distill.shapes.loop import cores, environment, launch
from arcflow_distill.train.config import load_config
from arcflow_export.images import judge
from arcflow_runtime.disk.files import whole_directory, whole_file

#: The smallest amounts of training, for trial runs.
_LEAST = {"steps": 2, "images": 64, "samples": 512, "iterations": 2, "count": 8}


@dataclass(frozen=True)
class Recipe:
    """The stages of the training, with their amounts.

    Args:
        out: directory to work in; its folders `teacher`, `adapter` and `judge` are the model.
        seed: seed of all stages.
        scale: factor for every amount of training; 1 for the real model.
    """

    out: Path
    seed: int = 0
    scale: float = 1.0

    def run(self) -> None:
        """Run every stage that is not done, and record its time in `recipe.json`.

        Raises:
            DistillError: a stage failed.
        """
        self.out.mkdir(exist_ok=True)
        stages: list[tuple[str, Callable[[Path], None]]] = [
            ("judge", self._judge),
            ("vae", self._vae),
            ("teacher", self._teacher),
            ("adapter", self._students),
            ("eval", self._eval),
        ]
        for name, stage in stages:
            folder = self.out / name
            if folder.exists():
                print(f"{name}: done before, {folder}")
                continue
            start = time.monotonic()
            stage(folder)
            self._note(name, time.monotonic() - start)

    def _judge(self, folder: Path) -> None:
        steps = self._amount("steps", judge.STEPS)
        with tqdm(total=steps, desc="judge", disable=None) as bar, whole_directory(folder) as partial:
            trained = judge.train_judge(self.seed, lambda loss: bar.update(), steps)
            trained.save(partial)

    def _vae(self, folder: Path) -> None:
        images = self._amount("images", vae.IMAGES)
        with whole_directory(folder) as partial:
            launch(vae.__name__, ["--out", str(partial), "--seed", str(self.seed), "--images", str(images)])

    def _teacher(self, folder: Path) -> None:
        samples = self._amount("samples", teacher.SAMPLES)
        arguments = ["--vae", str(self.out / "vae"), "--seed", str(self.seed), "--samples", str(samples)]
        # At these sizes, two processes with one thread each are a quarter faster than one process with two.
        processes = 1 if torch.cuda.is_available() else min(2, cores())
        with whole_directory(folder) as partial:
            launch(teacher.__name__, [*arguments, "--out", str(partial)], processes)

    def _students(self, folder: Path) -> None:
        """Distil the student and, at the same time, a student with a single mode to compare with."""
        linear = self.out / "linear"
        log = self.out / "linear.log"
        with log.open("w") as handle:
            other = None
            if not linear.exists():
                command = self._distill(linear, "--modes", "1")
                other = subprocess.Popen(command, env=environment(cores() // 2), stdout=handle, stderr=handle)
            try:
                code = subprocess.run(self._distill(folder), env=environment(cores() // 2)).returncode
                if code:
                    raise DistillError(f"the distillation failed with exit code {code}; the reason is above")
                if other and other.wait():
                    raise DistillError(f"the linear student's distillation failed; see {log}")
            finally:
                if other and other.poll() is None:
                    other.terminate()
                    other.wait()

    def _distill(self, folder: Path, *options: str) -> list[str]:
        preset = load_config("shapes")
        iterations = self._amount("iterations", preset.iterations)
        decay = f"decay_iterations={preset.decay_iterations * iterations // preset.iterations}"
        command = [sys.executable, "-m", "arcflow_runtime.cli", "distill", "shapes"]
        command += ["--base", str(self.out / "teacher")]
        command += ["--out", str(folder), "--seed", str(self.seed), "--iterations", str(iterations), "--set", decay]
        resume = ["--resume"] if folder.with_name(f"{folder.name}.training").exists() else []
        return [*command, *resume, *options]

    def _eval(self, folder: Path) -> None:
        options = EvaluationOptions(self._amount("count", EvaluationOptions.count), self.seed)
        students = {"linear": self.out / "linear"}
        report = evaluate(self.out / "adapter", self.out / "teacher", folder, students, self.out / "judge", options)
        print(report.table())

    def _amount(self, kind: str, full: int) -> int:
        return max(_LEAST[kind], round(full * self.scale))

    def _note(self, stage: str, seconds: float) -> None:
        path = self.out / "recipe.json"
        done = json.loads(path.read_text())["seconds"] if path.exists() else {}
        notes = {"seed": self.seed, "scale": self.scale, "seconds": done | {stage: round(seconds, 1)}}
        with whole_file(path) as partial:
            partial.write_text(json.dumps(notes, indent=2) + "\n")
