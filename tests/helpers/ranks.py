"""What two processes do under DDP and FSDP2, with gloo.

A module of its own, since processes that start anew import it by name: a test file has none under
pytest's importlib mode.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import socket
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from closeness import assert_reordered, sqnr
from torch import Tensor, nn

from rewriter import Pass, load, rewrite
from rewriter.passes import Monarch, MonarchChain, Quadratic, Quantize, TopK

RECIPES: dict[str, list[Pass]] = {
    "monarch": [Monarch(nblocks=2)],
    "chain": [MonarchChain()],
    "int8": [Quantize("int8-dynamic")],
    "int8 monarch": [Monarch(nblocks=2), Quantize("int8-dynamic")],
    "quadratic": [Quadratic()],
    "topk": [TopK(4)],
}
Values = dict[str, Tensor]


def original() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 8))


def rewritten(recipe: str) -> nn.Module:
    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    return rewrite(original(), RECIPES[recipe], rows).train()


def rows() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(5))


def stepped(model: nn.Module, x: Tensor) -> Values:
    """All tensors after one step, whole."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).float().square().mean().backward()
    optimizer.step()
    found = {n.removeprefix("module."): t.detach() for n, t in model.state_dict().items()}
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in found.items()}


Check = Callable[[int, str, pathlib.Path], None]


def on_two_ranks(checks: Sequence[Check], path: pathlib.Path) -> None:
    """All of them in the same two processes, as these import torch anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, checks, path), nprocs=2)


def _rank(rank: int, port: int, checks: Sequence[Check], path: pathlib.Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for check, recipe in itertools.product(checks, RECIPES):
            check(rank, recipe, path)
    finally:
        dist.destroy_process_group()


def same(got: Values, want: Values, recipe: str) -> None:
    assert got.keys() == want.keys(), recipe
    for name, tensor in want.items():
        if tensor.is_floating_point():
            assert_reordered(got[name], tensor)
        else:
            assert torch.equal(got[name], tensor), (recipe, name)


def ddp(rank: int, recipe: str, path: pathlib.Path) -> None:
    got = stepped(nn.parallel.DistributedDataParallel(rewritten(recipe)), rows()[rank::2])
    same(got, stepped(rewritten(recipe), rows()), recipe)


def fsdp(rank: int, recipe: str, path: pathlib.Path) -> None:
    from torch.distributed.fsdp import fully_shard

    for each in (False, True):
        model, where = rewritten(recipe), path / f"{recipe} {each}"
        for layer in (model[0], model[2]) if each else ():
            fully_shard(layer)
        fully_shard(model)
        got = stepped(model, rows()[rank::2])
        same(got, stepped(rewritten(recipe), rows()), recipe)
        model.save(where)
        again = load(where, original())
        assert {n: type(m) for n, m in again.named_modules() if n} == {
            n: type(m) for n, m in rewritten(recipe).named_modules() if n
        }
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, got[name]), (recipe, name)


def fsdp_in_bfloat16(rank: int, recipe: str, path: pathlib.Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = rewritten(recipe)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    got, want = stepped(model, rows()[rank::2]), stepped(rewritten(recipe), rows())
    moved = [n for n, t in want.items() if not torch.equal(t, before[n])]
    assert moved
    for name in moved:
        assert got[name].dtype == torch.float32
        assert sqnr(got[name] - before[name], want[name] - before[name]) > 20, (recipe, name)
