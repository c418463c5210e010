"""The linears of a checkpoint that one module of a LoRA file changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

#: How the output of a fused linear is divided: not, in equal parts, or q, k, v as wide as the input and the rest.
Split = Literal["whole", "equal", "qkv-mlp"]


@dataclass(frozen=True)
class Target:
    """The linears of a checkpoint that one module of a LoRA file changes.

    Args:
        component: the checkpoint's folder.
        names: the linears, with `{i}` for a block's number in tables; several if the module is fused.
        split: how the rows of B are divided among them.
        swapped: the two halves of B are the other way round in the checkpoint.
    """

    component: str
    names: tuple[str, ...]
    split: Split = "whole"
    swapped: bool = False


#: A spelling without prefix, with `{i}` for the block's number, and what it means.
Entry = tuple[str, Target]
QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def same(component: str, names: Iterable[str]) -> Iterator[Entry]:
    """Linears that are spelt as in the checkpoint."""
    for name in names:
        yield name, Target(component, (name,))


def attention(block: str) -> Iterator[Entry]:
    """diffusers' names of the joint attention in `block`, and those of its fused form."""
    yield from same("transformer", (f"{block}.attn.{n}" for n in (*QKV, *ADDED_QKV, "to_out.0", "to_add_out")))
    yield f"{block}.attn.to_out", Target("transformer", (f"{block}.attn.to_out.0",))
    for fused, parts in (("to_qkv", QKV), ("to_added_qkv", ADDED_QKV)):
        yield f"{block}.attn.{fused}", Target("transformer", tuple(f"{block}.attn.{n}" for n in parts), "equal")
