"""Plan a compile job: student file and options of `arcflow compile` -> the stages in order, with commands and keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arcflow_export.pipeline.identity import Output, digest, identify, version
from arcflow_export.pipeline.students import FILE_OPTIONS, Checkpoint, Precision, StudentFile
from arcflow_runtime.disk.manifest import ENGINES
from arcflow_runtime.disk.quant_formats import BY_OPTION, FORMATS, FormatFacts

Backend = Literal["onnxruntime", "tensorrt-rtx", "tensorrt"]
DOWNLOAD, EXPORT, CALIBRATE, QUANTIZE, VERIFY, BUILD = "download", "export", "calibrate", "quantize", "verify", "build"
#: Options of `arcflow export` for a straight student that `arcflow calibrate` takes too.
_SHARED = ("--steps", "--schedule", "--shift", "--sigmas", "--true-cfg-scale", "--max-sequence-length")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: Packages whose versions change a stage's output.
_PACKAGES = {
    EXPORT: ("arcflow", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript"),
    CALIBRATE: ("arcflow", "torch", "diffusers", "transformers", "peft", "nvidia-modelopt"),
    QUANTIZE: ("arcflow", "onnx", "onnx-ir", "ml_dtypes"),
    VERIFY: ("arcflow", "numpy", "onnxruntime", "ml_dtypes"),
    BUILD: ("arcflow",),
}


@dataclass(frozen=True)
class CompileJob:
    """The checked options of `arcflow compile`; None leaves a default to the stage.

    `scales` is the user's own scales file, or None for the one in `out`. `size` is (height, width) in pixels of the
    images that calibration and the gate generate. `anyway` starts stages that do not fit in memory or on the disk.
    """

    student: StudentFile
    out: Path
    precision: Precision
    backend: Backend = "onnxruntime"
    target: str | None = None
    policy: str | None = None
    scales: Path | None = None
    gate: bool = True
    offline: bool = False
    device: str | None = None
    limit: int | None = None
    size: tuple[int, int] | None = None
    anyway: bool = False

    def bundle(self, precision: str) -> Output:
        """The output bundle for a precision."""
        return Output(self.out / f"{self.student.name}-{precision}", "bundle")

    @property
    def exported(self) -> Output:
        """The bundle that the export writes. For a quantised precision it is the unquantised one: bf16, or fp32 for
        ONNX Runtime on a CPU, which has no bfloat16.
        """
        if self.quantized is None:
            return self.bundle(self.precision)
        return self.bundle("fp32" if self.backend == "onnxruntime" else "bf16")

    @property
    def quantized(self) -> FormatFacts | None:
        """The number format of the precision; None if it is not quantised."""
        return FORMATS[BY_OPTION[self.precision]] if self.precision in BY_OPTION else None

    @property
    def chosen_policy(self) -> str | None:
        """The policy that is given, or else the student's own; None for the family's preset for the format.

        A student's policy is for its own precision, or for FP8.
        """
        if self.policy is not None or self.precision not in ("fp8", self.student.precision):
            return self.policy
        return self.student.policy

    @property
    def result(self) -> Output:
        """The final bundle, which users run."""
        return self.bundle(self.precision)


@dataclass(frozen=True)
class Input:
    """A file or folder that a stage reads, given in its command; `output` is set if an earlier stage writes it."""

    path: Path
    output: Output | None = None
    suffix: str = ""

    def identity(self) -> str | None:
        """A text that differs if the contents differ; None if the file or folder is missing."""
        if self.output is not None:
            return self.output.identity()
        return identify(self.path) if self.path.exists() else None


@dataclass(frozen=True)
class Stage:
    """One stage, run as the subprocess `arcflow NAME ...`.

    `words` are its arguments. `target` are further arguments that do not change the contents of its output, such as the
    path. `facts` are other things that the output depends on. `folder` is the folder that it writes into, if that is
    not an output of its own. `record` is its name in the records.
    """

    name: str
    words: tuple[str | Input, ...]
    target: tuple[str, ...] = ()
    output: Output | None = None
    facts: tuple[str, ...] = ()
    record: str = ""
    folder: Path | None = None

    @property
    def command(self) -> list[str]:
        """The full argument list, starting with the command's name."""
        words = [f"{w.path}{w.suffix}" if isinstance(w, Input) else w for w in self.words]
        return [self.name, *words, *self.target]

    @property
    def inputs(self) -> list[Input]:
        """The files and folders that it reads."""
        return [w for w in self.words if isinstance(w, Input)]

    def key(self) -> str | None:
        """SHA-256 of its arguments, inputs and package versions; None while an input is missing.

        A stage whose key has changed since its last run is run again.
        """
        words: list[object] = []
        for word in self.words:
            if isinstance(word, Input):
                if (identity := word.identity()) is None:
                    return None
                words.append([identity, word.suffix])
            else:
                words.append(word)
        return digest([self.name, words, self.facts, [[p, version(p)] for p in _PACKAGES.get(self.name, ())]])


def plan_stages(job: CompileJob, commits: Mapping[str, str]) -> list[Stage]:
    """The stages of a job in the order in which they run.

    Args:
        job: the compile job.
        commits: the known commits on the hub, by `commit_name`.
    """
    student, exported, bundle = job.student, job.exported, job.result
    remote = [c for c in student.checkpoints if c.path is None]
    sources = _sources(student, commits)
    loras = tuple(commits.get(commit_name(c), "unknown") for c in student.loras if c.path is None)
    stages = []
    if remote:
        stages.append(Stage(DOWNLOAD, (*sources, *(["--offline"] if job.offline else []), "--json")))
        sources = (*sources, "--offline")  # later stages use the downloaded files
    opset = ["--opset", "20"] if exported == job.bundle("fp32") and job.backend != "onnxruntime" else []
    words = (*sources, "--dtype", DTYPES[exported.path.name.rpartition("-")[2]], *opset, *_files(student.export))
    stages.append(_writing(job, EXPORT, words, exported, ("--out", str(exported.path), "--overwrite"), loras))
    if job.quantized is not None:
        stages += _quantise(job.quantized, job, sources, loras)
    if job.backend != "onnxruntime":
        words = (
            Input(bundle.path, bundle),
            "--backend",
            job.backend,
            *_option("--target", job.target),
            *_files(student.build),
        )
        record = f"{bundle.path.name}/{ENGINES} {job.backend} {job.target or 'here'}"
        stages.append(Stage(BUILD, words, _anyway(job), record=record, folder=bundle.path / ENGINES))
    return stages


def commit_name(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint on the hub in the records: ID, or ID@REVISION."""
    return f"{checkpoint.name}@{checkpoint.revision}" if checkpoint.revision else checkpoint.name


def _quantise(
    facts: FormatFacts, job: CompileJob, sources: Iterable[str | Input], loras: tuple[str, ...]
) -> list[Stage]:
    exported, bundle, student = job.exported, job.result, job.student
    scales = Output(job.scales or job.out / f"{student.name}-scales.json", "scales")
    report = Output(job.out / f"{student.name}-drift", "report")
    policy = tuple(_policy(job.chosen_policy))
    limit = _option("--limit", job.limit)
    height, width = job.size or (None, None)
    sizes = ["--sizes", f"{height}x{width}"] if job.size else []
    device = _option("--device", job.device)
    given = Input(exported.path, exported)
    # FP8 is the command's default; a record keeps its key.
    stages: list[Stage] = []
    words: tuple[str | Input, ...] = (given, *([] if facts.option == "fp8" else ["--format", facts.option]))
    if facts.calibrated:
        calibration = (*sources, *_files(student.calibrate), *_shared(student), *limit, *sizes, *device)
        out = ("--out", str(scales.path), "--overwrite")
        stages.append(_writing(job, CALIBRATE, calibration, scales, out, loras))
        words = (*words, "--scales", Input(scales.path, scales))
    words = (*words, *policy)
    target: tuple[str, ...] = ("--out", str(bundle.path), "--overwrite", *_anyway(job))
    stages.append(_writing(job, QUANTIZE, words, bundle, target))
    if job.gate:
        words = (Input(bundle.path, bundle), "--against", given, *_files(student.verify), *limit)
        words = (*words, *_option("--height", height), *_option("--width", width), *policy)
        stages.append(_writing(job, VERIFY, words, report, ("--report", str(report.path), *_anyway(job))))
    return stages


def _writing(
    job: CompileJob,
    name: str,
    words: Iterable[str | Input],
    output: Output,
    target: tuple[str, ...],
    facts: tuple[str, ...] = (),
) -> Stage:
    path = output.path.absolute()
    record = path.name if path.parent == job.out.absolute() else str(path)
    return Stage(name, tuple(words), target, output, facts, record)


def _sources(student: StudentFile, commits: Mapping[str, str]) -> tuple[str | Input, ...]:
    """The options that name the student; a checkpoint on the hub is given by its commit once that is known."""
    words: list[str | Input] = []
    for name, checkpoint in (("base", student.base), ("adapter", student.adapter)):
        if checkpoint is None:
            continue
        words += [f"--{name}", checkpoint.name if checkpoint.path is None else Input(checkpoint.path)]
        words += _option(f"--{name}-subfolder", checkpoint.subfolder)
        if checkpoint.path is None:
            words += _option(f"--{name}-revision", commits.get(commit_name(checkpoint), checkpoint.revision))
    for lora in student.loras:
        suffix = f":{lora.scale:g}"
        words += ["--lora", lora.name + suffix if lora.path is None else Input(lora.path, suffix=suffix)]
    return tuple(words)


def _files(words: tuple[str, ...]) -> list[str | Input]:
    """A student file's options, with the files that they name turned into inputs."""
    named = [i + 1 for i, word in enumerate(words[:-1]) if word in FILE_OPTIONS]
    return [Input(Path(w)) if i in named and Path(w).is_absolute() else w for i, w in enumerate(words)]


def _shared(student: StudentFile) -> list[str]:
    """The options of a straight student's export that its calibration must share, unless it has its own.

    Without an adapter, the schedule is the base's and not one that both commands have as default.
    """
    if student.adapter is not None:
        return []
    given = dict(_named(student.export))
    own = {name for name, _ in _named(student.calibrate)}
    words = []
    for name, value in given.items():
        option = {"--steps": "--num-inference-steps"}.get(name, name)
        if name in _SHARED and option not in own:
            # The first of several step counts is the bundle's own.
            words += [option, value.split(",")[0] if name == "--steps" else value]
    return words


def _named(words: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Options with their values, from words such as --steps 4 or --steps=4."""
    for word, following in zip(words, (*words[1:], ""), strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            yield name, value if equals else following


def _policy(policy: str | None) -> list[str | Input]:
    if policy is None:
        return []
    return ["--policy", Input(Path(policy)) if policy.endswith(".toml") else policy]


def _anyway(job: CompileJob) -> tuple[str, ...]:
    return ("--anyway",) if job.anyway else ()


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [name, str(value)]
