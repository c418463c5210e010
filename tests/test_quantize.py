"""Quantised bundles: what is in the files, what the graphs compute, and every way that it can be refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from arcflow_export.errors import CalibrationError, QuantizeError
from arcflow_export.export.write import initializer_name
from arcflow_export.formats.policy import load_policy
from arcflow_export.models.layers import MatMul, parameters
from arcflow_export.quantize import quantize as quantize_module
from arcflow_export.quantize.quantize import plan_quantization, quantize_bundle
from arcflow_runtime import Bundle, Pipeline, cli
from arcflow_runtime.errors import BundleError
from tests.conftest import golden_student
from tests.fake_bundle import edit_manifest
from tests.fp8 import calibrated, feeds, linears, make_scales, quantize, run_graph, write_policy

OPTIONS = {"steps": (2, 4)}
UNTOUCHED = ["x_embedder", "context_embedder", "proj_out_means", "proj_out_logweights", "proj_out_loggamma"]
#: name -> golden student, export options, policy, parts that are quantised.
CASES = {
    "flux-float32": ("flux-tiny", {"opset": 23, **OPTIONS}, "flux-t5", ("backbone", "text_encoder_2")),
    "flux-float32-opset20": ("flux-tiny", {"opset": 20, **OPTIONS}, "flux", ("backbone",)),
    "flux-bfloat16": ("flux-tiny", {"dtype": "bfloat16"}, "flux-t5", ("backbone", "text_encoder_2")),
    "flux-float16": ("flux-tiny", {"dtype": "float16"}, "flux", ("backbone",)),
    "qwen-float32": ("qwen-tiny", {"opset": 23, **OPTIONS}, "qwen-image", ("backbone",)),
}
SLOW = ("flux-float32-opset20", "flux-float16")


@pytest.fixture(scope="module")
def made(bundles, command_run, tmp_path_factory):
    """A function case -> (the bundle, the quantised one, its scales), made on first use."""
    known = {}

    def get(case):
        if case not in known:
            name, options, policy, parts = CASES[case]
            root = command_run.bundle if case == "flux-bfloat16" else bundles(name, **options)
            scales = calibrated(root, parts)
            known[case] = (
                Bundle.open(root),
                quantize(root, tmp_path_factory.mktemp("fp8") / "b", scales, policy),
                scales,
            )
        return known[case]

    return get


@pytest.fixture(params=[pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def case(request, made):
    return made(request.param)


def weights(bundle, part):
    return load_file(bundle.path(bundle.manifest.parts[part].weights))


def chosen(bundle, part="backbone"):
    return bundle.manifest.parts[part].quantization.layers


def graph(bundle, part="backbone"):
    return onnx.load(bundle.path(bundle.manifest.parts[part].graph), load_external_data=False)


def quantized_parts(bundle):
    return [name for name, part in bundle.manifest.parts.items() if part.quantization is not None]


def test_the_manifest_says_what_is_quantised(case):
    before, after, scales = case
    for name in quantized_parts(after):
        part, old = after.manifest.parts[name], before.manifest.parts[name]
        assert part.quantization.scales == scales.digest
        assert dataclasses.replace(part, quantization=None) == old
    rest = [n for n in linears(before, "backbone") if n not in chosen(after)]
    assert sorted(rest) == sorted(
        UNTOUCHED if before.manifest.family == "flux" else ["img_in", "txt_in", *UNTOUCHED[2:]]
    )
    assert after.manifest.provenance.command == f"{before.manifest.provenance.command} && test"
    assert Bundle.open(after.root, "full").manifest == after.manifest


def test_weights_are_fp8_within_half_a_unit_and_the_rest_is_untouched(case):
    before, after, _ = case
    for part in quantized_parts(after):
        old, new = weights(before, part), weights(after, part)
        layers = set(chosen(after, part))
        for key, value in old.items():
            layer = key.removesuffix(".weight")
            if layer not in layers or not key.endswith(".weight"):
                assert new[key].dtype == value.dtype and torch.equal(new[key], value), key
                continue
            scale = new[f"{layer}.weight_scale"].double()
            assert new[key].dtype == torch.float8_e4m3fn and scale.shape == value.shape[1:]
            # Rounded up to the next number of its dtype, which has 2^-7 of its size as its coarsest step.
            exact = value.double().abs().amax(0) / 448
            assert (scale >= exact).all() and (scale <= exact * (1 + 2**-7)).all()
            ratio = value.double() / scale
            half = torch.exp2(torch.floor(torch.log2(ratio.abs().clamp(min=2**-6))) - 4)
            # 2^-20: the ratio is rounded to float32 before it is rounded to E4M3.
            assert ((new[key].double() - ratio).abs() <= half * (1 + 2**-20)).all(), key
        scales = {f"{n}.{kind}_scale" for n in layers for kind in ("weight", "input")}
        assert new.keys() == old.keys() | scales


def test_files_of_other_parts_are_copies(case):
    before, after, _ = case
    changed = {
        f for n in quantized_parts(after) for f in (after.manifest.parts[n].graph, after.manifest.parts[n].weights)
    }
    for name in after.manifest.files:
        assert after.path(name).stat().st_nlink == 1  # onnx refuses hard links
        assert (after.manifest.files[name] == before.manifest.files[name]) == (name not in changed)
    for name in quantized_parts(after):
        spec = after.manifest.parts[name]
        old, new = (b.manifest.files[spec.weights].bytes for b in (before, after))
        found = linears(before, name)
        saved = sum(found[n].parameters for n in chosen(after, name))
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[spec.precision]
        extra = 200 * 2 * len(chosen(after, name)) + 2 * 4096  # headers of the scales, padding
        assert old - saved * (size - 1) <= new <= old - saved * (size - 1) + extra + saved // 8


def test_q_and_dq_are_where_the_policy_says_and_nowhere_else(case):
    before, after, _ = case
    for part in quantized_parts(after):
        model = graph(after, part)
        onnx.checker.check_model(str(after.path(after.manifest.parts[part].graph)), full_check=True)
        producer = {o: n for n in model.graph.node for o in n.output}
        layers = set(chosen(after, part))
        pairs = set()
        for node in model.graph.node:
            sources = [producer.get(i) for i in node.input]
            kinds = ["" if s is None else s.op_type for s in sources]
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            if node.name in layers:
                assert node.op_type == "MatMul" and kinds == ["DequantizeLinear"] * 2
                assert producer[sources[0].input[0]].op_type == "QuantizeLinear"
                assert sources[1].input[0] == f"{node.name}.weight"
                assert sources[0].input[1] == producer[sources[0].input[0]].input[1], "Q and DQ have one scale"
                pairs.add(sources[0].name)
            else:
                assert "DequantizeLinear" not in kinds and "QuantizeLinear" not in kinds, node.name
        count = [n.op_type for n in model.graph.node]
        assert count.count("QuantizeLinear") == len(pairs) < len(layers)
        assert count.count("DequantizeLinear") == len(pairs) + len(layers)
    assert not [n for p in before.manifest.parts for n in graph(before, p).graph.node if "Quantize" in n.op_type]


def fake_quantized(values: torch.Tensor, scale: torch.Tensor, quotient: torch.dtype = torch.float32) -> torch.Tensor:
    """Independent of the exporter: torch's own cast between float32 and E4M3; the division is rounded to `quotient`."""
    scale = scale.float()
    ratio = (values.float() / scale).to(quotient).float()
    return ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def test_every_quantised_linear_computes_what_torch_computes(case):
    """From the graph's own input to each linear, so that no rounding difference travels from one to the next."""
    before, after, scales = case
    for part in quantized_parts(after):
        found = {n: linear for n, linear in linears(before, part).items() if n in chosen(after, part)}
        old = weights(before, part)
        names = [n for linear in found.values() for n in (linear.input.name, linear.node.outputs[0].name)]
        values = run_graph(after, part, feeds(after, part), names)
        precision = after.manifest.parts[part].precision
        stored = weights(after, part)
        for name, linear in found.items():
            x = torch.from_numpy(values[linear.input.name]).to(getattr(torch, precision))
            group = [n for n, other in found.items() if other.input.name == linear.input.name]
            amax = max(scales.amax(part, n) for n in group)
            scale = stored[f"{name}.input_scale"]
            assert amax / 448 <= scale.item() <= amax / 448 * (1 + 2**-7)
            # ONNX Runtime divides in the dtype of the activation.
            a = fake_quantized(x, scale, torch.float16 if precision == "float16" else torch.float32)
            b = fake_quantized(old[f"{name}.weight"], stored[f"{name}.weight_scale"])
            got = torch.from_numpy(values[linear.node.outputs[0].name]).double()
            size = a.double().abs() @ b.double().abs()
            # A float32 sum of K products, in any order, is off by at most K + 2 roundings; in float16 each dequantised
            # number, and the result, are rounded to 11 bits as well.
            rounding = (linear.in_features + 2) * 2.0**-24
            if precision == "float16":
                rounding += 4 * 2.0**-11
            assert ((got - a.double() @ b.double()).abs() <= rounding * size + 1e-30).all(), name


def test_the_whole_backbone_is_torch_s_module_with_fake_quantised_linears(made):
    """Hooks that round inputs and weights, on the module that was exported.

    The two agree to float32 rounding until such a difference tips a number to another code of E4M3. That is rare: about
    one in 10^5 of the numbers rounded, each as large as any other's rounding, so together they are below a tenth of
    what rounding all of them does.
    """
    before, after, _ = made("flux-float32")
    part = next(p for p in golden_student("flux-tiny").parts("float32") if p.name == "backbone")
    stored, scales = weights(before, "backbone"), weights(after, "backbone")
    named = {p.name: initializer_name(p) for p in parameters(part)}
    module = part.module.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.copy_(stored[named[name]])
        layers = set(chosen(after))
        hooked = 0
        for name, child in module.named_modules():
            key = named.get(f"{name}.weight", "").removesuffix(".weight")
            if isinstance(child, MatMul) and key in layers:
                child.weight.copy_(fake_quantized(child.weight, scales[f"{key}.weight_scale"]))
                scale = scales[f"{key}.input_scale"]
                child.register_forward_pre_hook(lambda _, x, scale=scale: (fake_quantized(x[0], scale),))
                hooked += 1
        assert hooked == len(layers)
        inputs = feeds(after, "backbone", seed=1)
        expected = module(*(torch.tensor(inputs[s.name]) for s in part.inputs))
    got, exact = run_graph(after, "backbone", inputs), run_graph(before, "backbone", inputs)
    for spec, want in zip(part.outputs, expected, strict=True):
        drift = np.linalg.norm(got[spec.name] - exact[spec.name])
        assert 0.001 * np.linalg.norm(exact[spec.name]) < drift < 0.5 * np.linalg.norm(exact[spec.name])
        assert np.linalg.norm(got[spec.name] - want.numpy()) < 0.1 * drift, spec.name


def test_linears_of_one_tensor_share_the_largest_range(bundles, tmp_path):
    root = bundles("flux-tiny", opset=23, **OPTIONS)
    q, k, v = (f"transformer_blocks.0.attn.to_{n}" for n in "qkv")
    amax = {q: 2.0, k: 6.0, v: 4.0}
    scales = make_scales(Bundle.open(root), lambda _, name: amax.get(name, 1.0))
    after = quantize(root, tmp_path / "b", scales)
    stored = weights(after, "backbone")
    for name in (q, k, v):
        assert stored[f"{name}.input_scale"].item() == pytest.approx(6 / 448, rel=2**-23)
    nodes = {n.name: n for n in graph(after).graph.node}
    assert {nodes[n].input[0] for n in (q, k, v)} == {f"{q}.input_dequantized"}
    assert nodes[f"{q}.input_quantize"].input[1] == f"{q}.input_scale"
    assert f"{k}.input_quantize" not in nodes


def test_an_excluded_layer_stays_bit_for_bit(bundles, tmp_path):
    root = bundles("flux-tiny", opset=23, **OPTIONS)
    left = "single_transformer_blocks.1.proj_out"
    policy = write_policy(tmp_path / "p.toml", ["single_transformer_blocks.*"], [left])
    before = Bundle.open(root)
    after = quantize(root, tmp_path / "b", make_scales(before, lambda *_: 4.0), policy)
    assert left not in chosen(after) and all(n.startswith("single_transformer_blocks.") for n in chosen(after))
    assert torch.equal(weights(after, "backbone")[f"{left}.weight"], weights(before, "backbone")[f"{left}.weight"])
    (node,) = (n for n in graph(after).graph.node if n.name == left)
    assert list(node.input) == list(next(n for n in graph(before).graph.node if n.name == left).input)
    assert after.manifest.parts["backbone"].quantization.policy == load_policy(policy).digest()


def test_a_wrong_range_of_one_layer_changes_what_comes_out(made, tmp_path):
    before, after, scales = made("flux-float32")
    layer = "single_transformer_blocks.2.proj_out"
    ranges = dict(scales.parts["backbone"])
    ranges[layer] = dataclasses.replace(ranges[layer], amax=tuple(10 * a for a in ranges[layer].amax))
    broken = dataclasses.replace(scales, parts={**scales.parts, "backbone": ranges})
    other = quantize(before.root, tmp_path / "b", broken, "flux-t5")
    inputs = feeds(before, "backbone")
    exact, good, bad = (run_graph(b, "backbone", inputs)["means"] for b in (before, after, other))
    assert not np.array_equal(good, bad)
    assert np.isfinite(bad).all() and np.isfinite(good).all()
    old, new = weights(after, "backbone"), weights(other, "backbone")
    assert [k for k in new if not torch.equal(new[k].float(), old[k].float())] == [f"{layer}.input_scale"]
    # Ten is not a power of two, so every input of that linear is rounded to other numbers.
    assert np.linalg.norm(bad - good) > 0.01 * np.linalg.norm(good - exact)


@pytest.mark.parametrize("case", ["flux-float32", "qwen-float32"])
def test_a_quantised_bundle_draws(made, case):
    before, after, _ = made(case)
    pictures = []
    for bundle in (before, after):
        with Pipeline.load(bundle.root) as pipe:
            pictures.append(np.asarray(pipe("a red circle", 64, 64, seed=1, output_type="latents").images))
    assert np.isfinite(pictures[1]).all() and not np.array_equal(*pictures)


# The command


def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def flux(bundles, tmp_path):
    """A FLUX bundle in float32, its scales in a file, and where to write."""
    root = bundles("flux-tiny", opset=23, **OPTIONS)
    scales = make_scales(Bundle.open(root), lambda *_: 4.0)
    scales.save(tmp_path / "scales.json")
    return root, tmp_path / "scales.json", tmp_path / "out"


def test_the_command_prints_its_coverage(flux, tmp_path):
    root, scales, out = flux
    code, text, err = command("quantize", root, "--scales", scales, "--out", out, "--height", 64, "--width", 64)
    assert code == 0, err
    bundle = Bundle.open(out)
    found = linears(Bundle.open(root), "backbone")
    assert text.startswith("policy flux, fp8_e4m3; FLOPs of linears, one 64x64 image\n")
    assert f"39 of {len(found)}" in text
    assert f"not quantised in backbone: {', '.join(UNTOUCHED)}\n" in text
    assert text.endswith(f"wrote {out}\n")
    code, shown, _ = command("inspect", out)
    assert code == 0 and "float32, 39 linears in FP8 (79.8% of the parameters)" in shown
    code, shown, _ = command("inspect", out, "--json")
    parts = json.loads(shown)["parts"]
    assert parts["backbone"]["quantized_parameters"] == sum(found[n].parameters for n in chosen(bundle))
    assert parts["vae_decoder"]["quantized_parameters"] == 0 and parts["vae_decoder"]["quantization"] is None


def test_json_and_flops(flux):
    """FLOPs of the double blocks' image stream by hand: 2 x tokens x in x out for each linear."""
    root, scales, out = flux
    arguments = ("quantize", root, "--scales", scales, "--out", out, "--json", "--height", 64, "--width", 96)
    code, text, err = command(*arguments)
    assert code == 0, err
    result = json.loads(text)
    row = next(r for r in result["parts"] if r["part"] == "backbone")
    image, words = 4 * 6, Bundle.open(root).manifest.text.max_sequence_length
    tokens = {"x_embedder": image, "context_embedder": words} | dict.fromkeys(UNTOUCHED[2:], image)
    total = quantized = 0
    for name, linear in linears(Bundle.open(root), "backbone").items():
        rows = tokens.get(name)
        if rows is None:
            text_stream = any(key in name for key in (".add_", "to_add_out", "ff_context"))
            rows = image + words if name.startswith("single") else words if text_stream else image
            quantized += 2 * rows * linear.parameters
        total += 2 * rows * linear.parameters
    assert (row["flops"], row["quantized_flops"]) == (total, quantized)
    assert row["bytes_after"] < row["bytes_before"] and row["left"] == UNTOUCHED
    assert command(*arguments)[0] == 1, "exists already"
    assert command(*arguments, "--overwrite")[0] == 0


def test_scales_of_another_student(flux, bundles):
    _, scales, out = flux
    root = bundles("qwen-tiny", opset=23, **OPTIONS)
    code, _, err = command("quantize", root, "--scales", scales, "--out", out)
    assert code == 1 and "to a flux student, the bundle is qwen-image" in err
    assert not out.exists()


def test_scales_of_another_base(flux):
    root, _, out = flux
    scales = make_scales(Bundle.open(root), lambda *_: 4.0)
    foreign = dataclasses.replace(scales, base=dataclasses.replace(scales.base, sha256="1" * 64))
    with pytest.raises(CalibrationError, match="they belong to another student"):
        quantize(root, out, foreign)


def test_truncated_scales(flux):
    root, scales, out = flux
    scales.write_bytes(scales.read_bytes()[:-200])
    code, _, err = command("quantize", root, "--scales", scales, "--out", out)
    assert code == 1 and f"{scales} is not valid JSON" in err
    assert not out.exists()


def test_layers_that_were_not_calibrated(flux):
    root, _, out = flux
    scales = make_scales(Bundle.open(root), lambda *_: 4.0)
    ranges = {n: r for n, r in scales.parts["backbone"].items() if ".attn.to_q" not in n}
    with pytest.raises(QuantizeError) as e:
        quantize(root, out, dataclasses.replace(scales, parts={"backbone": ranges}))
    assert str(e.value) == (
        "scales: 5 of the 39 linears that the policy selects in backbone were not calibrated: "
        "transformer_blocks.0.attn.to_q, transformer_blocks.1.attn.to_q, single_transformer_blocks.0.attn.to_q, "
        "single_transformer_blocks.1.attn.to_q, single_transformer_blocks.2.attn.to_q; calibrate them, or exclude them "
        "in the policy"
    )
    with pytest.raises(QuantizeError, match=r"14 of the 14 linears that the policy selects in text_encoder_2 were not"):
        quantize(root, out, scales, "flux-t5")


def test_a_part_that_the_bundle_does_not_have(bundles, tmp_path):
    root = bundles("qwen-tiny", opset=23, **OPTIONS)
    policy = write_policy(tmp_path / "p.toml", ["*"], part="text_encoder_2")
    scales = make_scales(Bundle.open(root), lambda *_: 4.0)
    with pytest.raises(
        QuantizeError, match="the bundle has no part text_encoder_2; its parts are text_encoder, backbone"
    ):
        quantize(root, tmp_path / "b", scales, policy)


def test_a_bundle_that_is_quantised_already(flux, tmp_path):
    root, scales, out = flux
    assert command("quantize", root, "--scales", scales, "--out", out)[0] == 0
    code, _, err = command("quantize", out, "--scales", scales, "--out", tmp_path / "again")
    assert code == 1 and f"{out} is quantised already (backbone); give the bundle that" in err


def test_onto_itself(flux):
    root, scales, _ = flux
    code, _, err = command("quantize", root, "--scales", scales, "--out", root, "--overwrite")
    assert code == 1 and "is the bundle itself; give another name" in err
    Bundle.open(root, "full")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(143), OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(flux, monkeypatch, error):
    root, scales, out = flux
    before = set(os.listdir(out.parent))
    real = quantize_module.write_weights

    def stop(*arguments):
        real(*arguments)
        raise error

    monkeypatch.setattr(quantize_module, "write_weights", stop)
    assert command("quantize", root, "--scales", scales, "--out", out)[0] == {KeyboardInterrupt: 130}.get(
        error, 143 if isinstance(error, SystemExit) else 1
    )
    assert set(os.listdir(out.parent)) == before
    monkeypatch.undo()
    assert command("quantize", root, "--scales", scales, "--out", out)[0] == 0


def test_a_damaged_source_is_refused(flux, tmp_path):
    """Large weights are not hashed when a bundle is opened, so they are hashed when they are first read."""
    root, _, out = flux
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    plan = plan_quantization(Bundle.open(copy), make_scales(Bundle.open(root), lambda *_: 4.0), load_policy("flux"))
    path = copy / "backbone.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        quantize_bundle(plan, out, "test")
    assert not out.exists()


def test_weights_that_are_not_numbers(flux, tmp_path):
    root, _, out = flux
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    plan = plan_quantization(Bundle.open(copy), make_scales(Bundle.open(root), lambda *_: 4.0), load_policy("flux"))
    path, name = copy / "backbone.safetensors", "transformer_blocks.0.attn.to_q.weight"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]
    data[start : start + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(QuantizeError, match=f"tensor '{name}' holds NaN or Inf"):
        quantize_bundle(plan, out, "test")
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "parts.backbone: quantization: layers must be at least one"),
        ({"layers": ["a", "b", "a"]}, r"layers must be named once each, got \['a'\]"),
        ({"policy": "abc"}, "quantization: policy must be a SHA-256, got 'abc'"),
        ({"format": "int4"}, "format must be one of"),
        ({"format": "int8"}, "scales must be null for a format without calibration"),
        ({"scale": 1}, "unknown keys"),
    ],
)
def test_manifests_are_read_strictly(flux, change, message):
    root, scales, out = flux
    assert command("quantize", root, "--scales", scales, "--out", out)[0] == 0
    parts = json.loads((out / "manifest.json").read_text())["parts"]
    parts["backbone"]["quantization"] |= change
    edit_manifest(out, parts=parts)
    with pytest.raises(BundleError, match=message):
        Bundle.open(out)


def test_a_manifest_that_names_what_is_not_there(flux):
    root, scales, out = flux
    assert command("quantize", root, "--scales", scales, "--out", out)[0] == 0
    parts = json.loads((out / "manifest.json").read_text())["parts"]
    parts["backbone"]["quantization"]["layers"].append("no_such_layer")
    edit_manifest(out, parts=parts)
    code, _, err = command("inspect", out)
    assert code == 1 and "does not hold the weights that the manifest says are quantised" in err


def test_the_file_is_valid_and_aligned(made):
    _, after, _ = made("flux-bfloat16")
    path = after.path("backbone.safetensors")
    model = graph(after)
    places = {i.name: {e.key: e.value for e in i.external_data} for i in model.graph.initializer if i.external_data}
    with safe_open(path, framework="pt") as f:
        kinds = {key: f.get_slice(key).get_dtype() for key in f.keys()}  # noqa: SIM118 - not a dict
    assert set(kinds.values()) == {"BF16", "F8_E4M3"}
    for name, place in places.items():
        assert place["location"] == "backbone.safetensors"
        assert int(place["offset"]) % {"BF16": 2, "F8_E4M3": 1}[kinds[name]] == 0
