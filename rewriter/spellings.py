"""The one table of spellings: which modules and operations are which kind of site."""

from __future__ import annotations

import inspect
import pathlib
import re
import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter.layer import Layer
from rewriter.modules.pointwise import Channels, Pointwise, inner

__all__ = [
    "ACTIVATION",
    "ADDITIONS",
    "AFTER_SUM",
    "CONV",
    "CONVOLUTIONS",
    "EMBEDDING",
    "ELEMENTWISE",
    "LINEAR",
    "MIXING",
    "MLP",
    "PAIRWISE",
    "PRODUCTS",
    "RECURRENT",
    "Kind",
    "activation_name",
    "added_to",
    "adapter_part",
    "autocast_at",
    "called_activation",
    "changes_input",
    "channels_of",
    "convolution",
    "is_activation",
    "is_adapter",
    "is_added",
    "is_leaf",
    "is_transparent",
    "is_view",
    "keeps_places",
    "kind_name",
    "kind_of",
    "mutates",
    "op_name",
    "operands",
    "settled_activation",
    "spelled",
    "source_of",
    "swaps",
    "user_line",
    "weight_handler",
    "works_in_place",
]

LINEAR = "linear"
CONV = "conv"
ACTIVATION = "activation"
MLP = "mlp"
EMBEDDING = "embedding"

Kind = str | type[Layer]
"""One of the five names above, or the class of a layer of ours."""

# Modules are told by their forward: a subclass with a forward of its own is not the layer it
# descends from. Classes of other packages are told by name, so that they need not be imported.

_ACTIVATION_CLASSES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.LogSigmoid,
)  # fmt: skip
_CONV_CLASSES: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_OTHER_LEAVES: tuple[type[nn.Module], ...] = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d,
    nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.Dropout,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_KIND_OF_FORWARD: dict[Any, str | None] = {
    **{cls.forward: None for cls in _OTHER_LEAVES},
    **{cls.forward: ACTIVATION for cls in _ACTIVATION_CLASSES},
    **{cls.forward: CONV for cls in _CONV_CLASSES},
    nn.Linear.forward: LINEAR,
    nn.Embedding.forward: EMBEDDING,
}
_TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"
_FOREIGN_ACTIVATIONS = "transformers.activations."
_ADAPTERS = frozenset({"BaseTunerLayer", "AuxiliaryTrainingWrapper"})
"""Of PEFT: what stands around an adapted layer."""
_ADAPTED = frozenset({"base_layer", "original_module"})
"""Under which names it holds the layer that it adapts; all else in it is the adapter's own."""

_PARAMETERS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("input", "mat1", "mat2"),
    "mm": ("input", "mat2"),
    "matmul": ("input", "other"),
}
"""Operations that are linear maps: the names of their parameters, in order."""
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OPERANDS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "input"),
    "mm": ("input", "mat2", ""),
    "matmul": ("input", "other", ""),
}
"""Which of them are (x, weight, bias)."""
_ACTIVATION_OPS = frozenset({
    "relu", "relu6", "gelu", "silu", "mish", "elu", "celu", "selu", "leaky_relu", "hardswish",
    "hardsigmoid", "hardtanh", "softplus", "tanh", "sigmoid", "logsigmoid", "log_sigmoid",
})  # fmt: skip
_TRANSPOSES = frozenset({"t", "numpy_T", "T", "mT", "transpose", "swapaxes", "swapdims", "permute"})
_VIEWS = frozenset({
    "view", "reshape", "_unsafe_view", "contiguous", "getitem", "chunk", "split", "slice", "narrow",
    "split_with_sizes", "flatten", "unflatten", "squeeze", "unsqueeze", "select", "unbind",
    "transpose", "permute", "t", "detach", "expand", "view_as", "T", "mT", "numpy_T",
})  # fmt: skip
"""Ops whose result may be part of their input's memory."""
_TRANSPARENT = _VIEWS | {
    "to", "type_as", "clone", "float", "half", "bfloat16", "_to_copy",
    "dropout", "dropout_", "dropout1d", "dropout2d",
}  # fmt: skip
"""Ops between the two linears of an MLP that only move or select values."""
_SAME_OP = {
    "truediv": "div", "__and__": "and", "and_": "and", "neg_": "neg", "numpy_T": "t",
    "__matmul__": "matmul",
}  # fmt: skip

_SPELLED = {
    **{f"conv{d}": "conv" for d in ("1d", "2d", "3d")},
    **{f"conv_transpose{d}": "conv_transpose" for d in ("1d", "2d", "3d")},
    **{f"batch_norm{d}": "batch_norm" for d in ("1d", "2d", "3d")},
    "re_lu": "relu", "re_lu6": "relu6", "si_lu": "silu", "leaky_re_lu": "leaky_relu",
    "gelu_activation": "gelu", "si_lu_activation": "silu", "mish_activation": "mish",
}  # fmt: skip
"""Names of modules and functions → the one name of the operation."""

ADDITIONS = frozenset({"add", "iadd", "__add__", "__iadd__", "__radd__"})
AFTER_SUM = frozenset({
    "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "dropout",
})  # fmt: skip
"""What may follow the sum x + f(x) inside a residual block, and goes with it."""
ELEMENTWISE = frozenset({
    "dropout", "clone", "to", "float", "half", "bfloat16", "type_as", "contiguous", "detach",
    "neg", "abs", "square", "pow", "clamp", "exp",
})  # fmt: skip
"""Ops on every entry of a tensor alone."""
PAIRWISE = frozenset({
    "mul", "add", "sub", "div", "iadd", "imul", "__mul__", "__add__", "__rmul__", "__radd__",
})  # fmt: skip
"""Ops on two tensors, entry by entry."""
MIXING = frozenset({"layer_norm", "rms_norm", "group_norm", "instance_norm", "softmax"})
"""Ops that read all entries of a row for each of the result."""
RECURRENT = frozenset({
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell",
})  # fmt: skip
"""Layers whose steps each need the one before, and their steps."""
CONVOLUTIONS = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "convolution",
})  # fmt: skip
PRODUCTS = RECURRENT | CONVOLUTIONS | {
    "linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "mv", "dot",
    "bilinear", "tensordot", "inner", "linalg_multi_dot", "chain_matmul", "_grouped_mm",
    "grouped_mm", "multi_head_attention_forward",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
}  # fmt: skip
"""Ops that multiply by a weight."""


def is_leaf(module: nn.Module | None) -> bool:
    """Whether one call of `module` is one node of a graph: a layer with one tensor in, one out."""
    if module is None or "forward" in vars(module):
        return False
    if isinstance(module, Pointwise):
        return is_leaf(module.linear)
    if isinstance(module, Layer) or type(module).forward in _KIND_OF_FORWARD:
        return True
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return name == _TRANSPOSED_LINEAR or name.startswith(_FOREIGN_ACTIVATIONS)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of site a leaf module is; None for those that no pass looks at."""
    module = inner(module)
    if isinstance(module, Layer):
        return ACTIVATION if module.acts else type(module)
    if type(module).forward in _KIND_OF_FORWARD:
        return _KIND_OF_FORWARD[type(module).forward]
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return LINEAR if name == _TRANSPOSED_LINEAR else ACTIVATION


def kind_name(kind: Kind) -> str:
    """The kind of a site as people read it: `linear`, or the op of one of our layers."""
    return kind if isinstance(kind, str) else kind.op or kind.__name__


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is PEFT's, around a layer that it adapts."""
    own = (c for c in type(module).__mro__ if c.__module__.startswith("peft."))
    return any(c.__name__ in _ADAPTERS for c in own)


def adapter_part(root: nn.Module, fqn: str) -> str:
    """Of which part of an adapter a name is, e.g. `lora_A`; "" where it is of none."""
    holder, parts = root, fqn.split(".")
    for part in parts:
        if is_adapter(holder) and part not in _ADAPTED:
            return part
        child = holder._modules.get(part)
        if child is None:
            return ""
        holder = child
    return ""


def op_name(node: Node, root: nn.Module | None = None) -> str:
    """One name for an operation, whichever front end spelled it."""
    target: Any = node.target
    if node.op == "call_module":
        module = None if root is None else root.get_submodule(target)
        if isinstance(module, Pointwise):
            return f"pointwise_{_class_name(module.linear)}"
        return _class_name(module)
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    if node.op == "call_method":
        name = target
    elif isinstance(target, torch._ops.OpOverload):
        name = target._opname
    elif target is getattr:
        name = str(node.args[1])
    else:
        name = getattr(target, "__name__", str(target))
    return str(_SAME_OP.get(name, name))


def _class_name(module: nn.Module | None) -> str:
    """The operation that a module is: that of a layer of ours, else its class in snake case."""
    if isinstance(module, Layer) and module.op:
        return module.operation
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(module).__name__)
    return "linear" if name == "Conv1D" else name.lower()


def spelled(node: Node, root: nn.Module | None = None) -> str:
    """The operation of a node whichever front end, module or function wrote it: `conv` of every
    convolution, `relu` of a module, a function and its form that works in place. What patterns of
    `rewriter.modules.patterns` are made of. `module` of one that computes something of its own,
    whatever it is called: PEFT's adapted layer is a `Linear` too."""
    if node.op == "call_module" and root is not None:
        if not is_leaf(root.get_submodule(str(node.target))):
            return "module"
    name = op_name(node, root).rstrip("_")
    return _SPELLED.get(name, name)


def operation_of(module: nn.Module) -> str:
    """`spelled` of a call of a module."""
    name = _class_name(module).rstrip("_")
    return _SPELLED.get(name, name)


def activation_name(node: Node, root: nn.Module) -> str | None:
    """An activation with its options settled: `gelu` (exact), `gelu_tanh`, `relu6` of a hardtanh
    from 0 to 6; None of one that has other options."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return settled_activation(spelled(node, root), module, node)


def settled_activation(name: str, module: nn.Module | None, node: Node | None) -> str | None:
    """`activation_name` of an operation by its module, or of a function by its call."""
    if name in ("relu", "relu6", "silu", "hardswish", "tanh", "sigmoid"):
        return name
    if name == "hardtanh":
        bounds = _options(node, module, ("min_val", "max_val"))
        return "relu6" if bounds == [0.0, 6.0] else None
    if name == "gelu":
        if module is not None and not hasattr(module, "approximate"):  # transformers' own class
            return "gelu" if getattr(module, "act", None) is nn.functional.gelu else None
        (approximate,) = _options(node, module, ("approximate",))
        return {None: "gelu", "none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return None


def _options(node: Node | None, module: nn.Module | None, names: tuple[str, ...]) -> list[Any]:
    """What a call of a module or a function is given beside its input; None for what is not."""
    if module is not None:
        return [getattr(module, name, None) for name in names]
    assert node is not None, "a function is called by a node"
    given = dict(zip(names, node.args[1:], strict=False))
    return [given.get(name, node.kwargs.get(name)) for name in names]


def operands(node: Node) -> tuple[Any, Any, Any] | None:
    """(x, weight, bias) of a call of a linear function; None for any other node.

    A scaled sum (`addmm` with `alpha` or `beta`) is not a linear layer.
    """
    name = op_name(node)
    if node.op not in ("call_function", "call_method") or name not in _PARAMETERS:
        return None
    given = dict(zip(_PARAMETERS[name], node.args, strict=False))
    for key, value in node.kwargs.items():
        if key in _PARAMETERS[name]:
            given[key] = value
        elif not (key in ("alpha", "beta") and value == 1):
            return None
    x, weight, bias = (given.get(role) for role in _OPERANDS[name])
    return x, weight, bias


def convolution(node: Node) -> tuple[Any, Any, Any, tuple[Any, Any, Any]] | None:
    """(x, weight, bias, (stride, padding, groups)) of a call of a convolution function; None for
    any other node."""
    if node.op != "call_function" or op_name(node) not in _CONVOLUTIONS:
        return None
    given = {**dict(zip(_CONVOLUTION, node.args, strict=False)), **node.kwargs}
    options = given.get("stride", 1), given.get("padding", 0), given.get("groups", 1)
    return given.get("input"), given.get("weight"), given.get("bias"), options


def channels_of(module: nn.Module) -> Channels | None:
    """How a 1×1 convolution, or what stands in its place, reads its input; None of others."""
    if isinstance(module, Pointwise):
        return module.channels
    if not is_leaf(module) or kind_of(module) != CONV:
        return None
    conv: Any = module
    if not isinstance(conv.weight, nn.Parameter):  # computed in a hook
        return None
    return Channels.of(conv.weight, conv.stride, conv.padding, conv.groups, conv.transposed)


def is_added(bias: Node) -> bool:
    """Whether what a linear function is given as its bias is a vector that the model makes on the
    fly, which may as well be added to the result: `torch.cat((q_bias, zeros, v_bias))`."""
    value = bias.meta.get("val")
    return bias.op.startswith("call_") and isinstance(value, Tensor) and value.dim() == 1


def weight_handler(module: nn.Module, name: str) -> str:
    """What a module's class does with a parameter besides its forward: the method by which it
    merges or moves it (`train` of loralib's layers); "" where its methods are torch's own."""
    cls = type(module)
    for method in _LIFE:
        for owner in cls.__mro__:
            if owner.__module__.startswith("torch."):
                break
            if method in vars(owner):
                if _names(cls, vars(owner)[method], name, set()):
                    return f"{cls.__name__}.{method}"
                break
    return ""


_LIFE = ("train", "eval", "_apply", "to", "half", "float", "double", "bfloat16", "requires_grad_")
"""Methods that clients call on a model in whatever state."""


def _names(cls: type, method: Any, name: str, seen: set[str]) -> bool:
    """Whether the code of a method, or of others of the class that it calls, names an attribute."""
    code = getattr(inspect.unwrap(method), "__code__", None)
    if code is None:
        return False
    codes = [code, *(c for c in code.co_consts if isinstance(c, types.CodeType))]
    named = {n for c in codes for n in c.co_names} - seen
    seen |= named
    own = [getattr(cls, n) for n in named if inspect.isfunction(_vars_of(cls).get(n))]
    return name in named or any(_names(cls, m, name, seen) for m in own)


def _vars_of(cls: type) -> dict[str, Any]:
    """What a class and its bases outside of torch define."""
    bases = [c for c in reversed(cls.__mro__) if not c.__module__.startswith("torch.")]
    return {k: v for c in bases for k, v in vars(c).items()}


def swaps(node: Node) -> bool | None:
    """Whether a node swaps the two dimensions of a matrix; None where it does something else."""
    name = op_name(node)
    if node.op not in ("call_function", "call_method") or name not in _TRANSPOSES:
        return None
    if name in ("t", "T", "mT"):
        return True
    dims: list[Any] = []
    for argument in [*node.args[1:], *node.kwargs.values()]:
        dims += argument if isinstance(argument, list | tuple) else [argument]
    if len(dims) != 2 or not all(isinstance(d, int) for d in dims):
        return None
    first, second = dims[0] % 2, dims[1] % 2
    return (first, second) == (1, 0) if name == "permute" else first != second


def is_activation(node: Node) -> bool:
    """Whether a node calls an activation as a function, in place or not."""
    called = node.op in ("call_function", "call_method")
    return called and op_name(node).rstrip("_") in _ACTIVATION_OPS


def called_activation(node: Node, owner: nn.Module) -> str:
    """The activation that a node calls, as a function or as a module; "" where it calls none."""
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        return spelled(node, owner) if is_leaf(module) and kind_of(module) == ACTIVATION else ""
    return spelled(node) if is_activation(node) else ""


def is_view(node: Node, owner: nn.Module) -> bool:
    """Whether a node's result may be part of its input's memory."""
    return op_name(node, owner) in _VIEWS


def is_transparent(node: Node, owner: nn.Module) -> bool:
    """Whether a node only moves, selects, casts or drops values."""
    return op_name(node, owner) in _TRANSPARENT


def keeps_places(node: Node, owner: nn.Module) -> bool:
    """Whether a node only moves, casts, drops or multiplies values, and transposes none."""
    name = op_name(node, owner)
    return name in ("mul", "mul_") or (name in _TRANSPARENT and name not in _TRANSPOSES)


def changes_input(node: Node, owner: nn.Module) -> bool:
    """Whether a call works in place on a tensor that other code sees, so that a layer with a
    result of its own cannot take its place."""
    if not works_in_place(node, owner):
        return False
    source: Any = node.args[0] if node.args else node.kwargs.get("input")
    while isinstance(source, Node):
        if source.op in ("placeholder", "get_attr") or len(source.users) > 1:
            return True
        if not works_in_place(source, owner) and op_name(source, owner) not in _VIEWS:
            return False
        source = source.args[0] if source.args else None
    return False


def works_in_place(node: Node, owner: nn.Module) -> bool:
    """Whether a call writes into the tensor that it is given."""
    if node.op == "call_module":
        return bool(getattr(owner.get_submodule(str(node.target)), "inplace", False))
    name = op_name(node)
    return (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))


def mutates(node: Node) -> bool:
    """Whether a node is an overload of an op that by its schema writes into what it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


_HERE = pathlib.Path(__file__).parent
_LAYER_FILES = (("transformers", "pytorch_utils.py"), ("transformers", "activations.py"))
"""Where the layers that are told by name are written: not the user's line."""


def user_line(node: Node) -> str:
    """`file:line` of the innermost frame outside torch that made this node, or ""."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    for file, line in reversed(frames):
        path = pathlib.PurePath(file).parts
        if "torch" in path and "site-packages" in path:
            continue
        if _HERE in pathlib.Path(file).parents or path[-2:] in _LAYER_FILES:
            continue
        if "site-packages" in path:
            return f"{'/'.join(path[path.index('site-packages') + 1 :])}:{line}"
        return f"{path[-1]}:{line}"
    return ""


def source_of(node: Node) -> Any:
    """The activations that go into a node: its first operand, whatever it is called."""
    given = operands(node)
    if given is not None:
        return given[0]
    return node.args[0] if node.args else node.kwargs.get("input")


def added_to(node: Node, value: Node, owner: nn.Module) -> Node | None:
    """What a node adds to a value, where it is the sum of two; None where it is no such sum, scales
    one of them, or writes into the other."""
    if spelled(node, owner) != "add" or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = node.args
    if value not in (first, second) or (first is not value and works_in_place(node, owner)):
        return None
    other = second if first is value else first
    if not isinstance(other, Node) or other is value:
        return None
    known = other.meta.get("val")  # a pickled graph has lost it
    return other if known is None or isinstance(known, Tensor) else None


def autocast_at(node: Node) -> AbstractContextManager[object]:
    """The autocast region of the user's forward that a node lies in."""
    entered: list[Node] = []
    for other in node.graph.nodes:
        if other is node:
            break
        name = getattr(other.target, "__name__", "")
        if name == "_enter_autocast":
            entered.append(other)
        elif name == "_exit_autocast":
            entered.remove(other.args[0])
    if not entered:
        return nullcontext()
    device, dtype, enabled, cache = entered[-1].args
    return torch.autocast(str(device), dtype=dtype, enabled=bool(enabled), cache_enabled=cache)  # type: ignore[arg-type]
