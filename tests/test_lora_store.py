"""LoRAs of a pipeline: which fit a bundle, how they are joined, what is kept, and every error. No graph runs."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_bundle import edit_manifest, make_bundle

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.errors import BundleError, LoraError, RequestError
from arcflow_runtime.lora.converted import is_converted, slots_digest, write_converted
from arcflow_runtime.lora.layers import LoraLayer
from arcflow_runtime.lora.open import open_lora
from arcflow_runtime.lora.prepare import NO_LORAS, prepare
from arcflow_runtime.lora.slots import Factors, FittedLora, fit
from arcflow_runtime.lora.store import LoraStore
from arcflow_runtime.maths.dtypes import to_float32
from tests.lora_slots import add_slots, write_lora

Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
LAYERS = {"backbone": {Q: (6, 5), K: (6, 5)}, "text_encoder": {CLIP: (4, 4)}}


@pytest.fixture
def root(tmp_path):
    return add_slots(make_bundle(tmp_path / "bundle"), LAYERS, unread=("transformer_blocks.0.attn.to_add_out",))


@pytest.fixture
def manifest(root):
    return Bundle.open(root).manifest


def layer(inputs=6, outputs=5, rank=3, seed=0, scale=0.5):
    random = np.random.default_rng(seed)
    down, up = (random.standard_normal(s).astype(np.float32) for s in ((rank, inputs), (outputs, rank)))
    return LoraLayer("transformer", down, up, scale, "", "", None, rank)


def fitted(manifest, name="ink", seed=0, rank=3, layers=(("backbone", Q),)):
    sizes = {part: LAYERS[part] for part, _ in layers}
    return fit(name, {(p, n): layer(*sizes[p][n], rank, seed) for p, n in layers}, manifest)


def product(prepared, part, name):
    """A B of one slot, in float64."""
    arrays = [to_float32(prepared.of(part)[f"{name}.lora_{x}"]).astype(np.float64) for x in "ab"]
    rank = prepared.ranks[part][name]
    return arrays[0].reshape(-1, rank) @ arrays[1].reshape(rank, -1)


def fails(message, call, *arguments, error=LoraError):
    with pytest.raises(error) as e:
        call(*arguments)
    assert str(e.value) == message


def test_one_lora_is_its_product(manifest):
    made = layer()
    prepared = prepare(manifest, [(0, fit("ink", {("backbone", Q): made}, manifest), -0.8)])
    assert {name: a.shape for name, a in prepared.of("backbone").items()} == {
        f"{Q}.lora_a": (6, 1, 8),
        f"{Q}.lora_b": (1, 8, 5),
    }
    wanted = -0.8 * 0.5 * (made.up.astype(np.float64) @ made.down).T
    # The scale and each number of B are rounded once to float32, so each of three products is off by 2 * 2^-24.
    bound = 3 * 2 * 2.0**-24 * np.abs(made.up).max() * np.abs(made.down).max()
    np.testing.assert_allclose(product(prepared, "backbone", Q), wanted, rtol=0, atol=bound)
    assert prepared.of("text_encoder") == {} and prepared.text_key == ()


def test_several_are_joined_along_the_rank(manifest):
    loras = [fitted(manifest, n, seed, rank) for n, seed, rank in (("a", 1, 5), ("b", 2, 4))]
    both = prepare(manifest, [(0, loras[0], 0.5), (1, loras[1], 2.0)])
    assert both.ranks == {"backbone": {Q: 16}}  # 9, rounded up to a multiple of 8
    alone = [prepare(manifest, [(0, lora, scale)]) for lora, scale in zip(loras, (0.5, 2.0), strict=True)]
    total = sum(product(p, "backbone", Q) for p in alone)
    # The factors are the same numbers, so only the order of a float64 sum differs.
    np.testing.assert_allclose(product(both, "backbone", Q), total, rtol=1e-14, atol=1e-15)
    assert not both.of("backbone")[f"{Q}.lora_a"].reshape(6, 16)[:, 9:].any()


def test_factors_are_in_the_dtype_of_the_slot(tmp_path):
    root = add_slots(make_bundle(tmp_path / "b", precision="bfloat16"), LAYERS)
    manifest = Bundle.open(root).manifest
    exact = layer()
    array = prepare(manifest, [(0, fit("ink", {("backbone", Q): exact}, manifest), 1.0)]).of("backbone")[f"{Q}.lora_a"]
    assert array.dtype == np.uint16
    # bfloat16 stores 7 bits of the mantissa: half an ulp is at most 2^-8 of the value.
    np.testing.assert_allclose(to_float32(array).reshape(6, 8)[:, :3], exact.down.T, rtol=2.0**-8)


def test_only_loras_of_a_text_encoder_count_for_its_states(manifest):
    text = fitted(manifest, layers=(("text_encoder", CLIP), ("backbone", Q)))
    both = prepare(manifest, [(3, fitted(manifest), 0.5), (7, text, 0.25)])
    assert (both.key, both.text_key) == (((3, 0.5), (7, 0.25)), ((7, 0.25),))


def test_layers_that_do_not_fit(manifest, tmp_path):
    far = "transformer_blocks.1.attn.to_q"
    fails(
        f"ink changes {far}, which must have slots in this bundle; export with --lora-slots all, or with patterns that "
        "match them",
        fit, "ink", {("backbone", Q): layer(), ("backbone", far): layer()}, manifest,
    )  # fmt: skip
    fails(
        f"ink: {Q} must have 6 inputs and 5 outputs in this bundle, got 6 and 4; the LoRA was trained for another "
        "model",
        fit, "ink", {("backbone", Q): layer(outputs=4)}, manifest,
    )  # fmt: skip
    fails(
        f"ink: {Q} must have a rank of at most 32, the largest of this bundle, got 33; export with --lora-max-rank 40",
        fit, "ink", {("backbone", Q): layer(rank=33)}, manifest,
    )  # fmt: skip
    plain = Bundle.open(make_bundle(tmp_path / "plain")).manifest
    fails(
        "ink: this bundle has no LoRA slots; export with --lora-slots all, or merge the LoRA with --lora",
        fit, "ink", {("backbone", Q): layer()}, plain,
    )  # fmt: skip


def test_a_layer_whose_output_nobody_reads_is_ignored(manifest):
    unread = ("backbone", "transformer_blocks.0.attn.to_add_out")
    both = fit("ink", {("backbone", Q): layer(), unread: layer()}, manifest)
    assert {part: list(found) for part, found in both.parts.items()} == {"backbone": [Q]}
    fails(
        f"ink changes only {unread[1]}, whose output this student never reads",
        fit, "ink", {unread: layer()}, manifest,
    )  # fmt: skip


def test_ranks_that_add_up_to_too_much(manifest):
    loras = [(i, fitted(manifest, name, i, rank), 1.0) for i, (name, rank) in enumerate((("a", 20), ("b", 13)))]
    fails(
        f"loras: the ranks at {Q} must add up to at most 32 in this bundle, got 33: a (20), b (13); give fewer LoRAs, "
        "or export with --lora-max-rank 40",
        prepare, manifest, loras, error=RequestError,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("float32", 1e38)])
def test_factors_beyond_the_range(tmp_path, dtype, value):
    manifest = Bundle.open(add_slots(make_bundle(tmp_path / "b", precision=dtype), LAYERS)).manifest
    up = np.full((5, 1), value, np.float32)
    lora = FittedLora("ink", {"backbone": {Q: Factors(np.ones((1, 6), np.float32), up, 1.0)}})
    fails(
        f"loras: the factors of ink at {Q} must be finite in {dtype}, got values beyond its range; give a smaller "
        "scale",
        prepare, manifest, [(0, lora, 1e3)], error=RequestError,
    )  # fmt: skip


def test_the_store(manifest):
    store = LoraStore(manifest)
    assert store.get(()) is NO_LORAS
    store.add("ink", fitted(manifest))
    store.add("soft", fitted(manifest, "soft", 1))
    assert store.names == ("ink", "soft")
    both = store.get((("ink", 0.5), ("soft", 1.0)))
    assert store.get((("soft", 1.0), ("ink", 0.5))) is both
    fails(
        "loras must be names of loaded LoRAs ('ink', 'soft'), got 'pencil'; call load_lora first",
        store.get, (("pencil", 1.0),), error=RequestError,
    )  # fmt: skip
    fails(
        "name must be new, got 'ink', which is loaded; call unload_lora('ink') first",
        store.add, "ink", fitted(manifest), error=RequestError,
    )  # fmt: skip
    store.remove("ink")
    store.add("ink", fitted(manifest, seed=5))
    again = store.get((("ink", 0.5), ("soft", 1.0)))
    assert again.key != both.key, "another file of the same name is another LoRA, for caches too"
    store.clear()
    fails(
        "loras must be names of loaded LoRAs (none), got 'ink'; call load_lora first",
        store.get, (("ink", 1.0),), error=RequestError,
    )  # fmt: skip


def test_prepared_sets_are_bounded_in_number_and_bytes(manifest):
    store = LoraStore(manifest, sets=2)
    store.add("ink", fitted(manifest))
    made = [store.get((("ink", scale),)) for scale in (1.0, 2.0, 3.0)]
    assert store.get((("ink", 2.0),)) is made[1] and store.get((("ink", 3.0),)) is made[2]
    assert store.get((("ink", 1.0),)) is not made[0]
    small = LoraStore(manifest, nbytes=made[0].nbytes)
    small.add("ink", fitted(manifest))
    first = small.get((("ink", 1.0),))
    assert small.get((("ink", 1.0),)) is first
    small.get((("ink", 2.0),))
    assert small.get((("ink", 1.0),)) is not first


def test_a_set_is_prepared_once_by_many_threads(manifest, monkeypatch):
    store, calls, gate = LoraStore(manifest), [], threading.Barrier(8)
    store.add("ink", fitted(manifest))
    monkeypatch.setattr("arcflow_runtime.lora.store.prepare", lambda *a: calls.append(1) or prepare(*a))

    def ask(_):
        gate.wait()
        return store.get((("ink", 0.5),))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert len(calls) == 1 and all(p is found[0] for p in found)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_converted_file_is_the_same_lora(tmp_path, precision):
    manifest = Bundle.open(add_slots(make_bundle(tmp_path / "b", precision=precision), LAYERS)).manifest
    source = write_lora(tmp_path / "ink.safetensors", manifest.slots())
    lora = open_lora(source, "ink", manifest)
    out = tmp_path / "converted.safetensors"
    write_converted(out, lora, manifest)
    assert is_converted(out) and not is_converted(source)
    before, after = (prepare(manifest, [(0, open_lora(path, "ink", manifest), 1.0)]) for path in (source, out))
    assert before.ranks == after.ranks
    for part in manifest.slots():
        for name, array in before.of(part).items():
            np.testing.assert_array_equal(array, after.of(part)[name])


def test_converted_files_that_do_not_fit(tmp_path, manifest, root):
    source = write_lora(tmp_path / "ink.safetensors", manifest.slots())
    path = tmp_path / "converted.safetensors"
    write_converted(path, open_lora(source, "ink", manifest), manifest)

    def edited(**changes):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header["__metadata__"] |= {k: v for k, v in changes.items() if k in ("version", "slots")}
        header[f"{Q}.lora_a"]["shape"] = changes.get("shape", header[f"{Q}.lora_a"]["shape"])
        for old, new in changes.get("rename", {}).items():
            header[new] = header.pop(old)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        out = tmp_path / "edited.safetensors"
        out.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        return out

    e = tmp_path / "edited.safetensors"
    fails(f"{e}: version must be 1, got '2'; convert the LoRA again", open_lora, edited(version="2"), "ink", manifest)
    fails(
        f"{e} was converted for a bundle with other slots; convert the LoRA again for this one",
        open_lora, edited(slots="0" * 64), "ink", manifest,
    )  # fmt: skip
    fails(
        f"{e} lacks '{Q}.lora_a'; convert the LoRA again",
        open_lora, edited(rename={f"{Q}.lora_a": "x.lora_a"}), "ink", manifest,
    )  # fmt: skip
    fails(
        f"{e}: '{Q}.lora_a' or '{Q}.lora_b' has another shape or dtype than its slot",
        open_lora, edited(shape=[8, 1, 6]), "ink", manifest,
    )  # fmt: skip


def test_the_digest_of_slots_does_not_depend_on_the_weights(manifest, root):
    before = slots_digest(manifest)
    edit_manifest(root, provenance__command="another")
    assert slots_digest(Bundle.open(root).manifest) == before
    edit_manifest(root, parts__backbone__lora__max_rank=64, parts__text_encoder__lora__max_rank=64)
    assert slots_digest(Bundle.open(root).manifest) != before


def test_other_sets_are_there_while_one_is_prepared(manifest, monkeypatch):
    store, started, go = LoraStore(manifest), threading.Event(), threading.Event()
    store.add("ink", fitted(manifest))
    ready = store.get((("ink", 1.0),))

    def slowly(*arguments):
        started.set()
        assert go.wait(60)
        return prepare(*arguments)

    monkeypatch.setattr("arcflow_runtime.lora.store.prepare", slowly)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(store.get, (("ink", 2.0),))
        assert started.wait(60)
        assert store.get((("ink", 1.0),)) is ready
        store.remove("ink")
        go.set()
        assert slow.result().key == ((0, 2.0),), "a request that has begun ends as it began"
    assert not store._prepared and not store._pending


def test_a_set_that_cannot_be_prepared_is_an_error_each_time(manifest):
    store = LoraStore(manifest)
    for i, rank in enumerate((20, 13)):
        store.add(str(i), fitted(manifest, str(i), i, rank))
    for _ in range(2):
        with pytest.raises(RequestError, match="must add up to at most 32"):
            store.get((("0", 1.0), ("1", 1.0)))


SLOTS = "parts.backbone: lora"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "unknown keys ['lora'] in a bundle of version 1 (B14)"),
        ({"parts__backbone__lora__layers": {}}, f"{SLOTS}: layers must be at least one, or no lora, got []"),
        ({"parts__backbone__lora__rank_multiple": 4}, f"{SLOTS}: rank_multiple must be 8, got 4"),
        ({"parts__backbone__lora__max_rank": 12}, f"{SLOTS}: max_rank must be a multiple of 8 up to 1024, got 12"),
        ({"parts__backbone__lora__max_rank": 2048}, f"{SLOTS}: max_rank must be a multiple of 8 up to 1024, got 2048"),
        ({"parts__backbone__lora__max_rank": 64}, "lora: max_rank must be the same in every part, got [32, 64]"),
        (
            {"parts__backbone__lora__layers": {Q: {"in_features": 0, "out_features": 1, "dtype": "float32"}}},
            f"{SLOTS}: {Q} must be of at least one input and output, got (0, 1)",
        ),
        (
            {"parts__backbone__lora__layers": {Q: {"in_features": 1, "out_features": 1, "dtype": "int64"}}},
            f"{SLOTS}: {Q}: dtype must be one of ['float32', 'float16', 'bfloat16'], got 'int64'",
        ),
        (
            {"parts__backbone__lora__layers": {CLIP: {"in_features": 1, "out_features": 1, "dtype": "float32"}}},
            f"lora: layers must be in one part each, got ['{CLIP}']",
        ),
        (
            {"parts__backbone__lora": None, "parts__text_encoder__lora": None},
            "version must be 1 for these slots and formats (B14, B15), got 2",
        ),
    ],
)
def test_wrong_slots(root, changes, message):
    edit_manifest(root, **changes)
    with pytest.raises(BundleError) as e:
        Bundle.open(root)
    again = "" if "unknown keys" in message else "; export the bundle again"
    assert str(e.value) == f"{root / 'manifest.json'}: {message}{again}"
