"""Bundles with LoRA slots: images against those of merged exports, in any order, by many threads, and in FP8."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest

from arcflow_export.checkpoint.sources import Location
from arcflow_export.emulate.blocks import EmulatedBackend
from arcflow_export.emulate.emulate import load_graph, widened
from arcflow_runtime import Bundle, LoraError, Pipeline, RequestError, cli
from tests.conftest import export, golden_student
from tests.fp8 import calibrated, quantize
from tests.lora_slots import write_lora

ALL = {"lora_slots": ("*",), "lora_max_rank": 32}
NAMES = ("flux-tiny", "qwen-tiny")
#: The issue's bound, of the largest value of the latents. Slots and merged weights round differently: one rounding of a
#: product of 64 to 320 numbers for each linear, some 2^-24 * sqrt(320) = 1e-6 of it, through about 10 layers.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def slotted(bundles):
    return lambda name, **options: bundles(name, **(ALL | options))


@pytest.fixture(scope="module")
def files(slotted, tmp_path_factory):
    """A function (golden name, number) -> a LoRA of all slots of that student."""
    folder = tmp_path_factory.mktemp("loras")

    def get(name, seed=0, **more):
        path = folder / f"{name}-{seed}-{'-'.join(map(str, more.values()))}.safetensors"
        return path if path.exists() else write_lora(path, Bundle.open(slotted(name)).manifest.slots(), 4, seed, **more)

    return get


def open_pipe(root, loras=()):
    pipe = Pipeline.load(root, threads=1)
    for name, path in dict(loras).items():
        pipe.load_lora(path, name)
    return pipe


def draw(pipe, seed=3, prompt="a red circle", **arguments):
    defaults = {"height": 48, "width": 64, "output_type": "latents", "max_sequence_length": 16, "seed": seed}
    return pipe(prompt, **(defaults | arguments)).images


def error_of(call, kind):
    with pytest.raises(kind) as e:
        call()
    return str(e.value)


def largest_difference(some, others):
    """Relative to the largest value of `others`."""
    return np.abs(some - others).max() / np.abs(others).max()


@pytest.mark.parametrize("name", NAMES)
def test_slots_are_in_the_graphs_and_nothing_else_changes(name, bundles, slotted):
    plain, with_slots = Bundle.open(bundles(name)), Bundle.open(slotted(name))
    slots = with_slots.manifest.slots()
    assert set(slots) == (
        {"text_encoder", "conditioner", "backbone"} if name == "flux-tiny" else {"backbone", "modulation"}
    )
    assert not any(layer.startswith("proj_out_") for found in slots.values() for layer in found.layers)
    for part, spec in with_slots.manifest.parts.items():
        assert plain.manifest.files[spec.weights] == with_slots.manifest.files[spec.weights]
        graph = onnx.load(with_slots.path(spec.graph), load_external_data=False).graph
        shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
        own = {spec.name for spec in spec.inputs}
        expected = {}
        for layer, size in (spec.lora.layers if spec.lora else {}).items():
            rank = f"{layer}.lora_rank".replace(".", "_")
            expected[f"{layer}.lora_a"] = [size.in_features, rank, 8]
            expected[f"{layer}.lora_b"] = [rank, 8, size.out_features]
        assert {n: s for n, s in shapes.items() if n not in own} == expected
        weights = {n: s for n, s in shapes.items() if n in own}
        assert weights.keys() == own
        # Without their slots, the graphs are those of the plain bundle, node by node.
        some, others = (
            [(n.op_type, n.name, [v and v.name for v in n.inputs]) for n in load_graph(bundle, part).graph]
            for bundle in (plain, with_slots)
        )
        assert some == others


def test_a_bundle_without_slots_is_of_version_1_and_has_no_new_keys(bundles):
    data = json.loads((bundles("qwen-tiny") / "manifest.json").read_text())
    assert data["version"] == 1
    assert not any("lora" in part for part in data["parts"].values())
    assert set(data["modulation"]) == {"file", "num_inference_steps"}


def test_the_emulation_runs_parts_without_their_slots(slotted):
    """As `arcflow verify` and the drift gate open them."""
    bundle = widened(Bundle.open(slotted("flux-tiny")))
    with closing(EmulatedBackend().open(bundle, "conditioner")) as engine:
        found = engine.run(
            {
                "timesteps": np.array([1000, 500], np.float32),
                "guidance": np.array([3500], np.float32),
                "pooled_projections": np.zeros((1, 32), np.float32),
            }
        )
    assert found["modulation"].shape[:2] == (2, 1) and np.isfinite(found["modulation"]).all()


@pytest.mark.slow
def test_only_the_linears_that_match(bundles):
    attention = Bundle.open(bundles("flux-tiny", lora_slots=("*attn.*",))).manifest.slots()
    assert set(attention) == {"backbone", "text_encoder"}
    names = [name for slots in attention.values() for name in slots.layers]
    assert all(".attn." in name or ".self_attn." in name for name in names)
    assert "single_transformer_blocks.0.attn.to_v" in names and "transformer_blocks.1.attn.to_add_out" in names


def test_linears_whose_output_nobody_reads(slotted):
    unread = Bundle.open(slotted("qwen-tiny")).manifest.parts["backbone"].lora.unread
    last = max(int(n.split(".")[1]) for n in Bundle.open(slotted("qwen-tiny")).manifest.slots()["backbone"].layers
               if n.startswith("transformer_blocks."))  # fmt: skip
    block = f"transformer_blocks.{last}"
    assert unread == ("proj_out", f"{block}.attn.to_add_out", f"{block}.txt_mlp.net.0.proj", f"{block}.txt_mlp.net.2")
    assert Bundle.open(slotted("flux-tiny")).manifest.parts["backbone"].lora.unread == ("proj_out",)


@pytest.mark.parametrize("name", ["flux-tiny", pytest.param("qwen-tiny", marks=pytest.mark.slow)])
def test_the_image_is_that_of_the_merged_export(name, slotted, files, tmp_path):
    ink, soft = files(name, 1), files(name, 2)
    scales = {"ink": 0.8, "soft": 0.4}
    merged = golden_student(name, [(Location(str(ink)), 0.8), (Location(str(soft)), 0.4)])
    wanted = draw(open_pipe(export(merged, tmp_path / "merged")))
    pipe = open_pipe(slotted(name), {"ink": ink, "soft": soft})
    got = draw(pipe, loras=scales)
    assert largest_difference(got, wanted) <= CLOSE
    assert largest_difference(draw(pipe), wanted) > 100 * CLOSE, "the LoRAs change the image"
    if name == "flux-tiny":  # CLIP's states changed too; without them the image is another one
        assert largest_difference(draw(pipe, prompt="a blue square", loras=scales), wanted) > CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_what_ran_before(name, bundles, slotted, files):
    pipe = open_pipe(slotted(name), {"ink": files(name, 1), "soft": files(name, 2)})
    first, second, both = {"ink": 0.8}, {"soft": -0.5}, {"ink": 0.8, "soft": 0.4}
    a, b = draw(pipe, loras=first), draw(pipe, loras=second)
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(draw(pipe, loras=first), a)
    np.testing.assert_array_equal(draw(pipe, loras=dict(reversed(both.items()))), draw(pipe, loras=both))
    plain = draw(open_pipe(bundles(name)))
    for nothing in (None, {}, {"ink": 0, "soft": 0.0}):
        np.testing.assert_array_equal(draw(pipe, loras=nothing), plain)


@pytest.mark.slow
def test_eight_threads_with_eight_sets(slotted, files):
    """200 images: each is the one that the same request gives alone."""
    names = [f"lora{i}" for i in range(4)]
    pipe = open_pipe(slotted("flux-tiny"), {name: files("flux-tiny", i) for i, name in enumerate(names)})
    sets = [
        {},
        *({n: 0.5} for n in names),
        {names[0]: 0.5, names[1]: 0.5},
        {names[0]: -0.5},
        {names[2]: 1, names[3]: 1},
    ]
    prompts = ("a red circle", "two stars", "a blue square")
    requests = [(sets[i % 8], prompts[i % 3], i % 5) for i in range(200)]
    alone = {}
    fresh = open_pipe(slotted("flux-tiny"), {name: files("flux-tiny", i) for i, name in enumerate(names)})
    for i, (loras, prompt, seed) in enumerate(requests[:120]):  # 8, 3 and 5 have no common factor
        alone[i] = draw(fresh, seed, prompt, loras=loras)
        fresh.clear_cache()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda r: draw(pipe, r[2], r[1], loras=r[0]), requests))
    for i, image in enumerate(found):
        np.testing.assert_array_equal(image, alone[i % 120])


def test_text_states_are_kept_for_each_set_that_changes_them(slotted, files):
    name = "flux-tiny"
    pipe = open_pipe(slotted(name), {"whole": files(name, 1), "image": files(name, 2, only="transformer_blocks")})
    runs = []
    use_all = pipe._parts.use_all
    pipe._parts.use_all = lambda part: runs.append(part) or use_all(part)
    for loras in ({}, {"image": 1.0}, {"whole": 1.0}, {"whole": 1.0, "image": 0.5}, {}, {"whole": 0.5}):
        draw(pipe, loras=loras)
    # Without a LoRA of CLIP, with one at two scales: three times the two encoders.
    assert runs == ["text_encoder", "text_encoder_2"] * 3


def test_low_memory(slotted, files):
    name = "flux-tiny"
    kept = open_pipe(slotted(name), {"ink": files(name, 1)})
    with Pipeline.load(slotted(name), memory="low", threads=1) as pipe:
        pipe.load_lora(files(name, 1), "ink")
        np.testing.assert_array_equal(draw(pipe, loras={"ink": 0.8}), draw(kept, loras={"ink": 0.8}))


@pytest.mark.slow
def test_a_conditioner_that_is_kept_runs_in_place_of_the_table(slotted, files):
    table = open_pipe(slotted("qwen-tiny"), {"ink": files("qwen-tiny", 1)})
    root = slotted("qwen-tiny", keep_conditioner=True)
    manifest = Bundle.open(root).manifest
    assert set(manifest.slots()) == {"backbone", "conditioner"} and manifest.modulation.columns is None
    assert "time_text_embed.timestep_embedder.linear_1" in manifest.slots()["conditioner"].layers
    kept = open_pipe(root, {"ink": files("qwen-tiny", 1)})
    assert largest_difference(draw(kept, loras={"ink": 1}), draw(table, loras={"ink": 1})) <= CLOSE
    np.testing.assert_array_equal(draw(kept), draw(table))


def test_a_layer_that_was_baked_is_refused(slotted, tmp_path):
    conditioner = Bundle.open(slotted("qwen-tiny", keep_conditioner=True)).manifest.slots()
    path = write_lora(tmp_path / "time.safetensors", conditioner, only="timestep_embedder")
    text = error_of(lambda: open_pipe(slotted("qwen-tiny"), {"time": path}), LoraError)
    assert text == (
        "time changes time_text_embed.timestep_embedder.linear_1, time_text_embed.timestep_embedder.linear_2, which "
        "must have slots in this bundle; export with --lora-slots all, or with patterns that match them"
    )


def test_wrong_arguments(slotted, files):
    pipe = open_pipe(slotted("flux-tiny"))
    assert pipe.load_lora(files("flux-tiny", 1)) == "flux-tiny-1-"
    pipe.unload_lora("flux-tiny-1-")
    assert pipe.loras == ()
    assert error_of(lambda: draw(pipe, loras=["ink"]), RequestError) == (
        """loras must be names with scales such as {"ink": 0.8}, got ['ink']"""
    )
    assert error_of(lambda: draw(pipe, loras={"ink": "1"}), RequestError) == (
        "loras: the scale of 'ink' must be a number, got '1'"
    )
    assert error_of(lambda: draw(pipe, loras={"ink": float("nan")}), RequestError) == (
        "loras: the scale of 'ink' must be at most 1e+06 in size, got nan"
    )
    assert error_of(lambda: draw(pipe, loras={"ink": 10**400}), RequestError) == (
        f"loras: the scale of 'ink' must be at most 1e+06 in size, got 1{'0' * 39}"
    )
    assert error_of(lambda: draw(pipe, loras={"ink": 1}), RequestError) == (
        "loras must be names of loaded LoRAs (none), got 'ink'; call load_lora first"
    )
    assert error_of(lambda: pipe.unload_lora("ink"), RequestError) == (
        "loras must be names of loaded LoRAs (none), got 'ink'; call load_lora first"
    )
    assert error_of(lambda: draw(pipe, attention_kwargs={"scale": 1}), RequestError) == (
        "attention_kwargs is not supported: the scales of LoRAs are given as loras; leave it out"
    )


@pytest.mark.slow
def test_fp8_keeps_the_slots_and_loses_less_than_merging_first(bundles, slotted, files, tmp_path):
    """The distance to the float32 merged export, of FP8 with slots and of the merged export in FP8.

    Both have the ranges of the student without a LoRA. FP8's errors are relative to the weights, and merging makes the
    weights larger; the LoRA is strong, so that this shows beside the luck of single roundings. (Over six such LoRAs the
    root mean square is 0.0198 and 0.0239, and the slots are closer with each of them.)
    """
    name = "flux-tiny"
    ink = files(name, 1)
    merged = export(golden_student(name, [(Location(str(ink)), 1.5)]), tmp_path / "merged")
    exact = draw(open_pipe(merged), num_images_per_prompt=8)
    slots = quantize(slotted(name), tmp_path / "slots8", calibrated(bundles(name)))
    pipe = open_pipe(slots.root, {"ink": ink})
    assert slots.manifest.slots() == Bundle.open(slotted(name)).manifest.slots()
    plain = quantize(bundles(name), tmp_path / "plain8", calibrated(bundles(name)))
    np.testing.assert_array_equal(draw(pipe), draw(open_pipe(plain.root)))
    first = quantize(
        merged, tmp_path / "merged8", dataclasses.replace(calibrated(bundles(name)), loras=loras_of(merged))
    )
    drift = [
        np.linalg.norm(draw(p, num_images_per_prompt=8, **more) - exact) / np.linalg.norm(exact)
        for p, more in ((pipe, {"loras": {"ink": 1.5}}), (open_pipe(first.root), {}))
    ]
    assert drift[0] <= drift[1]


def loras_of(root):
    return Bundle.open(root).manifest.provenance.loras


def test_commands(slotted, files, tmp_path, capsys):
    root, ink = slotted("flux-tiny"), files("flux-tiny", 1)
    converted = tmp_path / "ink.safetensors"
    assert cli.main(["lora", "convert", str(ink), "--bundle", str(root), "--out", str(converted)]) == 0
    said = capsys.readouterr().out
    layers = {part: len(slots.layers) for part, slots in Bundle.open(root).manifest.slots().items()}
    assert said == (
        f"wrote {converted}: {layers['backbone']} linears of backbone, {layers['conditioner']} linears of conditioner, "
        f"{layers['text_encoder']} linears of text_encoder, {converted.stat().st_size:,} bytes\n"
    )
    images = []
    for i, lora in enumerate((f"{ink}:0.8", f"{converted}:0.8")):
        out = tmp_path / f"{i}.png"
        command = ["generate", str(root), "a star", "--height", "64", "--width", "64", "--seed", "1", "--out", str(out)]
        assert cli.main([*command, "--lora", lora]) == 0
        images.append(read_png(out))
    np.testing.assert_array_equal(images[0][0], images[1][0])
    assert images[1][1] == "ink.safetensors:0.8"
    assert cli.main([*command, "--lora", f"{ink}:x"]) == 2
    assert f"--lora must be PATH or PATH:SCALE with a number for SCALE, got '{ink}:x'" in capsys.readouterr().err


def read_png(path):
    from PIL import Image

    image = Image.open(path)
    return np.asarray(image), image.text["loras"]


def test_patterns_that_match_nothing(tmp_path, capsys):
    golden = Path(__file__).parent / "golden" / "qwen-tiny"
    command = [
        "export",
        "--base",
        golden / "base",
        "--adapter",
        golden / "adapter",
        "--out",
        tmp_path / "b",
        "--dry-run",
    ]

    def fails(*options):
        assert cli.main([*map(str, command), *options]) == 2
        return capsys.readouterr().err.removeprefix("arcflow export: error: ").rstrip()

    assert fails("--lora-slots", "*to_qq") == (
        "--lora-slots: '*to_qq' matches no linear of conditioner, backbone; names are the weights' keys without "
        "'.weight'"
    )
    assert fails("--lora-slots", "time_text_embed*") == (
        "--lora-slots: the patterns match only the timestep's embedding, which is baked into the modulation; export "
        "with --keep-conditioner"
    )
    assert fails("--lora-slots", "proj_out_means").startswith("--lora-slots: 'proj_out_means' matches no linear of ")
    assert fails("--lora-slots", "all", "--lora-max-rank", "12") == (
        "--lora-max-rank must be a multiple of 8 up to 1024, got 12"
    )
    assert cli.main([*map(str, command), "--lora-slots", "attn"]) == 0
    assert "  23 linears of backbone take LoRAs up to rank 128\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
