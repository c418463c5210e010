import dataclasses
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_bundle import MODULATION, FakeBackend, edit_manifest, list_files, make_bundle
from safetensors.numpy import save_file

from arcflow_runtime import BundleError, EngineError, Pipeline, RequestError
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.modes import MODES
from arcflow_runtime.maths.noise import draw_latents


@pytest.fixture(scope="module")
def flux_root(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("pipeline") / "flux")


@pytest.fixture(scope="module")
def qwen_root(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("pipeline") / "qwen", "qwen-image", baked=(2, 4))


@pytest.fixture
def flux(flux_root):
    return open_fake(flux_root)


@pytest.fixture
def qwen(qwen_root):
    return open_fake(qwen_root)


def open_fake(root, memory=None, poison=1.0):
    pipe = Pipeline(Bundle.open(root), FakeBackend(poison), memory)
    pipe.backend = pipe._parts._backend
    return pipe


def latents(pipe, prompt, **arguments):
    return pipe(prompt, **({"height": 32, "width": 48, "output_type": "latents"} | arguments)).images


def test_output_types(flux):
    pil = flux("x", height=32, width=48, seed=1)
    assert [i.size for i in pil.images] == [(48, 32)]
    pixels = flux("x", height=32, width=48, seed=1, output_type="numpy").images
    assert pixels.shape == (1, 32, 48, 3)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(pil.images[0]), np.rint(pixels[0] * 255).astype(np.uint8))
    packed = latents(flux, "x", seed=1)
    assert packed.shape == (1, 6, 64)
    assert packed.dtype == np.float32


def test_defaults(flux):
    output = flux("x")
    assert output.images[0].size == (128, 256)  # 1024 clipped to the bundle's ranges
    assert flux.backend.inputs["conditioner"]["guidance"].tolist() == [3500]
    assert [r[0] for r in flux.backend.runs].count("backbone") == 2
    again = flux("x", seed=output.seed)
    np.testing.assert_array_equal(np.asarray(output.images[0]), np.asarray(again.images[0]))
    assert set(output.timings_ms) == {
        *("tokenize", "encode", "condition", "noise", "rotary", "backbone", "update", "decode", "total")
    }


def test_seeds(flux):
    both = latents(flux, "x", seed=3, num_images_per_prompt=2)
    assert not np.array_equal(both[0], both[1])
    each = latents(flux, "x", seed=[3, 4], num_images_per_prompt=2)
    np.testing.assert_array_equal(each[:1], latents(flux, "x", seed=3))
    np.testing.assert_array_equal(each[1:], latents(flux, "x", seed=4))


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_order_and_independence_of_a_list(family, request):
    pipe = request.getfixturevalue(family)
    prompts = ["a", "a much longer prompt"]
    batch = latents(pipe, prompts, seed=[1, 2, 3, 4], num_images_per_prompt=2)
    for i, (prompt, seed) in enumerate([(prompts[0], 1), (prompts[0], 2), (prompts[1], 3), (prompts[1], 4)]):
        np.testing.assert_array_equal(batch[i : i + 1], latents(pipe, prompt, seed=seed))


def test_qwen_groups_by_length_and_draws_noise_for_the_whole_batch(qwen):
    seen = []
    latents(qwen, ["aa", "bbbb", "cc"], seed=5, callback_on_step_end=lambda i, x: seen.append((i, x)))
    shapes = [s for p, s in qwen.backend.runs if p == "backbone"]
    assert [s["latents"][0] for s in shapes] == [2, 1, 2, 1]
    assert shapes[0]["encoder_hidden_states"][1] == shapes[1]["encoder_hidden_states"][1] - 2
    assert [i for i, _ in seen] == [0, 1]
    assert seen[0][1].shape == (3, 6, 64)
    assert not seen[0][1].flags.writeable
    noise = draw_latents(5, 3, 16, 4, 6, 2)
    alone = [latents(qwen, "bbbb", seed=s) for s in (5, 6)]
    assert not np.array_equal(noise[1], draw_latents(5, 1, 16, 4, 6, 2)[0])
    assert all(a.shape == (1, 6, 64) for a in alone)


def test_baked_modulation(qwen):
    latents(qwen, "x", num_inference_steps=4)
    assert "conditioner" not in qwen.backend.opens
    modulation = qwen.backend.inputs["backbone"]["modulation"]
    np.testing.assert_array_equal(modulation, np.full((1, MODULATION), 4))
    with pytest.raises(
        RequestError,
        match=r"^num_inference_steps must be one of those baked into this bundle, \[2, 4\], got 3; "
        "export with --steps 3, or with --keep-conditioner for any step count$",
    ):
        qwen("x", num_inference_steps=3)


def test_qwen_with_a_conditioner_takes_any_step_count(tmp_path):
    pipe = open_fake(make_bundle(tmp_path / "b", "qwen-image"))
    latents(pipe, ["a", "bb"], num_inference_steps=3)
    assert pipe.backend.inputs["conditioner"].keys() == {"timesteps"}
    assert [s["modulation"] for p, s in pipe.backend.runs if p == "backbone"] == [(1, MODULATION)] * 6


def test_conditioner_runs_once_for_distinct_prompts(flux):
    latents(flux, ["a", "b", "a"], num_inference_steps=3)
    runs = [s for p, s in flux.backend.runs if p == "conditioner"]
    assert [(s["timesteps"], s["pooled_projections"], s["guidance"]) for s in runs] == [((3,), (2, 6), (2,))]


def test_text_is_cached_until_cleared(flux):
    def count():
        return [p for p, _ in flux.backend.runs].count("text_encoder_2")

    first = latents(flux, "a", seed=1)
    np.testing.assert_array_equal(first, latents(flux, "a", seed=1))
    assert count() == 1
    latents(flux, "a", max_sequence_length=8)
    assert count() == 2
    tokens = flux.tokenizer.tokenize("a", 8)
    assert flux.tokenizer.tokenize("a", 8) is tokens
    flux.clear_cache()
    latents(flux, "a")
    assert count() == 3
    assert flux.tokenizer.tokenize("a", 8) is not tokens


def test_a_cached_prompt_is_not_tokenized_again_and_still_warns(flux, monkeypatch):
    prompt = "red " * 100
    (warning, *_) = first = flux(prompt, height=16, width=16).warnings
    assert "was cut for CLIP" in warning
    monkeypatch.setattr(flux, "tokenizer", None)
    assert flux(prompt, height=16, width=16).warnings == first


def test_one_step_is_allowed_and_says_it_is_blurry(flux):
    output = flux("x", height=16, width=16, num_inference_steps=1)
    assert output.warnings == ("num_inference_steps 1 gives a blurry image; use 2 or more",)


def test_low_memory_has_one_part_open_at_a_time(flux_root, flux):
    lean = open_fake(flux_root, memory="low")
    assert lean.backend.opens == []
    np.testing.assert_array_equal(latents(lean, ["a", "b"], seed=1), latents(flux, ["a", "b"], seed=1))
    assert lean.backend.opens == ["text_encoder", "text_encoder_2", "conditioner", "backbone"]
    assert lean.backend.most_open == 1
    assert lean.backend.opened == set()
    lean("a", height=16, width=16)
    assert lean.backend.opens[4:] == ["conditioner", "backbone", "vae_decoder"]  # the texts were cached
    latents(lean, ["a", "b"], seed=2)
    assert lean.backend.opens[7:] == ["backbone"]  # and so was the modulation of these two texts


def test_balanced_brings_only_what_a_new_prompt_needs(flux_root, flux):
    pipe = open_fake(flux_root, "balanced")
    kept = ["backbone", "vae_decoder"]
    assert pipe.backend.opens == kept
    new = ["text_encoder", "text_encoder_2", "conditioner"]
    for prompt, guidance, opened in (
        ("a", 3.5, new),
        ("b", 3.5, new),
        ("a", 3.5, []),
        ("a", 7.0, ["conditioner"]),
        ("a", 3.5, []),
    ):
        before = len(pipe.backend.opens)
        found = latents(pipe, prompt, seed=1, guidance_scale=guidance)
        np.testing.assert_array_equal(found, latents(flux, prompt, seed=1, guidance_scale=guidance))
        assert pipe.backend.opens[before:] == opened
        assert pipe.backend.opened == set(kept)
    assert pipe.backend.most_open == 3
    pipe.clear_cache()
    latents(pipe, "a")
    assert pipe.backend.opens[-3:] == new


def test_memory_must_be_a_mode(flux_root):
    assert [open_fake(flux_root, memory).memory for memory in MODES] == list(MODES)
    for wrong in (True, "none"):
        with pytest.raises(RequestError) as error:
            Pipeline.load(flux_root, memory=wrong)
        assert str(error.value) == (
            f"memory must be one of resident, balanced, low, or None to choose by the free memory, got {wrong!r}"
        )


@pytest.mark.parametrize(("given", "mode"), [(True, "low"), (False, "resident")])
def test_the_former_option_names_the_new_one(flux_root, given, mode):
    with pytest.raises(RequestError) as error:
        Pipeline.load(flux_root, low_memory=given)
    assert str(error.value) == f"low_memory is now memory; give memory='{mode}' instead"


def test_threads(flux_root):
    for memory in MODES:
        pipe = open_fake(flux_root, memory)
        barrier = threading.Barrier(4)

        def draw(seed, pipe=pipe, barrier=barrier):
            barrier.wait()
            return latents(pipe, f"prompt {seed % 2}", seed=seed)

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(draw, range(4)))
        for seed, x in enumerate(found):
            np.testing.assert_array_equal(x, latents(pipe, f"prompt {seed % 2}", seed=seed))


def test_close(flux_root):
    for memory in MODES:
        with open_fake(flux_root, memory) as pipe:
            pipe("x", height=16, width=16)
        pipe.close()
        assert pipe.backend.opened == set()
        with pytest.raises(EngineError, match=r"^this pipeline is closed; load it again with Pipeline\.load$"):
            pipe("x", height=16, width=16)


@pytest.mark.parametrize("memory", MODES)
def test_a_callback_cannot_call_its_own_pipeline(flux_root, memory):
    """In the mode "low", it would wait for the backbone that waits for it."""
    pipe, other = open_fake(flux_root, memory), open_fake(flux_root)
    sentence = (
        "{} must not be called by a callback on the pipeline that called it; "
        "call it after the pipeline has returned, or use another pipeline"
    )
    said = []

    def callback(step, x):
        for call in (lambda: latents(pipe, "x"), pipe.close):
            with pytest.raises(RequestError) as error:
                call()
            said.append(str(error.value))
        latents(other, "x")

    def run():
        latents(pipe, "x", num_inference_steps=1, callback_on_step_end=callback)
        latents(pipe, "x")
        pipe.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "a call within a call waits for ever"
    assert said == [sentence.format("a pipeline"), sentence.format("close()")]


def test_a_callback_that_fails_leaves_the_pipeline_usable(flux_root):
    pipe = open_fake(flux_root, memory="low")
    with pytest.raises(ZeroDivisionError):
        latents(pipe, "x", callback_on_step_end=lambda i, x: 1 / 0)
    assert latents(pipe, "x").shape == (1, 6, 64)
    pipe.close()


def test_a_bundle_that_is_replaced_while_it_is_open(tmp_path):
    """Parts of the new bundle would run with modulation and tokens of the old one."""
    root = make_bundle(tmp_path / "bundle")
    lean, kept = open_fake(root, memory="low"), open_fake(root)
    drawn = latents(lean, "x", seed=1)
    shutil.rmtree(root)
    edit_manifest(make_bundle(root), provenance__created="2026-01-02T00:00:00Z")
    opened = len(lean.backend.opens)
    with pytest.raises(BundleError) as error:
        latents(lean, "x", seed=1)
    assert len(lean.backend.opens) == opened, "the new bundle's parts are not read"
    assert str(error.value) == f"{root} was replaced or removed since it was opened; load it again"
    np.testing.assert_array_equal(latents(kept, "x", seed=1), drawn)


def test_nothing_stays_open_if_the_denoiser_cannot_be_opened(flux_root):
    class Backend(FakeBackend):
        def open_denoiser(self, bundle, parts):
            assert self.opened
            raise EngineError("no memory for the denoiser")

    backend = Backend()
    with pytest.raises(EngineError, match=r"^no memory for the denoiser$"):
        Pipeline(Bundle.open(flux_root), backend)
    assert backend.opens and not backend.opened


@pytest.mark.parametrize(
    ("table", "got"),
    [
        (np.zeros((2, MODULATION + 1), np.float32), rf"float32\[2, {MODULATION + 1}\]"),
        (np.zeros((3, MODULATION), np.float32), rf"float32\[3, {MODULATION}\]"),
        (np.zeros((2, MODULATION), np.float16), rf"float16\[2, {MODULATION}\]"),
    ],
)
def test_a_modulation_table_that_does_not_fit_the_backbone(tmp_path, table, got):
    root = make_bundle(tmp_path / "bundle", "qwen-image", baked=(2,))
    path = root / "modulation.safetensors"
    save_file({"num_inference_steps_2": table}, path)
    edit_manifest(root, **{"files__modulation.safetensors": dataclasses.asdict(list_files(root)[path.name])})
    with pytest.raises(
        BundleError,
        match=rf"num_inference_steps_2 must be float32 of shape \[2, {MODULATION}\], for the backbone's input "
        rf"modulation, got {got}; export the bundle again$",
    ):
        open_fake(root)


def test_a_bundle_that_is_replaced_while_it_is_loaded(tmp_path):
    root = make_bundle(tmp_path / "bundle")

    class Slow(FakeBackend):
        """Another bundle takes the place while the decoder is read."""

        def open(self, bundle, part):
            if part == "vae_decoder":
                edit_manifest(root, provenance__command=f"export {len(self.runs)}")
            return super().open(bundle, part)

    backend = Slow()
    with pytest.raises(BundleError, match=r" was replaced or removed since it was opened; load it again$"):
        Pipeline(Bundle.open(root), backend)
    assert backend.opened == set()
    lean = Pipeline(Bundle.open(root), backend, memory="low")
    with pytest.raises(BundleError, match=r" was replaced or removed since it was opened; load it again$"):
        lean("x", height=16, width=16)
    assert "backbone" in [part for part, _ in backend.runs]
    assert "vae_decoder" not in [part for part, _ in backend.runs]
    assert backend.opened == set()


def test_a_relative_path_outlives_a_change_of_directory(tmp_path, monkeypatch):
    """ONNX Runtime is given the path of each part when it is opened."""
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "bundle")
    opened = []

    class Paths(FakeBackend):
        def open(self, bundle, part):
            opened.append(bundle.path(bundle.manifest.parts[part].graph).is_file())
            return super().open(bundle, part)

    pipe = Pipeline(Bundle.open("bundle"), Paths(), memory="low")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    latents(pipe, "x")
    assert opened == [True] * 4


def test_a_part_that_cannot_be_opened_closes_the_others(flux_root):
    class Failing(FakeBackend):
        def open(self, bundle, part):
            if part == "vae_decoder":
                raise EngineError("vae_decoder: no")
            return super().open(bundle, part)

    backend = Failing()
    with pytest.raises(EngineError, match=r"^vae_decoder: no$"):
        Pipeline(Bundle.open(flux_root), backend)
    assert backend.opened == set()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_no_black_pictures(flux_root, poison):
    pipe = open_fake(flux_root, poison=poison)
    with (
        pytest.raises(
            EngineError,
            match=r"^backbone: latents of images \[0, 1\] must be finite, got NaN or Inf; "
            r"check the checkpoint and adapter with `arcflow verify`$",
        ),
        np.errstate(all="ignore"),
    ):
        pipe("x", height=16, width=16, num_images_per_prompt=2)
    assert "vae_decoder" not in [p for p, _ in pipe.backend.runs]


def test_float16_advice_and_casts(tmp_path):
    pipe = open_fake(make_bundle(tmp_path / "b", precision="float16"))
    assert latents(pipe, "x").dtype == np.float32
    seen = {n: x.dtype for n, x in pipe.backend.inputs["backbone"].items()}
    half, single = np.dtype("f2"), np.dtype("f4")
    assert seen == {
        "latents": half,
        "encoder_hidden_states": half,
        "modulation": half,
        "image_rotary": single,
        "text_rotary": single,
    }
    pipe.backend.poison = np.float32("nan")
    with pytest.raises(
        EngineError, match=r"float16 overflows in these models: export with --dtype bfloat16 or float32, or with"
    ):
        latents(pipe, "x")


def test_an_empty_prompt_is_allowed(flux, qwen):
    for pipe in (flux, qwen):
        assert len(pipe("", height=16, width=16).images) == 1


def test_unknown_backend(flux_root):
    with pytest.raises(
        EngineError, match=r"^backend must be one of \['onnxruntime', .*'tensorrt-rtx', 'auto'\], got 'tensorflow'$"
    ):
        Pipeline.load(flux_root, backend="tensorflow")


def test_a_black_picture_of_a_float16_decoder_is_refused(tmp_path, monkeypatch):
    pipe = open_fake(make_bundle(tmp_path / "b", precision="float16"))
    black = {"images": np.zeros((1, 16, 16, 3), np.uint8)}
    monkeypatch.setattr("fake_bundle.FakeEngine.vae_decoder", lambda self, inputs: black)
    with pytest.raises(
        EngineError,
        match=r"^vae_decoder: images \[0\] must have more than one colour; "
        r"float16 overflows in some decoders, export with --precision vae_decoder=float32$",
    ):
        pipe("x", height=16, width=16)


def test_load_checks_its_arguments(flux_root):
    with pytest.raises(RequestError, match=r"^check must be one of \['fast', 'full'\], got 'none'$"):
        Pipeline.load(flux_root, check="none")


def test_output_is_frozen(flux):
    output = flux("x", height=16, width=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.seed = 3


def test_the_runtime_imports_no_torch():
    code = (
        "import sys, arcflow_runtime, arcflow_runtime.cli\n"
        "assert 'numpy' not in sys.modules\n"
        "from arcflow_runtime import Pipeline\n"
        "import arcflow_runtime.engines.onnxruntime\n"
        "import arcflow_runtime.build.plan, arcflow_runtime.engines.store\n"
        "bad = {'torch', 'diffusers', 'transformers', 'onnx', 'scipy'} & sys.modules.keys()\n"
        "assert not bad, bad"
    )
    path = str(Path(__file__).parent.parent / "runtime")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})


def test_unknown_attribute():
    import arcflow_runtime

    with pytest.raises(AttributeError, match=r"^module 'arcflow_runtime' has no attribute 'Pipe'$"):
        arcflow_runtime.Pipe  # noqa: B018
