"""The options of torch's convolutions, for the layers that stand for one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from rewriter.errors import OptionError

__all__ = ["ConvOptions", "Sizes"]

Sizes = int | Sequence[int]


class ConvOptions:
    """What layers in the place of an `nn.Conv1d` or `nn.Conv2d` have in common: its options under
    its names, and a range of the activations to round them by."""

    _reversed_padding_repeated_twice: Any

    @classmethod
    def _of(cls, conv: nn.Conv1d | nn.Conv2d, activation: str, **more: Any) -> Any:
        """A layer without memory that has a convolution's options.

        Args:
            more: further arguments of the constructor.
        """
        names = "in_channels out_channels kernel_size stride padding dilation groups".split()
        options = {name: getattr(conv, name) for name in names}
        bias = conv.bias is not None
        made: Any = cls
        return made(**options, bias=bias, activation=activation, **more, device="meta")

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """Around what gives torch's class the options, which checks them.

        Raises:
            OptionError: it refuses one.
        """
        try:
            yield
        except ValueError as error:
            raise OptionError(f"{type(self).__name__}: {error}") from error

    def _around(self) -> list[tuple[int, int]]:
        """Zeros before and behind, of each dimension."""
        sides = self._reversed_padding_repeated_twice
        return [(sides[i], sides[i + 1]) for i in range(len(sides) - 2, -1, -2)]
