"""Whose seconds a memory plan goes by."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import aot_module, default_partition, make_boxed_func
from torch import Tensor, fx, nn

from rewriter import OptionError, plan_memory, rewrite
from rewriter.cost import Device
from rewriter.cost.work import Work
from rewriter.passes import Quadratic
from rewriter.planner.apply.partition import inductor_partitioner
from rewriter.planner.joint.joint import Joint
from rewriter.planner.joint.pricing import FUSED, Pricing
from rewriter.planner.joint.reading import read_joint

LAPTOP = Device.get("laptop")
ADD = Work("aten::add", "pointwise", "float32", 0, 8 << 20, 4 << 20, shape=(1 << 20,))


def slowed(products: float = 1, vectors: float = 1) -> Device:
    """The laptop, with products or elementwise arithmetic so many times slower."""
    matrix = {k: v / products for k, v in LAPTOP.matrix.items()}
    vector = {k: v / vectors for k, v in LAPTOP.vector.items()}
    return replace(LAPTOP, name="slowed", matrix=matrix, vector=vector)


class Wide(nn.Module):
    """Products, and elementwise operations whose results the backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(torch.nn.functional.gelu(layer(x)))
        return x.square().mean()


def test_what_is_dear_on_the_device_is_not_run_again() -> None:
    model, x = Wide().train(), torch.rand(256, 128)
    on_products = plan_memory(model, x, 0.6, slowed(products=300))
    on_vectors = plan_memory(model, x, 0.6, slowed(vectors=1000))
    assert on_products.flops == 0
    assert on_vectors.flops > 0
    assert on_products.device == on_vectors.device == "slowed"
    assert max(p.peak for p in (on_products, on_vectors)) <= 0.6 * on_products.default_peak


def test_a_plan_says_whose_seconds_it_goes_by() -> None:
    model, x = Wide().train(), torch.rand(64, 128)
    assert "time predicted for laptop-CPU;" in plan_memory(model, x).summary()
    trained = rewrite(model, [], x, memory_budget=0.8, device="phone")
    assert trained.memory_plan.device == "phone-CPU"
    assert "for phone-CPU" in " ".join(str(trained.report).split())
    with pytest.raises(OptionError, match="did you mean 'phone-CPU'"):
        plan_memory(model, x, device="fone-CPU")


def test_copies_keep_the_device() -> None:
    x = torch.rand(64, 128)
    trained = rewrite(Wide().train(), [], x, memory_budget=0.8, device="phone")
    for copied in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        copied(x).backward()
        assert vars(copied)["_rewriter"].memory.device is not None
        assert vars(copied)["_rewriter"].memory.device.name == "phone-CPU"


def test_what_runs_again_finds_cold_caches() -> None:
    cold = Pricing.of(torch.device("cpu"))
    assert cold.seconds(ADD) > LAPTOP.time(ADD)  # of a forward, whose inputs were just written
    assert cold.moving(12 << 20) == pytest.approx(cold.seconds(ADD), rel=0.01)
    assert Pricing.of(torch.device("cuda")).device.name == "A100-80GB"
    assert Pricing.of(torch.device("cuda"), LAPTOP).device.name == "laptop-CPU"


def test_fused_operations_cost_next_to_nothing() -> None:
    plain, fused = (Pricing.of(torch.device("cpu"), fused=f) for f in (False, True))
    assert fused.seconds(ADD) == FUSED * plain.seconds(ADD)
    product = Work(
        "aten::mm", "matmul", "float32", 2 << 30, 3 << 22, 1 << 22, shape=(1, 1024, 1024, 1024)
    )
    assert fused.seconds(product) == plain.seconds(product)


def test_another_device_is_another_key_of_inductors_cache() -> None:
    plain, other, slow = (
        inductor_partitioner(0.6, device=d) for d in (None, LAPTOP, slowed(vectors=2))
    )
    assert len({plain.uuid(), other.uuid(), slow.uuid()}) == 3
    assert pickle.loads(pickle.dumps(slow)).uuid() == slow.uuid()


def test_a_backward_is_priced_as_the_products_it_has() -> None:
    dense, x = nn.Sequential(nn.Linear(1024, 1024)).train(), torch.rand(4096, 1024)
    model = rewrite(dense, [Quadratic()], x)
    found: list[Joint] = []

    def partition(module: fx.GraphModule, inputs: object, **given: Any) -> Any:
        found.append(read_joint(module, given["num_fwd_outputs"]))
        return default_partition(module, inputs, **given)

    def boxed(graph: fx.GraphModule, _: object) -> Any:
        return make_boxed_func(graph.forward)

    aot_module(model, boxed, partition_fn=partition)(x).sum().backward()
    own = [s for s in found[0].steps if "quadratic" in s.op]
    forward, backward = (max(s.seconds for s in own if s.backward is b) for b in (False, True))
    assert backward > 1.5 * forward
