"""The columns that need a group of processes: data parallel, sharded, tensor parallel.

`outcomes()` starts two processes once, joined by gloo; each runs every cell in the same order.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from closeness import assert_reordered
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from interop.clients import assert_close, gradients, outputs
from interop.outcomes import STATUSES, Outcome, outcome
from interop.recipes import RECIPES, Recipe, Refused, net, random, ready

SIZE, SECONDS = 2, 1200


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (SIZE,))


def _whole(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in values.items()}


def _mean_gradients(model: nn.Module) -> dict[str, Tensor]:
    """What every rank has to end with: the mean over the ranks' batches."""
    parts = [gradients(copy.deepcopy(model), random(4, 16, seed=r)) for r in range(SIZE)]
    return {n: sum(p[n] for p in parts) / SIZE for n in parts[0]}


def data_parallel(recipe: Recipe) -> None:
    model = ready(recipe, net)
    want = _mean_gradients(model)
    got = gradients(DistributedDataParallel(model), random(4, 16, seed=dist.get_rank()))
    assert_close({n.removeprefix("module."): g for n, g in got.items()}, want)


def _sharded(recipe: Recipe, blocks: bool = True, **options: Any) -> nn.Module:
    """A shard of each block, if so wanted, and the rest at the root."""
    model = ready(recipe, net)
    for block in [*getattr(model, "layers", ()), model.head] if blocks else ():
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=_mesh(), **options)
    return fully_shard(model, mesh=_mesh(), **options)


def fully_sharded(recipe: Recipe) -> None:
    model, want = _sharded(recipe), _mean_gradients(ready(recipe, net))
    assert any(isinstance(p, DTensor) for p in model.parameters())
    got = gradients(model, random(4, 16, seed=dist.get_rank()))
    assert_close(_whole(got), want)


def mixed_precision(recipe: Recipe, blocks: bool = True) -> None:
    """bfloat16 in the products, float32 in the shards and their gradients."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = _sharded(recipe, blocks, mp_policy=policy)
    low = ready(recipe, net).to(torch.bfloat16)
    parts = [gradients(copy.deepcopy(low), random(4, 16, seed=r).bfloat16()) for r in range(SIZE)]
    got = _whole(gradients(model, random(4, 16, seed=dist.get_rank())))
    assert set(got) == set(parts[0])
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        want = sum(p[name].float() for p in parts) / SIZE
        assert_reordered(gradient, want, torch.bfloat16)


def sharded_save(recipe: Recipe) -> None:
    from rewriter import load

    model, x = _sharded(recipe), random(4, 16)
    want = outputs(ready(recipe, net), x)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    model.save(folder[0])
    dist.barrier()
    assert_close(outputs(load(folder[0], net()), x), want)


def tensor_parallel(recipe: Recipe) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model, x = ready(recipe, net), random(4, 16)
    want = outputs(model, x)
    plan = {
        name: style()
        for name, _ in model.named_modules()
        for suffix, style in ((".up", ColwiseParallel), (".down", RowwiseParallel))
        if name.endswith(suffix)
    }
    try:
        parallelize_module(model, _mesh(), plan)
    except NotImplementedError as error:  # torch's own reason
        raise Refused(str(error)) from error
    assert any(isinstance(t, DTensor) for t in model.state_dict().values())
    assert_close(outputs(model, x), want)


CLIENTS: Mapping[str, Callable[[Recipe], None]] = {
    "`DistributedDataParallel`": data_parallel,
    "FSDP2 (`fully_shard`)": fully_sharded,
    "FSDP2 in bfloat16": mixed_precision,
    "FSDP2 in bfloat16, the root alone": functools.partial(mixed_precision, blocks=False),
    "FSDP2, `save`": sharded_save,
    "tensor parallel": tensor_parallel,
}


def outcomes(clients: Mapping[str, Any], recipes: tuple[Recipe, ...]) -> dict[str, list[Outcome]]:
    """Client → one outcome per recipe; the worse one where two processes differ."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "interop.group", folder, *(r.name for r in recipes)]
        runs = [
            subprocess.Popen(
                command, env={**os.environ, "INTEROP": json.dumps([rank, list(clients)])}
            )
            for rank in range(SIZE)
        ]
        try:
            for run in runs:
                run.wait(SECONDS)
        finally:
            for run in runs:
                run.kill()
        found = [
            json.loads(pathlib.Path(folder, f"{rank}.json").read_text()) for rank in range(SIZE)
        ]
    return {
        client: [_worse(*(Outcome(**side[client][r.name]) for side in found)) for r in recipes]
        for client in clients
    }


def _worse(first: Outcome, second: Outcome) -> Outcome:
    """Where one process fails, its neighbour may only have waited for it."""
    return max(first, second, key=lambda o: (STATUSES.index(o.status), o.reason))


def _worker(folder: str, names: list[str]) -> None:
    rank, wanted = json.loads(os.environ["INTEROP"])
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=SIZE, timeout=limit
    )
    recipes = [r for r in RECIPES if r.name in names]
    cells = {
        client: {r.name: dataclasses.asdict(outcome(CLIENTS[client], r)) for r in recipes}
        for client in wanted
    }
    pathlib.Path(folder, f"{rank}.json").write_text(json.dumps(cells))
    dist.destroy_process_group()


if __name__ == "__main__":
    _worker(sys.argv[1], sys.argv[2:])
