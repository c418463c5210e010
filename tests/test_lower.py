"""Lowering in place, against the program as it was and against torch's own `run_decompositions`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

from arcflow_export.graph.lower import lower

aten = torch.ops.aten
#: Some of what torch.onnx has no converter for.
TABLE = {aten.min.other: torch.minimum, aten.hardswish.default: lambda x: x * F.relu6(x + 3) / 6}
#: What no program may have when it was lowered.
GONE = {aten.chunk.default, aten.unflatten.int, aten.flatten.using_ints, aten.contiguous.default, aten.dropout.default}
GONE |= {aten._assert_tensor_metadata.default, aten.to.dtype, aten.add_.Tensor, *TABLE}


class Known(nn.Module):
    """Every operator that is rewritten, with outputs that are replaced."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = x.chunk(2, -1)
        a = a.unflatten(-1, (2, -1)).flatten(1, 2).transpose(1, 2).contiguous()
        c = a * 2
        c += 1
        c = F.dropout(torch.min(c, torch.full_like(c, 1.5)), 0.5, False)
        wide = torch.cat([y, y], 1)
        flat = wide.flatten(1, 2)
        return c.double().float().float(), b.reshape(b.shape), flat.unflatten(1, (-1, 7)), wide.unflatten(2, (7, 1))


class Looked(nn.Module):
    """Writes into memory that a view shows."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a = x * 2
        b = a.flatten(1)
        a += 1
        return b


class Undone(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.hardswish(x.flatten(1))


class Trained(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.0, True) + 1


def example(batch: int, rows: int, more: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, rows, 8, generator=generator), torch.randn(batch, more, 7, generator=generator)


def program_of(module: nn.Module) -> ExportedProgram:
    batch = Dim("batch", min=1, max=9)
    shapes = ({0: batch, 1: Dim("rows", min=1, max=99)}, {0: batch, 1: Dim("more", min=1, max=99)})
    return export(module, example(2, 4, 5), dynamic_shapes=shapes, strict=False)


def operators(program: ExportedProgram) -> set:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def same(program: ExportedProgram, module: nn.Module) -> bool:
    for sizes in ((2, 4, 5), (3, 9, 6), (1, 1, 1)):
        got, expected = program.module()(*example(*sizes)), module(*example(*sizes))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    return True


def test_what_is_known_is_rewritten_in_its_own_graph():
    program = program_of(Known())
    before = operators(program)
    assert GONE - before == {aten.hardswish.default}
    assert lower(program, TABLE) is program
    assert not operators(program) & GONE
    new = {aten.split.Tensor, aten.add.Tensor, aten.minimum.default, aten._to_copy.default}
    assert operators(program) - before == new
    assert same(program, Known())


@pytest.mark.parametrize("module", [Looked(), Undone(), Trained()], ids=lambda module: type(module).__name__)
def test_the_rest_is_left_to_torch(module):
    program = program_of(module)
    lowered = lower(program, TABLE)
    assert lowered is not program
    assert not operators(lowered) & GONE
    assert same(lowered, module)
