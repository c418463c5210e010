"""Write the model card of a bundle: a manifest -> the text of README.md, with the metadata that the hub reads."""

from __future__ import annotations

from dataclasses import dataclass

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Manifest, Source
from arcflow_runtime.errors import RequestError


@dataclass(frozen=True)
class Licence:
    """A licence in the hub's terms: its id; for "other" also its name, file in the base's repository, and terms."""

    id: str
    name: str | None = None
    file: str | None = None
    terms: str = ""


#: Base on the hub -> its licence. Weights that are made from a base are under the base's licence.
LICENCES = {
    "black-forest-labs/FLUX.1-dev": Licence(
        "other",
        "flux-1-dev-non-commercial-license",
        "LICENSE.md",
        "The weights may be used for non-commercial purposes only, and whoever passes them on must pass on the licence "
        "too.",
    ),
    "black-forest-labs/FLUX.1-schnell": Licence("apache-2.0"),
    "Qwen/Qwen-Image": Licence("apache-2.0"),
}


def known_base(name: str) -> str | None:
    """The hub id of a base that `LICENCES` has, from a hub id or the name of a directory; None for another."""
    return next((base for base in LICENCES if name in (base, base.partition("/")[2])), None)


def model_card(bundle: Bundle, repo_id: str, endpoint: str, licence: str | None = None) -> str:
    """The text of the model card.

    Args:
        bundle: an opened bundle.
        repo_id: where it will be on the hub, `owner/name`.
        endpoint: the hub's address, for links.
        licence: id of a licence on the hub, for a base that is not in `LICENCES`.

    Raises:
        RequestError: the base's licence is unknown and none was given, or another one was given for a known base.
    """
    from huggingface_hub import ModelCard, ModelCardData

    m = bundle.manifest
    base = known_base(m.provenance.base.name)
    terms = _licence(m.provenance.base.name, base, licence)
    link = f"{endpoint}/{base}/blob/main/{terms.file}" if terms.file else None
    data = ModelCardData(
        license=terms.id,
        license_name=terms.name,
        license_link=link,
        base_model=base,
        pipeline_tag="text-to-image",
        library_name="arcflow",
        tags=["arcflow", "onnx", m.family],
    )
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.partition('/')[2]}",
        f"A bundle of {m.provenance.base.name} for ArcFlow's runtime in Python and C++. It generates an image in "
        f"{m.schedule.num_inference_steps} steps.",
        f"```python\nfrom arcflow_runtime import Pipeline\n\nPipeline.load({repo_id!r})"
        '("a red fox in the snow").images[0].save("fox.png")\n```',
        f'```sh\narcflow generate {repo_id} "a red fox in the snow"\n```',
        "## What is in it",
        _table([("part", "parameters", "precision", "MB"), *_parts(bundle)]),
        _table([("", ""), *_facts(m)]),
        "## Licence",
        _licence_text(m, base, terms, link),
    ]
    return str(ModelCard("\n\n".join(paragraphs) + "\n"))


def _licence(name: str, base: str | None, given: str | None) -> Licence:
    if base is None and given is None:
        raise RequestError(
            f"--license must be given, because the licence of the base {name!r} is not known here; "
            "give an id such as --license apache-2.0"
        )
    if base is None and given is not None:
        return Licence(given)
    assert base is not None, "one of the two is set"
    found = LICENCES[base]
    if given is not None and given not in (found.id, found.name):
        raise RequestError(f"--license must be {found.name or found.id!r}, that of the base {base}, got {given!r}")
    return found


def _licence_text(m: Manifest, base: str | None, terms: Licence, link: str | None) -> str:
    called = terms.name or terms.id
    named = f"[{called}]({link})" if link else called
    of = f"that of the base {base}" if base else "as its publisher states"
    others = ", ".join(s.name for s in (m.provenance.adapter, *m.provenance.loras) if s is not None)
    added = f" The weights also contain {others}, whose authors may have added terms of their own." if others else ""
    return f"The licence is {named}, {of}.{' ' + terms.terms if terms.terms else ''}{added}"


def _parts(bundle: Bundle) -> list[tuple[str, ...]]:
    m = bundle.manifest
    rows: list[tuple[str, ...]] = []
    for name, part in m.parts.items():
        q = part.quantization
        precision = part.precision if q is None else f"{part.precision}, {len(q.layers)} linears in {q.format}"
        size = sum(m.files[file].bytes for file in {part.graph, part.weights})
        rows.append((name, f"{part.parameters:,}", precision, f"{size / 1e6:,.1f}"))
    return rows


def _facts(m: Manifest) -> list[tuple[str, str]]:
    r, slots = m.ranges, m.slots()
    linears = sum(len(s.layers) for s in slots.values())
    return [
        ("base", _source(m.provenance.base)),
        ("adapter", _source(m.provenance.adapter)),
        ("LoRAs merged in", ", ".join(_source(s) for s in m.provenance.loras) or "none"),
        (
            "LoRAs at run time",
            f"{linears} linears, rank up to {max(s.max_rank for s in slots.values())}" if slots else "no",
        ),
        ("image size", f"{_range(r.height_px.min, r.height_px.max)} by {_range(r.width_px.min, r.width_px.max)} px"),
        ("images at once", _range(r.batch.min, r.batch.max)),
        ("text tokens", f"up to {m.text.max_sequence_length}"),
        ("guidance scale", "yes" if m.guidance else "no"),
        ("ONNX opset", str(m.opset)),
        ("format", f"bundle version {m.version}"),
        ("made", f"{m.provenance.created} by {', '.join(f'{k} {v}' for k, v in m.provenance.tools.items())}"),
        ("command", f"`{m.provenance.command}`"),
    ]


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _source(source: Source | None) -> str:
    if source is None:
        return "none"
    revision = f" at {source.revision}" if source.revision else ""
    scale = "" if source.scale is None else f", scale {source.scale:g}"
    return f"{source.name}{revision}{scale}"


def _table(rows: list[tuple[str, ...]]) -> str:
    # A line break or a bar in a cell would break the table.
    lines = ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
