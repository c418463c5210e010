"""The steps of first_contact.py: a question, the command that answers it, and its results as a sentence.

A command writes its results to a file, and exits with `CANNOT_RUN` if the machine lacks something; its last line then
says what.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
CANNOT_RUN = 3
Result = dict[str, Any]


@dataclass(frozen=True)
class Mode:
    """How the steps run: `small` is for tests, `host_driver` for the driver made of host memory."""

    small: bool = False
    host_driver: bool = False


@dataclass(frozen=True)
class Step:
    """One question.

    Args:
        name: its key in the results.
        question: in words.
        limit_s: seconds after which it is killed.
        command: (file for the results, mode) -> arguments of Python.
        read: reads the results' file.
        answer: the results as a sentence, also those of a step that was killed half-way.
    """

    name: str
    question: str
    limit_s: float
    command: Callable[[Path, Mode], list[str]]
    read: Callable[[Path], Result]
    answer: Callable[[Result], str]


def _tests(*names: str) -> Callable[[Path, Mode], list[str]]:
    files = [str(ROOT / "tests" / "gpu" / f"{name}.py") for name in names]
    return lambda out, mode: ["-m", "pytest", "-q", "-m", "gpu", f"--junit-xml={out}", *files]


def read_tests(path: Path) -> Result:
    """Read pytest's report: which tests passed, failed and were skipped, and the largest value of each property."""
    result: Result = {"passed": 0, "failed": [], "skipped": [], "figures": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if wrong is None:
            result["passed"] += 1
        else:
            kind = "skipped" if wrong.tag == "skipped" else "failed"
            result[kind].append({"test": case.get("name"), "message": wrong.get("message", "")})
        for figure in case.iter("property"):
            name, value = str(figure.get("name")), float(figure.get("value", "nan"))
            result["figures"][name] = max(value, result["figures"].get(name, value))
    return result


def read_json(path: Path) -> Result:
    """Read what a benchmark wrote."""
    result: Result = json.loads(path.read_text())
    return result


def _count(result: Result) -> str:
    failed, passed = result["failed"], result["passed"]
    if failed:
        message = failed[0]["message"].strip().splitlines()[0] if failed[0]["message"].strip() else "no message"
        return f"{len(failed)} of {passed + len(failed)} tests FAILED, the first is {failed[0]['test']}: {message}"
    return f"all {passed} tests pass"


def _kernels(result: Result) -> str:
    worst = result["figures"].get("largest error as a fraction of its bound")
    return _count(result) + (f"; the largest error is {worst:.2f} of its bound" if worst is not None else "")


def _noise(result: Result) -> str:
    figures = result["figures"]
    different, compared = (figures.get(n) for n in ("numbers whose bits differ", "numbers compared"))
    if compared is None or different is None:
        return _count(result)
    return f"{_count(result)}; of {compared:,.0f} numbers at most {different:.0f} differ from the CPU's"


def _bandwidth(result: Result) -> str:
    rows = [r for r in result["results"] if r["heads"] == "bfloat16"] or result["results"]
    said = [
        f"{r['tokens']} tokens {r['update']['median_us']:.1f} us, {r['fraction_of_copy']:.0%} of a copy's bandwidth"
        for r in rows
    ]
    copies = max(r["copy_bytes_per_s"] for r in result["results"])
    noise = "; ".join(f"{r['tokens']} tokens {r['noise']['median_us']:.0f} us" for r in result["noise"])
    missed = sum(not r["goal_met"] for r in result["results"])
    goal = f"{missed} of {len(result['results'])} sizes and dtypes are below the goal of {result['goal']:.0%}"
    return (
        f"update in bfloat16: {'; '.join(said)}. A copy moves up to {copies / 1e12:.2f} TB/s. {goal}. "
        f"Noise: {noise or 'not measured'}"
    )


def _student(result: Result) -> str:
    said = []
    for row in result["rows"]:
        text = f"{row['way']} {row['wall']['median_ms']:.2f} ms an image, host {row['host']['median_ms']:.3f} ms"
        if row["way"] == "graph" and not row["graph"]:
            text += f" (WITHOUT a graph: {row['obstacle']})"
        if not row["finite"]:
            text += " (the latents are NOT finite)"
        if "first_image_s" in row:
            text += f", its first image {row['first_image_s']:.1f} s"
        said.append(text)
    if (same := result.get("graph_has_the_bits_of_plain")) is not None:
        said.append("graph and plain have the same bits" if same else "graph and plain DIFFER")
    differences = result.get("relative_difference_from_torch_loop", {})
    if "graph" in differences:
        said.append(f"the plan's latents are {differences['graph']:.1e} from the torch loop's")
    compiled = "with torch.compile" if result["compiled"] else "without torch.compile"
    billions = sum(result["parameters"].values()) / 1e9
    return f"{billions:.3g} billion parameters at {result['size_px']} px, {compiled}: {'; '.join(said)}"


def _onnxruntime(result: Result) -> str:
    runs = [f"{r['operator']} in {r['dtype']}" for r in result["rows"] if r["runs"]]
    refused = [f"{r['operator']} in {r['dtype']}" for r in result["rows"] if not r["runs"]]
    worst = max((r["error_in_half_ulps_of_the_largest"] for r in result["rows"] if r["runs"]), default=0.0)
    return (
        f"onnxruntime {result['onnxruntime']} runs {len(runs)} of {len(result['rows'])} operators and dtypes, the "
        f"largest error is {worst:.1f} half ulps; it refuses: {', '.join(refused) or 'none'}"
    )


def _bandwidth_command(out: Path, mode: Mode) -> list[str]:
    small = ["--runs", "2", "--tokens", "16", "--working-set-bytes", "100000"] if mode.small else ["--runs", "30"]
    return [str(ROOT / "benchmarks" / "update_kernel.py"), "--json", str(out), *small]


def _student_command(*more: str) -> Callable[[Path, Mode], list[str]]:
    def command(out: Path, mode: Mode) -> list[str]:
        options = [
            *(["--small", "--runs", "2"] if mode.small else []),
            *(["--host-driver"] if mode.host_driver else []),
        ]
        return [str(HERE / "flux_student.py"), "--json", str(out), *options, *more]

    return command


#: In the order of their value; their limits together are the limit of the whole.
STEPS = (
    Step(
        "kernels",
        "Do the update kernels agree with float64, and repeat bit for bit?",
        60,
        _tests("test_update_on_gpu"),
        read_tests,
        _kernels,
    ),
    Step(
        "noise",
        "Does the noise kernel give the CPU's bits?",
        30,
        _tests("test_noise_on_gpu"),
        read_tests,
        _noise,
    ),
    Step(
        "capture",
        "Do copies, events, captures and replays work, and does a replay give the bits of plain calls?",
        40,
        _tests("test_capture_on_gpu", "test_denoiser_on_gpu"),
        read_tests,
        _kernels,
    ),
    Step(
        "bandwidth",
        "How near a copy's bandwidth is the update, and how long does the noise take?",
        60,
        _bandwidth_command,
        read_json,
        _bandwidth,
    ),
    Step(
        "plan",
        "How long does an image of FLUX's size take in the runtime's plan, plain and as a graph, and how much is the "
        "host's?",
        100,
        _student_command(),
        read_json,
        _student,
    ),
    Step(
        "compiled",
        "And beside the same student under torch.compile?",
        150,
        _student_command("--compile"),
        read_json,
        _student,
    ),
    Step(
        "onnxruntime",
        "Which operators of a bundle does ONNX Runtime's CUDA provider run, and how accurately?",
        40,
        lambda out, mode: [str(HERE / "onnxruntime_cuda.py"), "--json", str(out)],
        read_json,
        _onnxruntime,
    ),
)
