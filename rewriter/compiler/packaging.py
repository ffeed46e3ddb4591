"""Ahead of time: a rewritten model as a `torch.export` program and as compiled code in a file.

The module is not called `export`, as the package's function of that name would hide it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from rewriter.api import rewrite
from rewriter.base import Pass
from rewriter.capture import arguments
from rewriter.errors import CaptureError, OptionError, RewriteError
from rewriter.kernels import ops as kernel_ops
from rewriter.kernels.ops import Record
from rewriter.recipe.parse import parse_pass
from rewriter.report import Report

__all__ = ["Exported", "export"]


@dataclass
class Exported:
    """What `export` made.

    Args:
        program: runs anywhere with `program.module()`; `torch.export.save` writes it.
        report: the ledger of the rewrite.
        package: the file with the compiled code; None where none was asked for.
        own_ops: ops with a record, ours and those of other packages, that program and compiled
            code call, and how often.
    """

    program: ExportedProgram
    report: Report
    package: Path | None = None
    own_ops: Mapping[str, int] = field(default_factory=dict)

    @property
    def stands_alone(self) -> bool:
        """Whether it loads and runs where only torch is installed."""
        return not self.own_ops

    @property
    def needs(self) -> str:
        """What has to be imported before it is loaded, in a sentence."""
        if self.stands_alone:
            return "it loads and runs with torch alone"
        ops = ", ".join(f"{op} ({n} calls)" for op, n in self.own_ops.items())
        needed = sorted({_record(name).needs for name in self.own_ops})
        packages = " and ".join(sorted({m.partition(".")[0] for m in needed}))
        modules = ", ".join(f"import {m}" for m in needed)
        return f"it calls {ops}: install {packages} and {modules} before loading"


def export(
    model: nn.Module,
    passes: Sequence[Pass | str] = (),
    example_inputs: Any = None,
    *,
    package: str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
    inductor: Mapping[str, Any] | None = None,
    standalone: bool = False,
    **options: Any,
) -> Exported:
    """model → rewrite → `torch.export` program → AOTInductor package: eval mode, weights inside.

    Args:
        model: any module that `torch.export` takes whole; never changed.
        passes: as in `rewrite`, also as text.
        example_inputs: one real batch, as in `rewrite`; it is needed.
        package: where to write compiled code (`.pt2`), for `torch._inductor.aoti_load_package`.
        dynamic_shapes: as `torch.export.export` takes it; the sizes are those of the example where
            left out.
        inductor: options of Inductor's for the package.
        standalone: writes ops with a record out by their references in torch's own, so that
            program and package load and run where only torch is installed. Their tuned kernels
            are lost; 8-bit ops compute in float64 then: small files, but slow code.
        options: further ones of `rewrite`.

    Returns:
        The program, its ledger, and what it needs to run.

    Raises:
        CaptureError: there is no example, or the rewritten model cannot be exported.
        OptionError: an option is impossible.
    """
    if example_inputs is None:
        raise CaptureError("export needs example_inputs: one real batch of the model")
    path = None if package is None else Path(package)
    if path is not None and path.suffix != ".pt2":
        raise OptionError(f"package={str(path)!r}: the suffix must be .pt2")
    if path is not None and not path.parent.is_dir():
        raise OptionError(f"package={str(path)!r}: there is no directory {path.parent}")
    if isinstance(passes, str | Pass) or not isinstance(passes, Sequence):
        raise OptionError(f"passes must be a list of passes or of their texts, not {passes!r}")
    if inductor and path is None:
        raise OptionError("inductor= is for the package: give package='model.pt2' too")
    chosen = [parse_pass(p) if isinstance(p, str) else p for p in passes]
    ready = rewrite(model, chosen, example_inputs, **options).eval()
    report: Any = ready.report
    args, kwargs = arguments(example_inputs)
    with torch.no_grad():
        try:
            program = torch.export.export(ready, args, kwargs, dynamic_shapes=dynamic_shapes)
        except Exception as error:
            said = str(error).strip().splitlines()
            raise CaptureError(
                f"{type(model).__name__} cannot be exported whole ({type(error).__name__}: "
                f"{said[0] if said else ''}): use torch.compile(model, backend='rewriter')"
            ) from error
        if standalone:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own copies
                program = program.run_decompositions(_written_out(_own_ops(program)))
    done = Exported(program, report, None, _own_ops(program))
    if path is not None:
        done.package = _packaged(program, path, dict(inductor or {}))
    report.capture.notes.append(f"exported: {done.needs}")
    return done


def _written_out(ops: Mapping[str, int]) -> dict[Any, Callable[..., Any]]:
    """Ops with a record → the same functions in plain torch."""
    records = [(name, _record(name)) for name in ops]
    return {r.op.default: r.reference for name, r in records if name == r.name}


def _packaged(program: ExportedProgram, path: Path, config: dict[str, Any]) -> Path:
    import torch._inductor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Inductor's own imports
        try:
            written = torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=config
            )
        except Exception as error:
            path.unlink(missing_ok=True)
            raise RewriteError(f"Inductor cannot compile {path.name}: {error}") from error
    return Path(written)


def _record(name: str) -> Record:
    found = kernel_ops.find(name)
    assert found is not None
    return found


def _own_ops(program: ExportedProgram) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            name = kernel_ops.name_of(node.target)
            if kernel_ops.find(name) is not None:
                found[name] = found.get(name, 0) + 1
    return found
