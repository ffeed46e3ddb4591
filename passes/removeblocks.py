"""RemoveBlocks: whole residual blocks out of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.base import Pass, Phase, Skip
from rewriter.edits import BLOCK, Edit, Keep, Remove, View
from rewriter.errors import OptionError
from rewriter.sites import Kind

__all__ = ["RemoveBlocks"]


@dataclass(frozen=True)
class RemoveBlocks(Pass):
    """x + f(x) → x: the block's modules go, and its readers read what went into it.

    Type, device and shape of x and of the result are the same at all sizes that the graphs serve,
    or the block stays. Of a pre-norm block, x + f(norm(x)), the norm goes with f. A post-norm
    block, norm(x + f(x)), goes with its norm, as in layer dropping; an activation after the sum
    likewise. Where one selected block lies inside of another, the outer one goes. In the module
    tree an empty module stands at its name, so that all other names stay.

    Args:
        where: which blocks; a pattern of module names ("encoder.layer.[345]") or a predicate over
            sites of kind "block". It must be given.

    Source: Fan et al. 2020, "Reducing Transformer Depth on Demand with Structured Dropout"; Sajjad
    et al. 2023, "On the Effect of Dropping Layers of Pre-trained Transformer Models".
    """

    matches: ClassVar[tuple[Kind, ...]] = (BLOCK,)
    phase: ClassVar[Phase] = Phase.STRUCTURE

    def __post_init__(self) -> None:
        if self.where is None:
            raise OptionError('RemoveBlocks: say which blocks go, e.g. where="encoder.layer.[345]"')

    def plan(self, view: View) -> list[Edit]:
        edits: list[Edit] = []
        gone: tuple[str, ...] = ()
        for site in view.chosen:  # an outer module comes before those inside
            if site.fqn.startswith(gone or ("\0",)):
                continue
            block = view.block(site.fqn)
            if isinstance(block, Skip):
                edits.append(Keep(site, block.reason))
                continue
            after = " and its ".join(block.through)
            reason = "x + f(x) → x" + (f"; its {after} went with it" if after else "")
            edits.append(Remove(block, reason))
            gone += tuple(f"{name}." for name in block.names)
        return edits
