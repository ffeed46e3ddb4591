"""What packages are given: checked and laid out by the program itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_equal
from torch import Tensor, nn

import rewriter
from rewriter.errors import CaptureError
from rewriter.kernels import package_inputs
from rewriter.kernels.package_inputs import package_input
from rewriter.lowering.inputs import inputs_checked

X = torch.linspace(-1, 1, 24).view(2, 3, 4)


class Reads(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, image: Tensor) -> Tensor:
        x.view(-1).add_(1)
        return image.sum() + ids[:, None] * x.sum(-1)


def exported() -> Any:
    image = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    batch = torch.export.Dim("batch")
    sizes = {"x": {0: batch}, "ids": {0: batch}, "image": None}
    with torch.no_grad():
        given = X.clone(), torch.tensor([3, 4]), image
        return torch.export.export(Reads(), given, dynamic_shapes=sizes)


needs_compiler = pytest.mark.skipif(
    package_inputs.refusal() is not None, reason=f"no compiler: {package_inputs.refusal()}"
)


@needs_compiler
def test_each_input_is_read_through_a_check_for_the_time_being() -> None:
    program = exported()
    before = str(program.graph)
    with inputs_checked(program):
        calls = [n for n in program.graph.nodes if "package_input" in str(n.target)]
        assert [n.args[1] for n in calls] == ["ids", "image"]  # x is written to
        assert [n.args[2:] for n in calls] == [([-2], 4, 0), ([2, 3, 4, 5], 0, 1)]
        assert all(len(n.args[0].users) == 1 for n in calls)
        assert calls[1].meta["val"].is_contiguous(memory_format=torch.channels_last)
        program.graph.lint()
    assert str(program.graph) == before


@needs_compiler
def test_a_size_that_two_inputs_share_is_compared() -> None:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(
            Twice(), (X, X.clone()), dynamic_shapes={"x": {0: batch}, "y": {0: batch}}
        )
    with inputs_checked(program):
        first, second = (n for n in program.graph.nodes if "package_input" in str(n.target))
        assert first.args[2] == [-1, 3, 4]
        size, *rest = second.args[2]
        assert (size.args[0].name, size.args[1], rest) == ("x", 0, [3, 4])


class Twice(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize("x", [X, X.mT, X[:, ::2], X[:1].expand(3, -1, -1), X[:0]])
def test_any_strides_are_laid_out(x: Tensor) -> None:
    y = package_input(x, "x", [-2] * 3, 0, 0)
    assert y.is_contiguous()
    assert y.data_ptr() != x.data_ptr() or not x.numel()
    assert_equal(y, x)


def test_channels_last() -> None:
    y = torch.ops.rewriter.package_input.default(X[None], "x", [1, 2, 3, 4], 0, 1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_equal(y, X[None])


def test_other_sizes_and_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"ids has the sizes \[2, 3, 4\], not \[2, 3\]"):
        package_input(X, "ids", [2, 3], 0, 0)
    with pytest.raises(RuntimeError, match=r"ids has the sizes \[2, 3, 4\], not \[-1, 3, 5\]"):
        package_input(X, "ids", [-1, 3, 5], 0, 0)
    with pytest.raises(RuntimeError, match=r"x has the sizes \[0, 3, 4\], not \[-1, 3, 4\]"):
        package_input(X[:0], "x", [-1, 3, 4], 0, 0)
    with pytest.raises(RuntimeError, match="ids is torch.float32, not torch.int64"):
        package_input(X, "ids", [2, 3, 4], 4, 0)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(3, 4)


def test_why_a_size_cannot_vary_is_said() -> None:
    sizes = ({1: torch.export.Dim("n")},)
    said = r"Constraints violated \(n\)!.* You marked n as dynamic but your code specialized it"
    with pytest.raises(CaptureError, match=said):
        rewriter.export(Fixed().eval(), [], X, dynamic_shapes=sizes)
