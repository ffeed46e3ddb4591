"""What `rewrite` returns: the model's own class, with its ledger and its storage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from rewriter.capture.hosted import Hosted, State, offer_on_root
from rewriter.report import Report
from rewriter.store.original import load_original
from rewriter.store.pretrained import AROUND
from rewriter.store.writing import save

if TYPE_CHECKING:
    from rewriter.planner import MemoryPlan

__all__ = ["RewrittenModule"]

_FOR_ORIGINALS = (
    "\n\tThis model was rewritten: a state_dict of the original model goes through the same "
    "rewrite by load_original(state_dict)"
)


@offer_on_root
class RewrittenModule(Hosted):
    """What `rewrite` returns: the model's own class, and on top of it the ledger and storage."""

    around = AROUND

    @property
    def report(self) -> Report:
        """The ledger: cost before and after every pass, every decision with its reason."""
        return cast(Report, self.__dict__["_rewriter"].report)

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What training steps keep, and why; None without a `memory_budget`."""
        memory = cast(State, self.__dict__["_rewriter"]).memory
        return None if memory is None else cast("MemoryPlan | None", memory.plan)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes safetensors and one JSON recipe; see `rewriter.save`."""
        save(self, directory)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model's class; where the keys do not fit, the error names `load_original`."""
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            if str(error).startswith("Error(s) in loading state_dict"):
                error.args = (f"{error}{_FOR_ORIGINALS}",)
            raise

    def load_original(self, state_dict: Mapping[str, Tensor]) -> None:
        """Puts an original checkpoint through the same rewrite; see `rewriter.load_original`."""
        load_original(self, state_dict)
