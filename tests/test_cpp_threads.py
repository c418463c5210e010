"""Memory, threads and lifetimes of the C++ library's objects, through its C API."""

from __future__ import annotations

import ctypes
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_char_p, c_int32, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import pytest
from fake_bundle import edit_manifest

from tests.cpp import BUNDLE_ERROR, CLOSED, PROMPTS, REQUEST_ERROR, embed


@pytest.mark.parametrize("name", ["flux-tiny", pytest.param("qwen-tiny", marks=pytest.mark.slow)])
def test_low_memory_gives_the_same_images(cpp_library, cpp_bundles, cpp_pipes, name):
    lean = embed.Pipeline(cpp_library, cpp_bundles(name), low_memory=1)
    for _ in range(2):  # the second finds its text in the cache
        ours, theirs = (pipe.generate(PROMPTS, height=32, width=32, seeds=[3]) for pipe in (lean, cpp_pipes(name)))
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    lean.close()


@pytest.mark.slow
def test_every_memory_mode_gives_the_same_images(cpp_library, cpp_bundles, cpp_pipes):
    assert cpp_pipes("flux-tiny").memory == "resident"  # what is chosen on a CPU
    given = {"height": 32, "width": 32, "seeds": [3]}
    expected = cpp_pipes("flux-tiny").generate(PROMPTS, **given)
    for memory in ("resident", "balanced", "low"):
        pipe = embed.Pipeline(cpp_library, cpp_bundles("flux-tiny"), memory=memory.encode())
        assert pipe.memory == memory
        for _ in range(2):  # the second finds text and modulation in the caches
            np.testing.assert_array_equal(pipe.generate(PROMPTS, **given).pixels, expected.pixels)
        pipe.close()
        assert pipe.memory == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"memory": b"tiny"},
            'options.memory must be "resident", "balanced" or "low", or NULL to choose by the free memory, got "tiny"',
        ),
        (
            {"memory": b"balanced", "low_memory": 1},
            'options.low_memory must be 0 with options.memory "balanced"; set only options.memory',
        ),
    ],
)
def test_wrong_memory_modes(cpp_library, cpp_bundles, options, said):
    with pytest.raises(embed.ArcFlowError) as error:
        embed.Pipeline(cpp_library, cpp_bundles("flux-tiny"), **options)
    assert (error.value.status, str(error.value)) == (REQUEST_ERROR, said)


def test_options_of_a_program_that_was_compiled_before_memory_modes(cpp_library, cpp_bundles):
    """Its struct ends before `memory`; bytes after it are not read."""
    options = embed.Options(low_memory=1, memory=b"tiny")
    options.struct_size = embed.Options.memory.offset
    handle = c_void_p()
    assert cpp_library.arcflow_open(str(cpp_bundles("flux-tiny")).encode(), byref(options), byref(handle)) == 0
    assert cpp_library.arcflow_memory(handle) == b"low"
    cpp_library.arcflow_close(handle)


@pytest.mark.slow
def test_low_memory_refuses_a_bundle_that_was_replaced(cpp_library, cpp_bundles, tmp_path):
    root = shutil.copytree(cpp_bundles("flux-tiny"), tmp_path / "bundle")
    lean, kept = (embed.Pipeline(cpp_library, root, low_memory=low) for low in (1, 0))
    lean.generate(["x"], height=32, width=32)
    edit_manifest(root, provenance__created="2026-01-02T00:00:00Z")
    with pytest.raises(embed.ArcFlowError) as error:
        lean.generate(["x"], height=32, width=32)
    assert str(error.value) == f"{root} was replaced or removed since it was opened; load it again"
    assert error.value.status == BUNDLE_ERROR
    kept.generate(["x"], height=32, width=32)
    for pipe in (lean, kept):
        pipe.close()


@pytest.mark.slow
def test_a_relative_path_outlives_a_change_of_directory(cpp_library, cpp_bundles, tmp_path, monkeypatch):
    root = cpp_bundles("flux-tiny")
    monkeypatch.chdir(root.parent)
    lean = embed.Pipeline(cpp_library, root.name, low_memory=1)
    monkeypatch.chdir(tmp_path)
    assert lean.generate(["x"], height=32, width=32).pixels is not None
    lean.close()


@pytest.mark.parametrize(
    ("name", "low_memory", "count"),
    [
        pytest.param("flux-tiny", 0, 200, marks=pytest.mark.slow),
        ("qwen-tiny", 0, 40),
        pytest.param("shapes", 1, 8, marks=pytest.mark.slow),
    ],
)
def test_eight_threads_give_what_one_gives(cpp_library, cpp_bundles, name, low_memory, count):
    pipe = embed.Pipeline(cpp_library, cpp_bundles(name), low_memory=low_memory)

    def generate(i: int):
        return pipe.generate([PROMPTS[i % 3]], seeds=[i % 20], height=(32, 64)[i % 2], width=32)

    alone = [generate(i) for i in range(min(count, 60))]
    with ThreadPoolExecutor(8) as pool:
        for i, images in enumerate(pool.map(generate, range(count))):
            np.testing.assert_array_equal(images.latents, alone[i % 60].latents)
            np.testing.assert_array_equal(images.pixels, alone[i % 60].pixels)
    pipe.close()


def test_closing_waits_for_calls_in_progress(cpp_library, cpp_bundles):
    pipe = embed.Pipeline(cpp_library, cpp_bundles("flux-tiny"))
    inside, leave, closed = threading.Event(), threading.Event(), threading.Event()

    def on_step(step, latents):
        inside.set()
        assert leave.wait(60)

    with ThreadPoolExecutor(2) as pool:
        images = pool.submit(pipe.generate, ["x"], height=32, width=32, on_step=on_step)
        assert inside.wait(60)
        closing = pool.submit(lambda: (pipe.close(), closed.set()))
        assert not closed.wait(0.3)
        with pytest.raises(embed.ArcFlowError, match=r"^pipeline was closed, or is not a pipeline; open it again") as e:
            pipe.generate(["x"], height=32, width=32)
        assert e.value.status == CLOSED
        leave.set()
        assert images.result(60).pixels.shape == (1, 32, 32, 3)
        closing.result(60)
    pipe.close()  # twice is allowed


def test_closing_while_eight_threads_generate(cpp_library, cpp_bundles):
    pipe = embed.Pipeline(cpp_library, cpp_bundles("flux-tiny"))
    started = threading.Barrier(9)

    def generate_many(seed: int) -> None:
        for _ in range(1000):
            pipe.generate(["x"], height=32, width=32, seeds=[seed])

    def generate_until_closed(seed: int) -> int:
        started.wait()
        with pytest.raises(embed.ArcFlowError) as e:
            generate_many(seed)
        return e.value.status

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(generate_until_closed, i) for i in range(8)]
        started.wait()
        pipe.close()
        assert [f.result(60) for f in found] == [CLOSED] * 8


def test_a_callback_that_stops_or_meddles(cpp_library, cpp_bundles):
    pipe = embed.Pipeline(cpp_library, cpp_bundles("flux-tiny"))
    size = {"height": 32, "width": 32}
    with pytest.raises(
        embed.ArcFlowError, match=r"^on_step stopped the call after step 0 by returning 7; return 0 to go on$"
    ) as e:
        pipe.generate(["x"], **size, on_step=lambda step, x: 7)
    assert e.value.status == REQUEST_ERROR
    met: list[embed.ArcFlowError] = []

    def generate_inside(step, latents):
        try:
            pipe.generate(["x"], **size)
        except embed.ArcFlowError as e:
            met.append(e)

    assert pipe.generate(["x"], **size, on_step=generate_inside).pixels is not None
    assert {str(e) for e in met} == {
        "arcflow_generate must not be called by on_step on the pipeline that called it; call it after on_step has "
        "returned, or on another pipeline"
    }
    assert pipe.generate(["x"], **size, on_step=lambda step, x: pipe.close()).pixels is not None
    with pytest.raises(embed.ArcFlowError) as e:
        pipe.generate(["x"], **size)
    assert e.value.status == CLOSED


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_reopening_keeps_no_machine_code(cpp_library, cpp_bundles):
    """Each ov::Core with the tokenizers' extension leaks machine code, so the library must not make new ones."""

    def executable_bytes() -> int:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        ranges = [line[0].split("-") for line in lines if line[1] == "rwxp"]
        return sum(int(end, 16) - int(start, 16) for start, end in ranges)

    def reopen() -> int:
        embed.Pipeline(cpp_library, cpp_bundles("flux-tiny")).close()
        return executable_bytes()

    first = reopen()
    assert [reopen() for _ in range(4)] == [first] * 4


def test_results_outlive_their_pipeline_and_are_freed_once(cpp_library, cpp_bundles):
    pipe = embed.Pipeline(cpp_library, cpp_bundles("flux-tiny"))
    request = embed.Request(struct_size=ctypes.sizeof(embed.Request), guidance_scale=-1, height=32, width=32)
    request.prompts, request.prompt_count = (c_char_p * 1)(b"x"), 1
    results = [c_void_p(), c_void_p()]
    for result in results:
        assert cpp_library.arcflow_generate(pipe.handle, byref(request), byref(result)) == 0
    pipe.close()
    first, second = results
    cpp_library.arcflow_result_free(first)
    cpp_library.arcflow_result_free(first)
    assert embed.Images(cpp_library, second).pixels.shape == (1, 32, 32, 3)
    tokens, count = c_int32(9), c_size_t(9)
    for stale in (first, pipe.handle, c_void_p(), c_void_p(0xDEADBEEF)):
        assert cpp_library.arcflow_result_batch(stale) == 0
        assert not cpp_library.arcflow_result_pixels(stale)
        assert not cpp_library.arcflow_result_latents(stale, byref(tokens), None)
        assert not cpp_library.arcflow_result_seeds(stale, byref(count))
        assert cpp_library.arcflow_result_warnings(stale) == b""
        assert (tokens.value, count.value) == (0, 0)
    cpp_library.arcflow_result_free(second)
    cpp_library.arcflow_result_free(None)


class SignalStack(ctypes.Structure):
    """`stack_t` of signal.h."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack():
    found = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.address, found.flags, found.size


def test_the_signal_stack_of_the_caller_stays(cpp_library, cpp_bundles):
    """A library that OpenVINO loads sets another, which is gone after closing: the next signal would be a crash."""
    before = signal_stack()
    pipe = embed.Pipeline(cpp_library, cpp_bundles("shapes"))
    assert signal_stack() == before
    pipe.generate(["a red circle"])
    pipe.close()
    assert signal_stack() == before
