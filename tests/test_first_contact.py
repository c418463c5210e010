"""benchmarks/gpu/first_contact.py on the CUDA driver made of host memory; its limits, interruptions and sentences."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arcflow_runtime.engines.gpus import find_gpu

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu" / "first_contact.py"
#: The limit given to the command, for a busy machine; its processes are given some more.
LIMIT_S = 900
TIMEOUT_S = LIMIT_S + 60


@pytest.fixture
def start(on_host_driver, tmp_path):
    """A function (*arguments) that starts the command with results in tmp_path / "out"."""
    pytest.importorskip("torch", reason="first_contact.py needs torch")
    environment = dict(on_host_driver)
    driver = environment.pop("LD_LIBRARY_PATH")

    def start(*arguments):
        command = [sys.executable, SCRIPT, "--out", tmp_path / "out", "--host-driver", driver, *arguments]
        command += ["--limit-s", LIMIT_S]
        return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)

    return start


def results(tmp_path):
    return json.loads((tmp_path / "out" / "first_contact.json").read_text())["steps"]


def finish(process):
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def check_student(entry, ways):
    assert [row["way"] for row in entry["result"]["rows"]] == ways, entry
    assert all(row["finite"] for row in entry["result"]["rows"])
    graph = next(row for row in entry["result"]["rows"] if row["way"] == "graph")
    assert (graph["graph"], graph["obstacle"], graph["same_bits_as_first"]) == (True, None, True)
    # bfloat16 heads of the same latents, so the two differ by float32's rounding in the update: K terms of 2**-24.
    assert entry["result"]["relative_difference_from_torch_loop"]["graph"] < 16 * 2**-24


def check_partial_answers(first_contact, found):
    """A step that is killed has written its first rows, and its answer has them."""
    steps = {step.name: step for step in first_contact.STEPS}
    plan, bandwidth = (dict(found[name]["result"]) for name in ("plan", "bandwidth"))
    for key in ("relative_difference_from_torch_loop", "graph_has_the_bits_of_plain"):
        plan.pop(key)
    said = steps["plan"].answer(plan | {"rows": plan["rows"][:1]})
    assert re.fullmatch(r"0.000624 billion parameters at 64 px, without torch.compile: plain .* ms", said), said
    said = steps["bandwidth"].answer(bandwidth | {"results": bandwidth["results"][:1], "noise": []})
    assert said.endswith("1 of 1 sizes and dtypes are below the goal of 80%. Noise: not measured"), said


@pytest.mark.slow
def test_benchmarks_run(start, tmp_path, first_contact):
    code, output = finish(start("--only", "bandwidth", "plan", "onnxruntime"))
    found = results(tmp_path)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "bandwidth": "answered",
        "plan": "answered",
        "onnxruntime": "cannot run",
    }, output
    assert code == 0
    check_student(found["plan"], ["plain", "graph", "torch loop"])
    assert found["plan"]["result"]["graph_has_the_bits_of_plain"]
    assert len(found["bandwidth"]["result"]["results"]) == 3
    check_partial_answers(first_contact, found)
    assert found["onnxruntime"]["said"].endswith("has no CUDA provider; install onnxruntime-gpu in its place")
    table = (tmp_path / "out" / "summary.md").read_text()
    assert all(entry["said"] in table for entry in found.values())
    assert table.count("not reached") == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "first_contact.json",
        "first_contact.log",
        "summary.md",
    ]


@pytest.mark.lengthy
@pytest.mark.slow
def test_every_step_runs(start, tmp_path):
    code, output = finish(start())
    found = results(tmp_path)
    assert {name for name, entry in found.items() if entry["status"] != "answered"} == {"onnxruntime"}, output
    assert code == 0
    check_student(found["compiled"], ["torch loop", "graph"])
    assert found["kernels"]["result"]["figures"]["largest error as a fraction of its bound"] <= 1


@pytest.mark.slow
def test_an_interrupted_run_continues(start, tmp_path):
    first = start("--only", "noise", "plan")
    try:
        for line in first.stdout:
            if line.startswith("plan ..."):
                break
        first.send_signal(signal.SIGTERM)
        assert first.wait(TIMEOUT_S) == 143
    finally:
        first.kill()
        first.stdout.close()
    kept = results(tmp_path)
    assert {name: entry["status"] for name, entry in kept.items()} == {"noise": "answered"}
    code, output = finish(start("--only", "noise", "plan"))
    assert [line for line in output.splitlines() if line.endswith(" ...")] == ["plan ..."]
    assert code == 0
    assert results(tmp_path)["noise"] == kept["noise"]


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "out"], capture_output=True, text=True)
    said = "error: the CUDA driver finds no GPU here; check that nvidia-smi lists one\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.fixture
def first_contact(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import first_contact

    yield first_contact
    for name in ("first_contact", "steps", "machine"):
        sys.modules.pop(name, None)


def run(first_contact, tmp_path, code, limit_s=60.0, answer=lambda result: f"{result['n']} rows"):
    """Run a step made of Python code, which finds the path of its results in `out`."""
    step = first_contact.Step(
        "made",
        "Does it?",
        limit_s,
        lambda out, mode: ["-c", f"import json, sys, time\nout = {str(out)!r}\n{code}"],
        sys.modules["steps"].read_json,
        answer,
    )
    return first_contact.run_step(
        step, first_contact.Mode(), limit_s, dict(os.environ), tmp_path, tmp_path / "first_contact.log"
    )


WRITE = "open(out, 'w').write(json.dumps({'n': 2}))\n"


@pytest.mark.parametrize(
    ("code", "status", "said", "result"),
    [
        (WRITE, "answered", "2 rows", {"n": 2}),
        ("print('no card'); sys.exit(3)", "cannot run", "no card", None),
        ("raise ValueError('broken')", "failed", "exit status 1: ValueError: broken; it had measured nothing", None),
        (
            WRITE + "raise ValueError('broken')",
            "failed",
            "exit status 1: ValueError: broken; so far: 2 rows",
            {"n": 2},
        ),
        (
            "sys.exit('python3: No module named pytest')",
            "cannot run",
            "pytest is not installed; add its wheel and those of iniconfig and pluggy",
            None,
        ),
        ("open(out, 'w').write('{')", "failed", "exit status 0: it printed nothing; it had measured nothing", None),
    ],
)
def test_outcomes(first_contact, tmp_path, code, status, said, result):
    entry = run(first_contact, tmp_path, code)
    assert (entry["status"], entry["said"], entry["result"]) == (status, said, result)


@pytest.mark.slow
def test_a_hung_step_is_killed_with_its_children(first_contact, tmp_path):
    hang = (
        "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\nprint('begun', flush=True)\ntime.sleep(600)"
    )
    limit_s = 8.0  # enough for Python to start on a busy machine
    entry = run(first_contact, tmp_path, WRITE + hang, limit_s)
    assert entry["status"] == "killed"
    assert entry["said"] == "killed after 8 s, its last line: begun; so far: 2 rows"
    assert entry["result"] == {"n": 2}
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    for _ in range(50):
        # A killed child whose parent is gone is a zombie until init has waited for it.
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child still runs")


def test_failed_tests_are_failures(first_contact, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase name='a'><properties><property name='numbers compared' value='7'/>"
        "</properties></testcase><testcase name='b'><failure message='assert 1 == 2&#10;more'/></testcase>"
        "</testsuite></testsuites>"
    )
    steps = sys.modules["steps"]
    (noise,) = (s for s in steps.STEPS if s.name == "noise")
    judged = first_contact._judge(noise, 1, "1 failed, 1 passed", steps.read_tests(report), 30)
    assert judged["status"] == "failed"
    assert judged["said"] == "1 of 2 tests FAILED, the first is b: assert 1 == 2"


def test_another_source_or_machine_starts_again(first_contact, tmp_path, capsys):
    path = tmp_path / "first_contact.json"
    now = {"format": "f", "sources": "a", "machine": {"gpu": "x"}, "small": False}
    assert first_contact.load(path, now) == now | {"steps": {}}
    before = now | {"steps": {"noise": {"status": "answered"}}}
    path.write_text(json.dumps(before))
    assert first_contact.load(path, now) == before
    assert capsys.readouterr().out == ""
    other = now | {"sources": "b"}
    assert first_contact.load(path, other) == other | {"steps": {}}
    assert capsys.readouterr().out == f"{path} is of another source, machine or mode: every step runs again\n"


def test_limits_are_within_eight_minutes(first_contact):
    assert sum(step.limit_s for step in first_contact.STEPS) <= first_contact.LIMIT_S == 480


def test_wheels_that_are_not_there(first_contact, tmp_path):
    assert first_contact.install_wheels(tmp_path, tmp_path / "site") == f"{tmp_path} has no wheels"
    (tmp_path / "broken-1-py3-none-any.whl").write_bytes(b"no wheel")
    assert first_contact.install_wheels(tmp_path, tmp_path / "site").startswith(
        "the wheels cannot be installed: ERROR:"
    )
