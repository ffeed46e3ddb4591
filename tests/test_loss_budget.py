"""Threshold(budget="loss"): gradients of the loss at the inputs of sites; sparsity that is shared
out by what it costs the loss."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter import LINEAR, RewriteWarning, rewrite
from rewriter.engine.batches import Calibration
from rewriter.engine.gradients import differentiate
from rewriter.engine.looking import sites_of
from rewriter.engine.pipeline import prepare
from rewriter.errors import CalibrationError, OptionError
from rewriter.modules.budgets import between, cost_of_steps, shared_out
from rewriter.modules.moments import Sensitivity
from rewriter.passes import Threshold, ThresholdLinear

WORDS, WIDTH = 24, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class LanguageModel(nn.Module):
    """Guesses the next token from this one; gives its loss where it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        rows, next_ = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {"loss": F.cross_entropy(rows, next_), "logits": logits}


def text(seed: int, windows: int = 8, length: int = 64) -> Tensor:
    """Tokens [windows, length] of a Markov chain, in which a few successors are likely."""
    chain = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1)
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(WORDS, (windows,), generator=g)]
    for _ in range(length - 1):
        ids.append(chain[ids[-1]].multinomial(1, generator=g)[:, 0])
    return torch.stack(ids, 1)


def causal(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    rows, next_ = outputs["logits"][:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
    return F.cross_entropy(rows, next_, reduction="none")


@pytest.fixture(scope="module")
def trained() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(150):
        batch = {"input_ids": text(100 + step)}
        optimizer.zero_grad()
        causal(model(**batch), batch).mean().backward()
        optimizer.step()
    return model.eval()


def calibration(labels: bool = False) -> list[dict[str, Tensor]]:
    windows = [text(seed) for seed in range(1, 5)]
    return [{"input_ids": ids, "labels": ids} if labels else {"input_ids": ids} for ids in windows]


def budgeted(model: nn.Module, sparsity: float = 0.5, **options: Any) -> Any:
    batches = options.pop("calibration", None) or calibration()
    own = {"budget": "loss", "inputs": "all", "loss": causal} | options
    return rewrite(model, [Threshold(sparsity, **own)], batches[0], calibration=batches)


def layers(model: nn.Module) -> dict[str, ThresholdLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ThresholdLinear)}


def lost(model: nn.Module, dense: nn.Module) -> float:
    """By how much the loss is above that of the dense model, in nats a token."""
    batch = {"input_ids": text(77, windows=64)}
    with torch.no_grad():
        return float((causal(model(**batch), batch) - causal(dense(**batch), batch)).mean())


def test_it_costs_the_loss_less_than_equal_sparsity(trained: LanguageModel) -> None:
    whole = budgeted(trained)
    sizes = {n: m.weight.numel() for n, m in layers(whole).items()}
    assert len(sizes) == 7
    for other in ("uniform", "greedy"):
        assert 0 < lost(whole, trained) < lost(budgeted(trained, budget=other, loss=None), trained)
    spent = sum((1 - (m.share or 0)) * sizes[n] for n, m in layers(whole).items())
    assert spent / sum(sizes.values()) == pytest.approx(0.5, abs=0.03)


def test_the_report_has_each_sites_sparsity_and_what_it_costs(trained: LanguageModel) -> None:
    out = budgeted(trained)
    (step,) = [s for s in out.report.steps if s.name.startswith("Threshold")]
    assert "loss=causal" in step.name
    asked = {d.site: d.reason for d in step.decisions if d.changed}
    assert len({reason.partition("(asked: ")[2].partition("%")[0] for reason in asked.values()}) > 1
    costs = {name: float(reason.rpartition(" by ")[2]) for name, reason in asked.items()}
    assert all("; by itself it raises the loss by " in reason for reason in asked.values())
    # they predict, up to third orders and what layers do together
    assert 0.3 < lost(out, trained) / sum(costs.values()) < 3


def test_rotated_layers_cost_the_loss_less(trained: LanguageModel) -> None:
    out, plain = (budgeted(trained, 0.6, rotate=rotate) for rotate in (True, False))
    (step,) = [s for s in out.report.steps if s.name.startswith("Threshold")]
    own = {n for n, m in layers(out).items() if m.rotated}
    told = {d.site: d.reason for d in step.decisions if d.changed}
    assert own == {n for n, reason in told.items() if "; rotated: zeros cost" in reason}
    assert own
    assert own <= {f"layers.{i}.up" for i in range(3)}
    costs = {n: float(r.partition(" by itself it raises the loss by ")[2].partition(";")[0])
             for n, r in told.items()}  # fmt: skip
    assert 0.3 < lost(out, trained) / sum(costs.values()) < 3
    assert lost(out, trained) < lost(plain, trained)


def test_labels_and_a_model_with_a_loss_take_the_place_of_one(trained: LanguageModel) -> None:
    given_ = budgeted(trained)
    own = budgeted(trained, loss=None, calibration=calibration(labels=True))
    assert list(layers(own)) == list(layers(given_))
    x = text(5)
    # 512 labels, of which the model leaves out 8: scales of all costs, but for rounding
    assert_reordered(own(x)["logits"], given_(x)["logits"])


def test_a_block_that_the_loss_hardly_depends_on_is_the_sparsest(trained: LanguageModel) -> None:
    idle = pickle.loads(pickle.dumps(trained))
    with torch.no_grad():
        idle.layers[1].down.weight *= 1e-3
    found = {n: 1 - (m.share or 0) for n, m in layers(budgeted(idle)).items()}
    assert all(found[f"layers.1.{name}"] > 0.9 for name in ("up", "down")), found
    assert max(share for n, share in found.items() if "layers.1" not in n) < 0.7


def test_what_is_rewritten_pickles_without_the_loss(trained: LanguageModel) -> None:
    out = budgeted(trained, loss=lambda outputs, batch: causal(outputs, batch))
    x = text(5)
    assert_equal(pickle.loads(pickle.dumps(out))(x)["logits"], out(x)["logits"])


# Gradients ---------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that is called twice, one that reads the same value, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y = self.fc(x).tanh()
        return F.linear(self.fc(y).tanh() + self.other(y), self.weight)


def squares(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.square().flatten(0, -2).sum(-1)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_through_one_layer_alone(frozen: bool) -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(4, 8)
    model.requires_grad_(not frozen)
    engine = prepare(model, x)
    sites = [s for s in sites_of(engine.capture) if s.kind == LINEAR]
    code = [str(g) for _, _, g in engine.capture.graphs()]
    found, missing = differentiate(engine.capture, sites, Calibration((x,)), squares)
    assert not missing
    assert [str(g) for _, _, g in engine.capture.graphs()] == code
    assert all(p.grad is None for p in model.parameters())
    ins = {"fc": [x.clone()]}
    y = model.fc(ins["fc"][0].requires_grad_()).tanh()
    ins["fc"].append(y.clone())
    ins["other"] = [y.clone()]
    z = model.fc(ins["fc"][1].requires_grad_()).tanh() + model.other(ins["other"][0])
    ins["weight"] = [z.clone()]
    for own in ins.values():
        for t in own:
            t.requires_grad_() if t.is_leaf else None
    loss = F.linear(ins["weight"][0], model.weight).square().sum()
    grads = torch.autograd.grad(loss, [t for own in ins.values() for t in own])
    for name, own in ins.items():
        want = torch.cat([torch.cat(own), torch.cat([grads[0] for _ in own])], 1)
        want[:, 8:] = torch.cat(grads[: len(own)])
        grads = grads[len(own) :]
        got = torch.cat([found[name].rows, found[name].gradients], 1)
        assert_reordered(_sorted(got), _sorted(want.detach()))
        assert found[name].per_loss == len(own)


def _sorted(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


def test_padding_and_held_out_batches_do_not_count() -> None:
    model, x = Twice().eval(), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    batch = {"x": x, "attention_mask": mask}
    engine = prepare(model, batch)
    sites = [s for s in sites_of(engine.capture) if s.fqn == "other"]
    held = Calibration((batch, {"x": x + 1, "attention_mask": mask}))
    found, _ = differentiate(engine.capture, sites, held, squares)
    assert found["other"].rows.shape == (4, 8)
    assert found["other"].per_loss == pytest.approx(4 / 10)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 40), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_cost_is_half_the_curvature_of_a_fisher_matrix(n: int, width: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rows, gradients, scores = (torch.randn(n, width, generator=g).double() for _ in range(3))
    own = Sensitivity(rows.float(), gradients.float(), per_loss=1.5)
    scores = scores.abs().mul(4).round()  # many ties
    fisher = gradients[:, :, None] * gradients[:, None]
    limits = torch.tensor([0.0, 1.0, 3.0, 3.0, 9.0])
    for found, limit in zip(own.costs(scores.float(), limits), limits, strict=True):
        gone = rows.where(scores < limit, 0.0)
        want = 1.5 * torch.einsum("ni,nij,nj->n", gone, fisher, gone).mean() / 2
        assert found == pytest.approx(float(want), rel=1e-4, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 40), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_steps_of_a_cost(n: int, width: int, seed: int) -> None:
    scores = torch.rand(n, width, generator=torch.Generator().manual_seed(seed))
    costs = cost_of_steps(scores, lambda limits: [float((scores < t).sum()) for t in limits])
    assert costs == [float(int(i * 0.05 * scores.numel())) for i in range(20)]
    assert between(costs, 0.5) == pytest.approx(costs[10], rel=1e-6)
    assert min(costs) <= between(costs, 0.525) <= max(costs)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 6), sparsity=st.floats(0.02, 0.94), seed=st.integers(0, 99))
def test_what_is_shared_out_is_the_sparsity_asked_for(
    count: int, sparsity: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    costs = torch.rand(count, 20, generator=g).cumsum(1).sub(0.1).tolist()
    sizes = torch.randint(1, 99, (count,), generator=g).tolist()
    shares = shared_out(costs, sizes, sparsity)
    spent = sum(s * size for s, size in zip(shares, sizes, strict=True))
    assert spent == pytest.approx(sparsity * sum(sizes))
    assert all(0 <= s <= 0.95 + 1e-9 for s in shares)


# Refusals ----------------------------------------------------------------------------------------


def refusal(message: str, **options: Any) -> None:
    with pytest.raises(CalibrationError, match=message):
        budgeted(LanguageModel().eval(), **options)


def test_no_loss_and_no_labels() -> None:
    refusal(r"the model gives no loss: pass loss=\(outputs, batch\)", loss=None)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, b: causal(o, b).mean(), r"the shape \[\]: give single losses"),
        (lambda o, b: causal(o, b)[:0], r"the shape \[0\]: give single losses"),
        (lambda o, b: 1.0, "is a float, not a floating tensor"),
        (lambda o, b: b["input_ids"], "is a Tensor, not a floating tensor"),
        (lambda o, b: causal(o, b).detach(), "has no gradient"),
        (lambda o, b: causal(o, b) / 0, "holds NaN or inf"),
        (lambda o, b: o.logits, "fails on calibration.0.: AttributeError"),
    ],
)
def test_a_loss_that_is_none(loss: Any, message: str) -> None:
    refusal(rf"the loss (of )?.*{message}", loss=loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": 3, "budget": "loss"}, r"loss must be a function \(outputs, batch\)"),
        ({"loss": causal}, "loss is for budget=\"loss\", not 'uniform'"),
        ({"loss": causal, "budget": "greedy"}, "loss is for budget=\"loss\", not 'greedy'"),
    ],
)
def test_an_impossible_loss(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Threshold(0.5, **options)


def test_a_layer_that_the_loss_does_not_depend_on_stays() -> None:
    class TwoHeads(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(WIDTH, 1)

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            found = super().forward(input_ids)
            return {**found, "score": self.score(self.tokens(input_ids))}

    with pytest.warns(RewriteWarning, match="not calibrated: score .the loss does not depend"):
        out = budgeted(TwoHeads().eval())
    assert "score" not in layers(out)
    reasons = {d.site: d.reason for d in out.report.skipped}
    assert reasons["score"] == "the calibration batches show no loss that depends on it"
