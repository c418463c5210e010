"""Check that two bundles, or a bundle and a student, were made from the same weights, so that they can be compared."""

from __future__ import annotations

from collections.abc import Iterator

from arcflow_export.errors import ExportError
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import FileEntry, Manifest, Source

#: Base, adapter and LoRAs of a student, as a bundle's provenance records them.
StudentSources = tuple[Source, Source | None, tuple[Source, ...]]
#: Keys of the manifest that must be equal: with them the same request means the same image.
_KEYS = ("family", "latents", "sampler", "schedule", "rotary", "text", "guidance", "true_cfg_scale")


def check_comparable(candidate: Bundle, reference: Bundle) -> tuple[str, ...]:
    """Check that two bundles belong to the same student.

    Precision, scales, opset and sizes may differ. So may `reference_dtype`: it is the rounding of the timesteps in
    training, not an error of this bundle, so both bundles run with the candidate's.

    Args:
        candidate: the bundle to check.
        reference: the bundle to compare it with.

    Returns:
        Notes on differences that still allow a comparison.

    Raises:
        ExportError: the students differ; the message names every difference.
    """
    c, r = candidate.manifest, reference.manifest
    if differing := list(_differences(c, r)):
        raise ExportError(
            f"{candidate.root} and {reference.root} are not of the same student: {'; '.join(differing)}; "
            "give the bundle that the first was made from, or one exported from the same base, adapter and LoRAs"
        )
    notes = []
    ours, theirs = c.provenance.vae, r.provenance.vae
    if (ours and ours.sha256) != (theirs and theirs.sha256):
        notes.append(f"The decoders differ ({_vae_named(ours)} and {_vae_named(theirs)}); that counts as drift here.")
    if c.reference_dtype == r.reference_dtype:
        return tuple(notes)
    if c.modulation is not None or r.modulation is not None:
        notes.append(
            f"The modulation tables were baked for different reference dtypes ({r.reference_dtype} and "
            f"{c.reference_dtype}); that counts as drift here."
        )
    else:
        notes.append(f"Timesteps, guidance and rotary tables of both bundles are rounded to {c.reference_dtype}.")
    return tuple(notes)


def check_student(bundle: Bundle, sources: StudentSources, vae: Source | None = None) -> None:
    """Check that a bundle was made from a student's weights.

    Args:
        bundle: an opened bundle.
        sources: the student's base, adapter and LoRAs, from `Student.sources`.
        vae: the VAE given in place of the base's, from `Student.vae_source`.

    Raises:
        ExportError: the weights differ; the message names which of base, adapter, LoRAs and VAE.
    """
    made = bundle.manifest.provenance
    base, adapter, loras = sources
    pairs = [("base", made.base, base), ("adapter", made.adapter, adapter)]
    wrong = [f"{what} {_named(mine)}, not from {_named(given)}" for what, mine, given in pairs if _differ(mine, given)]
    if len(made.loras) != len(loras) or any(map(_differ, made.loras, loras)):
        wrong.append(f"{_listed(made.loras)}, not from {_listed(loras)}")
    if (made.vae is None) != (vae is None) or (made.vae is not None and vae is not None and _differ(made.vae, vae)):
        wrong.append(f"{_vae_named(made.vae)}, not from {_vae_named(vae)}")
    if wrong:
        raise ExportError(
            f"{bundle.root} was made from {'; from '.join(wrong)}; give the base, adapter and LoRAs it was made from"
        )


def same_parts(candidate: Bundle, reference: Bundle) -> set[str]:
    """The parts whose files are equal in both bundles. They compute the same, so they need to run only once."""
    c, r = candidate.manifest, reference.manifest
    both = c.parts.keys() & r.parts.keys()
    return {name for name in both if _files(c, name) == _files(r, name)}


def _files(manifest: Manifest, part: str) -> list[FileEntry]:
    found = manifest.parts[part]
    return [manifest.files[found.graph], manifest.files[found.weights]]


def _differences(c: Manifest, r: Manifest) -> Iterator[str]:
    for key in _KEYS:
        ours, theirs = getattr(c, key), getattr(r, key)
        if ours != theirs:
            yield f"{key} {_short(ours)} and {_short(theirs)}"
    for name in sorted(c.tokenizers.keys() | r.tokenizers.keys()):
        files = [m.files[m.tokenizers[name]].sha256 if name in m.tokenizers else None for m in (c, r)]
        if files[0] != files[1]:
            yield f"{name} (its file)"
    for key in ("base", "adapter"):
        yield from _source(key, getattr(c.provenance, key), getattr(r.provenance, key))
    ours, theirs = c.provenance.loras, r.provenance.loras
    if len(ours) != len(theirs):
        yield f"LoRAs {[s.name for s in ours]} and {[s.name for s in theirs]}"
    else:
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _source(f"LoRA {i + 1}", *pair)


def _source(what: str, ours: Source | None, theirs: Source | None) -> Iterator[str]:
    if _differ(ours, theirs):
        yield f"{what} {_named(ours)} and {_named(theirs)}"


def _differ(ours: Source | None, theirs: Source | None) -> bool:
    if ours is None or theirs is None:
        return ours is not theirs
    return (ours.sha256, ours.scale) != (theirs.sha256, theirs.scale)


def _named(source: Source | None) -> str:
    if source is None:
        return "none"
    scale = "" if source.scale is None else f", scale {source.scale:g}"
    return f"{source.name} (sha256 {source.sha256[:12]}{scale})"


def _listed(loras: tuple[Source, ...]) -> str:
    return f"LoRA {', '.join(map(_named, loras))}" if loras else "no LoRA"


def _vae_named(vae: Source | None) -> str:
    return "the base's own VAE" if vae is None else f"VAE {_named(vae)}"


def _short(value: object) -> str:
    """A value as text, without the class's name."""
    text = repr(value)
    return text if isinstance(value, (str, bool)) else text[text.find("(") :]
