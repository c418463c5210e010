"""Show the contents of a LoRA file, or convert it for a bundle with slots.

arcflow lora inspect FILE shows the linears that it changes, their ranks and scales, and what is not used. Each scale
comes from the module's own alpha tensor, from the file's metadata, or from adapter_config.json beside it. With
--bundle, it also shows which layers do not fit the bundle. Exit code 1 if one does not that matters.

arcflow lora convert FILE --bundle DIR --out FILE writes the inputs of a bundle's slots, at scale 1 and in the slots'
dtypes. Such a file opens faster, and its reader needs no knowledge of the names that other tools use.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_runtime.errors import RequestError
from arcflow_runtime.lora.families import FAMILIES

if TYPE_CHECKING:
    from arcflow_runtime.lora.fit import Misfit
    from arcflow_runtime.lora.layers import LoraFile

#: --model -> family.
MODELS = {entry.option: family for family, entry in FAMILIES.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=["inspect", "convert"], help="what to do")
    parser.add_argument("file", type=Path, help="the LoRA, a .safetensors file")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", choices=MODELS, help="default: the model whose linears the file names")
    model.add_argument("--bundle", type=Path, metavar="DIR", help="compare with this bundle")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write; for convert")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file; for convert")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the LoRA's description, or convert it."""
    if args.action == "convert":
        return _convert(args)
    if args.out is not None or args.overwrite:
        raise RequestError("--out and --overwrite are for convert; leave them out")
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.lora.fit import misfits
    from arcflow_runtime.lora.read import read_lora

    bundle = None if args.bundle is None else Bundle.open(args.bundle)
    if bundle is None:
        lora = read_lora(args.file, _family(args))
    else:
        lora = read_lora(args.file, bundle.manifest.family, bundle.manifest.sampler)
    unfit = {} if bundle is None else misfits(lora, bundle)
    print(json.dumps(_describe(lora, unfit), indent=2) if args.json else _table(lora, unfit))
    return 0 if all(misfit.harmless for misfit in unfit.values()) else 1


def _convert(args: argparse.Namespace) -> int:
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.disk.outputs import check_writable
    from arcflow_runtime.lora.converted import write_converted
    from arcflow_runtime.lora.open import open_lora

    if args.bundle is None or args.out is None:
        raise RequestError("convert needs --bundle DIR, whose slots the LoRA is for, and --out FILE")
    if args.out.suffix != ".safetensors":
        raise RequestError(f"--out must end in .safetensors, got {str(args.out)!r}")
    if args.out.exists() and (args.out.samefile(args.file) or not args.overwrite):
        raise RequestError(
            f"--out: {args.out} exists; give another name, or --overwrite to replace an older conversion"
        )
    check_writable(args.out, "--out")
    manifest = Bundle.open(args.bundle).manifest
    lora = open_lora(args.file, args.file.stem, manifest)
    write_converted(args.out, lora, manifest)
    layers = {part: len(factors) for part, factors in lora.parts.items()}
    if args.json:
        print(json.dumps({"out": str(args.out), "layers": layers, "bytes": args.out.stat().st_size}, indent=2))
    else:
        counts = ", ".join(f"{count} linears of {part}" for part, count in layers.items())
        print(f"wrote {args.out}: {counts}, {args.out.stat().st_size:,} bytes")
    return 0


def _family(args: argparse.Namespace) -> str:
    """The family that --model names, or the only one that the file can be for."""
    from arcflow_runtime.lora.read import families_of

    if args.model is not None:
        return MODELS[args.model]
    found = families_of(args.file)
    if len(found) > 1:
        names = [f"--model {model}" for model, family in MODELS.items() if family in found]
        raise RequestError(
            f"{args.file} can be for several models, whose linears have the same names; give {' or '.join(names)}"
        )
    # A file that no model fits is read as one for the first, so that the reader says what is wrong.
    return next(iter(found or MODELS.values()))


def _describe(lora: LoraFile, unfit: dict[tuple[str, str], Misfit]) -> dict[str, object]:
    layers = [
        {
            "part": part,
            "linear": name,
            "module": layer.key,
            "in": layer.in_features,
            "out": layer.out_features,
            "rank": layer.rank,
            "file_rank": layer.file_rank,
            "alpha": layer.alpha,
            "scale": layer.scale,
            "source": layer.source,
            "misfit": unfit[part, name].reason if (part, name) in unfit else None,
        }
        for (part, name), layer in lora.layers.items()
    ]
    skipped = [{"key": s.key, "reason": s.reason} for s in lora.skipped]
    return {"family": lora.family, "tensors": lora.tensors, "layers": layers, "skipped": skipped}


def _table(lora: LoraFile, unfit: dict[tuple[str, str], Misfit]) -> str:
    """One line for the same linear of all blocks, if rank, sizes and scale are the same."""
    groups: dict[tuple[str, ...], int] = {}
    for (part, name), layer in lora.layers.items():
        rank = str(layer.rank) if layer.rank == layer.file_rank else f"{layer.rank} of {layer.file_rank}"
        size = f"{layer.in_features} x {layer.out_features}"
        row = (part, re.sub(r"\.\d+\.", ".*.", name, count=1), size, rank, f"{layer.scale:g}", layer.source)
        groups[row] = groups.get(row, 0) + 1
    rows: list[tuple[str, ...]] = [("part", "linear", "in x out", "rank", "scale", "from", "number")]
    rows += [(*row, str(count)) for row, count in groups.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    head = f"{lora.path}: {lora.family}, {len(lora.layers)} linears from {lora.tensors} tensors"
    lines = [
        head,
        "",
        *("  " + "  ".join(f"{v:{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]
    unused = [f"  {s.key}: {s.reason}" for s in lora.skipped]
    unused += [_line(at, misfit) for at, misfit in unfit.items() if misfit.harmless]
    wrong = [_line(at, misfit) for at, misfit in unfit.items() if not misfit.harmless]
    for title, found in (("not used", unused), ("does not fit the bundle", wrong)):
        if found:
            lines += ["", title, *found]
    return "\n".join(lines)


def _line(at: tuple[str, str], misfit: Misfit) -> str:
    return f"  {at[0]}, {at[1]}: {misfit.reason}"
