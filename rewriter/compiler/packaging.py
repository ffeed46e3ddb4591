"""Ahead of time: a rewritten model as a `torch.export` program, compiled code, or ONNX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from rewriter.capture import arguments
from rewriter.compiler.linking import linked_in
from rewriter.errors import CaptureError, RewriteError
from rewriter.kernels import ops as kernel_ops
from rewriter.kernels.ops import Record
from rewriter.lowering.traces import lowered_in_traces
from rewriter.modules.generated import unwritable
from rewriter.modules.quiet import quietly
from rewriter.report import Report

__all__ = ["FORMATS", "Exported", "exported"]

FORMATS = ("pt2", "onnx")
"""What `rewriter.export` writes, each in a file of this suffix."""
_ONE_FILE = 2**31 - 2**20
"""Bytes of weights that fit ONNX's one file, a protobuf; larger ones lie in a file beside it."""


@dataclass(repr=False)
class Exported:
    """What `export` made.

    Args:
        program: runs anywhere with `program.module()`; `torch.export.save` writes it.
        report: the ledger of the rewrite.
        package: the file with the compiled code, or in ONNX; None where none was asked for.
        own_ops: ops with a record, ours and those of other packages, that the program calls, and
            how often.
        package_ops: those that the package does not hold, but looks up when it runs.
    """

    program: ExportedProgram
    report: Report
    package: Path | None = None
    own_ops: Mapping[str, int] = field(default_factory=dict)
    package_ops: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        ops = self.own_ops if self.package is None else self.package_ops
        needs = f"calls {sum(ops.values())} own ops, see needs" if ops else "needs torch alone"
        what = "a program" if self.package is None else str(self.package)
        return f"<Exported {self.report.model}: {what}, {needs}>"

    @property
    def stands_alone(self) -> bool:
        """Whether the program loads and runs where only torch is installed."""
        return not self.own_ops

    @property
    def needs(self) -> str:
        """What has to be imported before it is loaded, in a sentence."""
        if self.package is None or self.package_ops == self.own_ops:
            return f"it {_needs(self.own_ops)}"
        return f"the package {_needs(self.package_ops)}; the program {_needs(self.own_ops)}"


def _needs(ops: Mapping[str, int]) -> str:
    """What must be there for code that calls these ops."""
    if not ops:
        return "loads and runs with torch alone"
    calls = ", ".join(f"{op} ({n} calls)" for op, n in ops.items())
    needed = sorted({_record(name).needs for name in ops})
    packages = " and ".join(sorted({m.partition(".")[0] for m in needed}))
    modules = ", ".join(f"import {m}" for m in needed)
    return f"calls {calls}: install {packages} and {modules} before loading"


def exported(
    ready: nn.Module,
    example_inputs: Any,
    path: Path | None,
    dynamic_shapes: Any,
    inductor: Mapping[str, Any] | None,
    standalone: bool,
    format: str,
) -> Exported:
    """A rewritten model in eval mode as a program and, with a path, as a file.

    Args:
        ready: the model.
        example_inputs, dynamic_shapes, inductor, standalone, format: as in `rewriter.export`.
        path: of the file; None for the program alone.

    Raises:
        CaptureError: the model cannot be exported.
        RewriteError: Inductor or ONNX cannot take the program.
    """
    report: Any = ready.report
    args, kwargs = arguments(example_inputs)
    if (name := unwritable(ready)) is not None:
        raise CaptureError(
            f"{type(ready).__name__} holds the name {name!r}, which torch.export would write into "
            "Python code as it is: rename it"
        )
    if format == "onnx" and dynamic_shapes is None:
        dynamic_shapes = tree_map(_open_sizes, kwargs or args)
    trace = functools.partial(_program, ready, args, kwargs, dynamic_shapes)
    program = trace()
    if standalone:
        with quietly():  # torch warns of its own copies
            program = program.run_decompositions(_written_out(_own_ops(program)))
    done = Exported(program, report, None, _own_ops(program))
    if path is not None and format == "onnx":
        done.package = _in_onnx(program, path)
        report.capture.notes.append(f"exported: {path.name} runs in ONNX Runtime alone")
        return done
    if path is not None:
        compiled = program
        if not standalone:
            with lowered_in_traces(ready) as lowered:
                compiled = trace() if lowered else program
        done.package, done.package_ops = _packaged(compiled, path, dict(inductor or {}))
    report.capture.notes.append(f"exported: {done.needs}")
    return done


def _program(model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    """
    Raises:
        CaptureError: the model cannot be exported.
    """
    with torch.no_grad():
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        except Exception as error:
            first, *more = str(error).strip().splitlines() or [""]
            reasons = [line.strip(" -") for line in more if line.strip().startswith("- ")]
            said = " ".join([first, *reasons])
            raise CaptureError(
                f"{type(model).__name__} cannot be exported whole ({type(error).__name__}: "
                f"{said}): use torch.compile(model, backend='rewriter')"
            ) from error


def _open_sizes(leaf: Any) -> Any:
    """Batch and length may vary, where the model lets them; of an image the batch alone."""
    if not isinstance(leaf, Tensor):
        return None
    return {d: torch.export.Dim.AUTO for d in range(1 if leaf.dim() > 3 else min(2, leaf.dim()))}


def _in_onnx(program: ExportedProgram, path: Path) -> Path:
    """The program in ONNX; what stands for our ops there, their records say."""
    weights = [*program.state_dict.values(), *program.constants.values()]
    size = sum(t.nbytes for t in weights if isinstance(t, Tensor))
    with quietly():  # of the exporter's own imports
        try:
            torch.onnx.export(
                program, (), str(path), dynamo=True, verbose=False, external_data=size > _ONE_FILE
            )
        except ImportError as error:
            raise RewriteError(f"ONNX needs onnx and onnxscript: {error}") from error
        except Exception as error:
            path.unlink(missing_ok=True)
            first = error
            while isinstance(first.__cause__, Exception):
                first = first.__cause__
            said = (str(first).strip().splitlines() or [""])[0]
            raise RewriteError(f"ONNX cannot express {path.name}: {said}") from error
    return path


def _written_out(ops: Mapping[str, int]) -> dict[Any, Callable[..., Any]]:
    """Ops with a record → the same functions in plain torch."""
    records = [(name, _record(name)) for name in ops]
    return {r.op.default: r.reference for name, r in records if name == r.name}


def _packaged(
    program: ExportedProgram, path: Path, config: dict[str, Any]
) -> tuple[Path, dict[str, int]]:
    """The file, and the ops with a record that it does not hold."""
    import torch._inductor

    from rewriter.lowering.inputs import inputs_checked  # which loads kernels

    with inputs_checked(program), quietly():  # of Inductor's own imports
        called = _own_ops(program)
        held, linked = linked_in(called)
        try:
            written = torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={**linked, **config}
            )
        except Exception as error:
            path.unlink(missing_ok=True)
            raise RewriteError(f"Inductor cannot compile {path.name}: {error}") from error
    return Path(written), {name: n for name, n in called.items() if name not in held}


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
