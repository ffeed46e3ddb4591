"""The joint graph of a captured model, traced on fake tensors, and what runs a plan of it.

`Traced` holds for the sizes that the trace left open, and for what it took for granted about the
model (`assumed`); `Traced.serves` says whether a call is one of these.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import (
    aot_compile_joint_with_descriptors,
    aot_export_joint_with_descriptors,
)
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.graph import _BoxedCodeGen
from torch.utils._python_dispatch import _disable_current_modes

from rewriter.capture.hosted import Program
from rewriter.errors import OptionError, RewriteError
from rewriter.modules.quiet import TRACING
from rewriter.modules.running import first_line
from rewriter.planner.apply.assumed import weights
from rewriter.planner.apply.backward import watch
from rewriter.planner.apply.unused import Uses, uses
from rewriter.planner.joint.dropout import as_eager_rounds

__all__ = ["Traced", "trace"]

_log = logging.getLogger(__name__)

Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


class _Flat(nn.Module):
    """A program over its module tree, from flat inputs to flat results."""

    def __init__(self, root: nn.Module, program: Program) -> None:
        super().__init__()
        self.root = root
        self.program = program

    def forward(self, *leaves: Tensor) -> Any:
        return tuple(self.program.traced(self.root, leaves))


class Traced:
    """What a partition of a joint graph gave: a function that runs forward and backward.

    Args:
        run: takes parameters, buffers and inputs.
        names: of the parameters and buffers, in order.
        shapes: the environment of the sizes, and the sizes' symbols.
        unused: which results' gradients each gradient needs; None where there is no backward.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        names: list[str],
        env: ShapeEnv,
        symbols: list[Any],
        unused: Uses | None,
    ) -> None:
        self.run, self.names, self.env, self.symbols = run, names, env, symbols
        self.unused = unused
        sizes = [s for row in symbols for s in row if isinstance(s, torch.SymInt)]
        self.guards = env.produce_guards_expression(sizes) if sizes else None
        self.fixed = [tuple(None if isinstance(s, torch.SymInt) else s for s in r) for r in symbols]
        self.checked: dict[tuple[tuple[int, ...], ...], bool] = {}

    def serves(self, leaves: Sequence[Tensor]) -> bool:
        """Whether these sizes are among those that the trace holds for."""
        shapes = tuple(tuple(t.shape) for t in leaves)
        if shapes not in self.checked:
            self.checked[shapes] = self._check(shapes)
        return self.checked[shapes]

    def _check(self, shapes: tuple[tuple[int, ...], ...]) -> bool:
        sizes: list[int] = []
        for row, fixed in zip(shapes, self.fixed, strict=True):
            for size, own in zip(row, fixed, strict=True):
                if own is None:
                    sizes.append(size)
                elif own != size:
                    return False
        if self.guards is None:
            return True
        return bool(self.env.evaluate_guards_expression(self.guards, sizes))

    def __call__(self, root: nn.Module, leaves: Sequence[Tensor]) -> Any:
        held = {name: _held(root, name) for name in self.names}
        results = self.run(*held.values(), *leaves)
        if self.unused is not None:
            self.unused.attach(results, held, leaves)
            watch(results)
        return results


def _held(root: nn.Module, name: str) -> Any:
    owner, _, own = name.rpartition(".")
    module = root.get_submodule(owner)
    for table in (module._parameters, module._buffers, vars(module)):
        if own in table:
            return table[own]
    raise AttributeError(f"{name} is gone")


def trace(
    root: nn.Module,
    program: Program,
    leaves: Sequence[Tensor],
    rows: Sequence[Sequence[int | str]],
    partition: Partition,
) -> Traced:
    """Traces forward and backward, and cuts them by `partition`. Nothing is computed.

    Args:
        root: the hosted model, in train mode.
        program: its train graph.
        leaves: inputs like those that it will be called with.
        rows: for each, its sizes; a name where one is open.
        partition: a `partition_fn`.

    Raises:
        OptionError: what `partition` raises, and where there is no trace.
    """
    _refuse(program)
    _ordinary(root, program, leaves)
    try:
        with TRACING:
            return _traced(root, program, leaves, rows, partition)
    except RewriteError as error:
        refusal = error
    except Exception as error:
        _log.info("memory_budget: no trace of the training step", exc_info=error)
        refusal = OptionError(
            "memory_budget: the training step of this model cannot be traced: "
            f"{type(error).__name__}: {first_line(error)}. Leave memory_budget out for it"
        )
    # its traceback, or what it came of, would be pages of PyTorch's
    raise refusal.with_traceback(None) from None


_RECURRENT = ("gru", "rnn_tanh", "rnn_relu")


def _refuse(program: Program) -> None:
    """Refuses recurrent layers that PyTorch traces into something else.

    Raises:
        OptionError: the trace would not have their backward, or their dropout.
    """
    for node in program.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        name = getattr(packet, "__name__", "") if node.op == "call_function" else ""
        why = ""
        if name == "lstm":
            why = "an LSTM as the kernel for inference, which has no backward"
        elif name in _RECURRENT:
            number, dropout, training = node.args[4:7]
            if number > 1 and dropout and training:
                why = f"a {name} of {number} layers without the dropout between them"
        if why:
            raise OptionError(
                f"memory_budget: PyTorch traces {why}, so the training step of this model cannot "
                f"be planned ({node.name}): leave memory_budget out for it"
            )


def _ordinary(root: nn.Module, program: Program, leaves: Sequence[Tensor]) -> None:
    """Refuses tensors that compute in a way of their own.

    Raises:
        OptionError: a weight or an input is of a subclass of Tensor.
    """
    given = weights(root, program) | {f"input {i}": leaf for i, leaf in enumerate(leaves)}
    for name, tensor in given.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise OptionError(
                f"memory_budget: {name} is a {type(tensor).__name__}, a subclass of Tensor, of "
                "which no training step can be planned: leave memory_budget out for it"
            )


@_disable_current_modes()  # who counts the operations of a step must not see those of a trace
def _traced(
    root: nn.Module,
    program: Program,
    leaves: Sequence[Tensor],
    rows: Sequence[Sequence[int | str]],
    partition: Partition,
) -> Traced:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    fakes = [_fake(mode, t, row, i) for i, (t, row) in enumerate(zip(leaves, rows, strict=True))]
    flat = _Flat(_twin(root, program, mode), program)
    unused: list[Uses] = []

    def part(module: fx.GraphModule, inputs: Sequence[object], **rest: Any) -> Any:
        unused.append(uses(module))
        as_eager_rounds(module)
        return partition(module, inputs, **rest)

    # what a user calls backward outside of runs without autocast
    settings = torch._functorch.config.patch(backward_pass_autocast="off")
    with contextlib.ExitStack() as stack, torch.enable_grad(), settings:
        stack.enter_context(mode)
        joint = aot_export_joint_with_descriptors(stack, flat, tuple(fakes))
        run = aot_compile_joint_with_descriptors(
            joint, partition_fn=part, fw_compiler=_plain, bw_compiler=_backward
        )
    names = [n.removeprefix("root.") for n in (*joint.params_spec, *joint.buffers_spec)]
    return Traced(run, names, env, [list(f.shape) for f in fakes], next(iter(unused), None))


def _twin(root: nn.Module, program: Program, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model around fakes of its tensors, all of which are parameters or buffers."""
    held = weights(root, program)
    memo: dict[int, Any] = {}
    for tensor in held.values():
        memo[id(tensor)] = _weight(mode, tensor).requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(memo[id(tensor)], tensor.requires_grad)
    twin = copy.deepcopy(root, memo)
    for own, copied in zip(root.modules(), twin.modules(), strict=True):
        copied.training = own.training
    for name in held:
        owner, _, attribute = name.rpartition(".")
        holder = twin.get_submodule(owner)
        if attribute in vars(holder):
            holder.register_buffer(attribute, vars(holder).pop(attribute))
    return twin


def _weight(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return mode.from_tensor(tensor.detach(), static_shapes=True)
    with mode:  # a graph of operations on meta tensors would lack derivatives
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _fake(mode: FakeTensorMode, tensor: Tensor, row: Sequence[int | str], number: int) -> Tensor:
    kinds = [DimDynamic.STATIC if isinstance(s, int) else DimDynamic.DYNAMIC for s in row]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
    given = torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor
    return mode.from_tensor(
        given, symbolic_context=context, source=ConstantSource(f"input_{number}")
    )


def _backward(gm: fx.GraphModule, example_inputs: object) -> Callable[[list[Any]], Any]:
    """`_plain`, which writes over nothing that was saved: so that a graph can be retained."""
    metadata = TracingContext.get().fw_metadata
    assert metadata is not None
    metadata.bw_donated_idxs = []
    return _plain(gm, example_inputs)


def _plain(gm: fx.GraphModule, example_inputs: object) -> Callable[[list[Any]], Any]:
    """Runs a graph as Python code that lets go of every value after its last use, its inputs
    included.

    A view is a reshape there: kernels lay some results out otherwise than their fakes do (batch
    norm's backward), and what is a view of the fake may need a copy.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()
    forward = gm.forward

    def run(arguments: list[Any]) -> Any:
        return forward(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
