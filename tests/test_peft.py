"""Adapters of PEFT on rewritten layers, and rewrites of adapted models."""

from __future__ import annotations

import copy
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from torch import nn

from rewriter import OptionError, Pass, RewriteWarning, load, rewrite
from rewriter.passes import (
    Int4Linear,
    Monarch,
    MonarchChain,
    MonarchResidual,
    Quadratic,
    Quantize,
    QuantizedLinear,
    TopK,
)

peft = pytest.importorskip("peft")
merge: Any = pytest.importorskip("rewriter.training.peft").merge
pytestmark = pytest.mark.clients

NAMES = ["up", "down"]
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=NAMES),
    "all-linear": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=NAMES),
    "rsLoRA": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=NAMES),
    "IA3": lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=["down"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=NAMES),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=NAMES),
}
LINEAR_RECIPES: dict[str, list[Pass]] = {
    "monarch": [Monarch(nblocks=2)],
    "chain": [MonarchChain()],
    "residual": [MonarchResidual(nblocks=2)],
    "int8": [Quantize("int8-dynamic")],
    "int8 monarch": [Monarch(nblocks=2), Quantize("int8-dynamic")],
    "int4": [Quantize("int4-weight", group_size=32)],
}


DENSE, ROUNDED = "it is an nn.Linear now", "and rounded to its form: an error of 0.0"
MERGED: dict[str, tuple[type, str, float | None]] = {
    "monarch": (nn.Linear, DENSE, None),
    "chain": (nn.Linear, DENSE, None),
    "residual": (nn.Linear, DENSE, None),
    "int8": (QuantizedLinear, ROUNDED, 35),
    "int8 monarch": (nn.Linear, DENSE, 35),  # inputs are no longer rounded
    "int4": (Int4Linear, ROUNDED, 15),
}
"""What layers are once adapters are merged, what the warning says, and how close outputs stay."""


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def rewritten(passes: list[Pass]) -> nn.Module:
    torch.manual_seed(0)
    return rewrite(MLP().eval(), passes, rows(4, 16))


def trained(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """With adapters away from where they start, by some noise and one step."""
    own = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in own:
            p.add_(0.1 * torch.randn_like(p))
    optimizer = torch.optim.SGD(own, 0.01)
    model.train()(x=x).square().sum().backward()
    assert all(p.grad is not None for p in own)
    optimizer.step()
    return model.eval()


def quietly(function: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_an_adapter_trains_saves_and_merges(
    recipe: str, method: str, tmp_path: pathlib.Path
) -> None:
    x, passes = rows(4, 16), LINEAR_RECIPES[recipe]
    model = rewritten(passes)
    layer, before = type(model.up), model(x)
    held = {n: t.clone() for n, t in model.state_dict().items()}
    adapted = quietly(lambda: trained(peft.get_peft_model(model, METHODS[method]()), x))
    after = adapted(x=x).detach()
    assert (after - before).norm() > 0.01 * before.norm()
    base = adapted.get_base_model().up.base_layer
    assert type(base) is layer
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, held[f"up.{name}"])  # the base does not train

    quietly(lambda: adapted.save_pretrained(tmp_path))
    again = quietly(lambda: peft.PeftModel.from_pretrained(rewritten(passes), tmp_path).eval())
    assert torch.equal(again(x=x), after)

    form, said, floor = MERGED[recipe]
    for safe in (False, True):
        whole = copy.deepcopy(adapted)
        with pytest.warns(RewriteWarning, match=said):
            merged = whole.merge_and_unload(safe_merge=safe)
        assert type(merged.up) is form
        if floor is None:
            assert_reordered(quietly(lambda m=merged: m(x)), after)
        else:
            assert sqnr(quietly(lambda m=merged: m(x)), after) > floor


def test_a_merged_adapter_can_be_taken_out_again() -> None:
    x = rows(4, 16)
    model = peft.get_peft_model(rewritten([Monarch(nblocks=2)]), METHODS["LoRA"]())
    quietly(lambda: trained(model, x))
    after = model(x=x).detach()
    with model.disable_adapter():
        before = model(x=x)
    quietly(model.merge_adapter)
    assert_reordered(model(x=x), after)
    model.unmerge_adapter()
    assert_reordered(model(x=x), after)
    with model.disable_adapter():
        assert_reordered(model(x=x), before)


def test_adapters_over_int8_have_the_gradients_of_the_float_base() -> None:
    """dL/dA and dL/dB with the straight-through estimate: those over W = q·scale, nearly."""
    x = rows(32, 16)
    model = rewritten([Quantize("int8-dynamic")])
    dense = MLP().eval()
    for name in NAMES:
        own = model.get_submodule(name)
        dense.get_submodule(name).load_state_dict(
            {"weight": own.dense_weight(), "bias": own.bias.detach()}
        )
    gradients = []
    for base in (model, dense):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False)
        adapted = quietly(lambda b=base, c=config: peft.get_peft_model(b, c))
        quietly(lambda a=adapted: a(x=x).square().sum().backward())
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient - other).norm() < 0.02 * other.norm(), name


def adapted_model(method: str, **options: Any) -> tuple[nn.Module, torch.Tensor]:
    model = quietly(lambda: peft.get_peft_model(MLP(), METHODS[method]()))
    return quietly(lambda: trained(model, rows(4, 16))), rows(4, 16)


@pytest.mark.parametrize("method", ["LoRA", "rsLoRA", "IA3", "LoHa", "OFT"])
@pytest.mark.parametrize("recipe", ["monarch", "int8"])
def test_a_rewrite_of_an_adapted_model_leaves_the_adapters(recipe: str, method: str) -> None:
    model, x = adapted_model(method)
    optimized = rewrite(model, LINEAR_RECIPES[recipe], {"x": x})
    assert {d.site.rpartition(".")[2] for d in optimized.report.replaced} == {"base_layer"}
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    assert own == {n for n, p in optimized.named_parameters() if p.requires_grad}
    quietly(lambda: trained(optimized, x))
    after = optimized(x=x).detach()
    with pytest.warns(RewriteWarning, match="was written to"):
        merged = optimized.merge_and_unload()
    assert type(merged.up) is MERGED[recipe][0]
    if recipe == "int8":
        assert sqnr(merged(x), after) > 35
    else:
        assert_reordered(merged(x), after)


def test_the_report_says_why_adapters_stay() -> None:
    model, x = adapted_model("LoRA")
    skipped = rewrite(model, [Monarch(nblocks=2)], {"x": x}).report.skipped
    reasons = {d.site.rpartition(".")[0].rpartition(".")[2]: d.reason for d in skipped}
    assert set(reasons) == {"lora_A", "lora_B"}
    assert "name lora_A in where=" in reasons["lora_A"]


@pytest.mark.parametrize("recipe", ["monarch", "int8"])
def test_a_weight_that_dora_reads_stays_and_says_so(recipe: str) -> None:
    """It scales the rows of W + BA by their norms, which takes the weight itself."""
    model, x = adapted_model("DoRA")
    optimized: Any = rewrite(model, LINEAR_RECIPES[recipe], {"x": x})
    reasons = {d.site.rpartition(".")[2]: d.reason for d in optimized.report.skipped}
    assert not optimized.report.replaced
    assert "code that reads it" in reasons["base_layer"]
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    assert own == {n for n, p in optimized.named_parameters() if p.requires_grad}
    after = optimized(x=x).detach()
    assert_reordered(after, model(x=x))
    assert_reordered(optimized.merge_and_unload()(x), after)


def test_adapters_that_where_names_are_rewritten() -> None:
    model, x = adapted_model("LoRA")
    optimized = rewrite(model, [Quantize("int8-dynamic", where="*.lora_A.*")], {"x": x})
    assert [d.site for d in optimized.report.replaced] == [
        "base_model.model.up.lora_A.default",
        "base_model.model.down.lora_A.default",
    ]


def test_a_trained_copy_of_a_module_stays_too() -> None:
    config = peft.LoraConfig(r=4, target_modules=["up"], modules_to_save=["down"])
    model, x = peft.get_peft_model(MLP(), config).eval(), rows(4, 16)
    report = rewrite(model, [Quantize("int8-dynamic")], {"x": x}).report
    assert [d.site for d in report.replaced] == ["base_model.model.up.base_layer"]
    assert (
        "modules_to_save" in next(d for d in report.skipped if "modules_to_save" in d.site).reason
    )


@pytest.mark.parametrize("passes", [[Quadratic()], [TopK(4)]], ids=["quadratic", "topk"])
def test_what_is_not_linear_is_not_put_under_an_adapter(passes: list[Pass]) -> None:
    """y = W topk(h) + B A h is not (W + B A) topk(h), which a merge would make of it."""
    config = peft.LoraConfig(r=4, target_modules=["down"], init_lora_weights=False)
    model, x = peft.get_peft_model(MLP(), config).eval(), rows(4, 16)
    optimized = rewrite(model, passes, {"x": x})
    declined = [d for d in optimized.report.decisions if d.action == "declined"]
    assert [d.site for d in declined] == ["base_model.model.down.base_layer"]
    assert "is not linear" in declined[0].reason
    after = optimized(x=x)
    assert_reordered(optimized.merge_and_unload()(x), after)


def test_a_transposed_base_merges_the_right_way_round() -> None:
    """transformers' Conv1D holds [in, out], and a square adapter would merge without an error."""
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential()
    model.add_module("up", conv(16, 16))
    config = peft.LoraConfig(
        r=4, target_modules=["up"], fan_in_fan_out=True, init_lora_weights=False
    )
    adapted, x = peft.get_peft_model(model, config).eval(), rows(4, 16)
    optimized = rewrite(adapted, [Monarch(nblocks=2)], {"input": x})
    after = optimized(input=x)
    merged = quietly(optimized.merge_and_unload)
    assert_reordered(merged(x), after)


# a language model in 4 bits -----------------------------------------------------------------------


@pytest.mark.slow
def test_adapters_train_on_a_llama_in_four_bits_and_go_into_its_bits(
    tmp_path: pathlib.Path,
) -> None:
    """Merged by dequantize, add, requantize; the report says what that costs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(2, 64, (4, 12))
    call, four_bits = {"input_ids": tokens, "labels": tokens}, LINEAR_RECIPES["int4"]
    base = rewrite(transformers.LlamaForCausalLM(config).eval(), four_bits, call)
    with torch.no_grad():
        before = base(**call).logits
    targets = ["q_proj", "v_proj", "down_proj"]
    adapter = peft.LoraConfig(r=4, target_modules=targets)
    model = quietly(lambda: peft.get_peft_model(base, adapter))
    held = {n: t.clone() for n, t in base.named_buffers()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(12):
        loss = quietly(lambda: model.train()(**call).loss)
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    with torch.no_grad():
        after = model(**call).logits
    with pytest.warns(RewriteWarning, match=ROUNDED):
        model.merge_adapter()
    model.unmerge_adapter()
    assert_equal(dict(base.named_buffers()), held)
    merged = merge(model, [call, call])
    report = merged.report.steps[-1]
    assert report.name == "merge"
    assert {d.site.rpartition(".")[2] for d in report.decisions} == set(targets)
    for decision in report.decisions:
        assert type(merged.get_submodule(decision.site)) is Int4Linear
        assert 0 < decision.error < 0.2
        assert 0 < decision.output_error < 0.2
    with torch.no_grad():
        got = merged(**call).logits
        assert (got - after).norm() < 0.5 * (before - after).norm()
    merged.save(tmp_path / "saved")
    again = load(tmp_path / "saved", transformers.LlamaForCausalLM(config).eval())
    with torch.no_grad():
        assert_equal(again(**call).logits, got)


# merging into few bits ----------------------------------------------------------------------------


def adapted_pair(passes: list[Pass], scale: float = 0.3) -> Any:
    """A rewritten model under two adapters that are both active."""
    config = peft.LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False)
    model = quietly(lambda: peft.get_peft_model(rewritten(passes), config))
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(scale if "lora_" in name else 1)
    return model.eval()


FEW_BITS: dict[str, Pass] = {
    "int4": Quantize("int4-weight", group_size=32, symmetric=False),
    "int4 activations": Quantize("int4-dynamic"),
    "int8": Quantize("int8-dynamic", "per_tensor"),
    "int8 weights": Quantize("int8-weight"),
    "fp8": Quantize("fp8-weight"),
    "bf16": Quantize("bf16"),
}


@pytest.mark.parametrize("recipe", FEW_BITS)
def test_several_adapters_are_merged_in_one_rounding(recipe: str) -> None:
    model = adapted_pair([FEW_BITS[recipe]])
    up = model.get_base_model().up
    layer, options = up.base_layer, up.base_layer.config()
    wanted = layer.dense_weight()
    for adapter in ("default", "second"):
        wanted = wanted + up.get_delta_weight(adapter).detach()
    own = {n: options[n] for n in options if n not in ("in_features", "out_features", "bias")}
    again = type(layer).from_weight(wanted, None, **own)
    merged: Any = merge(model)
    assert merged.up is layer
    assert merged.up.config() == options
    assert_equal(merged.up.dense_weight(), again.dense_weight())
    (decision,) = [d for d in merged.report.steps[-1].decisions if d.site == "up"]
    lost = (again.dense_weight() - wanted).norm() / wanted.norm()
    assert decision.error == pytest.approx(float(lost), rel=1e-3)
    assert "adapters merged, and rounded: nearest levels" in decision.reason
    assert "merge: 2 sites replaced" in str(merged.report)


def test_what_was_merged_before_is_taken_out_and_rounded_once() -> None:
    model, other = (adapted_pair([FEW_BITS["int4"]]) for _ in range(2))
    quietly(model.merge_adapter)
    assert_equal(dict(merge(model).named_buffers()), dict(merge(other).named_buffers()))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_levels_are_fitted_to_batches(method: str) -> None:
    mixed = rows(256, 16) @ rows(16, 16)
    errors = []
    for batches in (None, [mixed[:128], mixed[128:]]):
        model = adapted_pair([FEW_BITS["int4"]])
        after = model(x=mixed).detach()
        merged = quietly(lambda m=model, b=batches: merge(m, b, method=method))
        errors.append(float((merged(mixed) - after).norm()))
    assert errors[1] < 0.9 * errors[0]
    decisions = merged.report.steps[-1].decisions
    assert all(f"levels by {method}" in d.reason for d in decisions)
    assert all(0 < d.output_error < 0.2 for d in decisions)


def test_other_layers_are_merged_as_peft_does() -> None:
    model = adapted_pair([Monarch(nblocks=2, where="up"), Quantize("int4-weight", where="down")])
    after = model(x=rows(4, 16)).detach()
    with pytest.warns(RewriteWarning, match=f"MonarchLinear.*{DENSE}"):
        merged: Any = merge(model)
    assert (type(merged.up), type(merged.down)) == (nn.Linear, Int4Linear)
    assert sqnr(merged(rows(4, 16)), after) > 15


def test_a_range_of_inputs_without_adapters_does_not_outlive_them() -> None:
    """int8-static would clip what the adapters of the layers before have added."""
    x, passes = rows(64, 16), [Quantize("int8-static")]
    base = rewrite(MLP().eval(), passes, x, calibration=[x])
    config = peft.LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False)
    model: Any = quietly(lambda: peft.get_peft_model(base, config)).eval()
    with pytest.warns(RewriteWarning, match=f"StaticQuantizedLinear.*{DENSE}"):
        merged: Any = merge(model)
    assert (type(merged.up), type(merged.down)) == (nn.Linear, nn.Linear)
    packed = rewrite(merged, passes, x, calibration=[x])
    assert sqnr(packed(x), merged(x)) > 30


@pytest.mark.parametrize("scheme", ["int8-weight", "int4-weight"])
def test_a_tied_table_stays_tied_and_takes_the_adapters_of_one_side(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("table", nn.Embedding(20, 32))
    model.add_module("norm", nn.LayerNorm(32))
    model.add_module("head", nn.Linear(32, 20, bias=False))
    model.head.weight, ids = model.table.weight, torch.arange(6).view(2, 3)
    base: Any = rewrite(model.eval(), [Quantize(scheme, embeddings=True)], ids)
    assert base.head is base.table
    config = peft.LoraConfig(r=4, target_modules=["table"], init_lora_weights=False)
    adapted: Any = quietly(lambda: peft.get_peft_model(base, config)).eval()
    with torch.no_grad():
        want = adapted.get_base_model().table(ids)
    merged: Any = merge(adapted)
    assert merged.head is merged.table
    assert sqnr(merged.table(ids), want) > 15
    read = merged.norm(merged.table(ids))
    assert_reordered(merged(ids), read @ merged.table.dense_weight().t())


def test_what_cannot_be_merged_changes_nothing() -> None:
    from rewriter.training.peft import register

    with pytest.raises(OptionError, match="model must be what peft.get_peft_model gives, not"):
        merge(rewritten([FEW_BITS["int4"]]))
    model = adapted_pair([FEW_BITS["int4"]])
    with pytest.raises(OptionError, match="merge: method='gtpq' is unknown; did you mean 'gptq'"):
        merge(model, method="gtpq")
    held = {n: t.clone() for n, t in model.named_buffers()}
    model.get_base_model().down.lora_A["second"].weight.data[0, 0] = float("inf")
    for call in (lambda: merge(model), lambda: quietly(model.merge_and_unload)):
        with pytest.raises(OptionError, match="NaN or inf"):
            call()
    with pytest.raises(OptionError, match="no such layer is adapted: leave it out"):
        merge(adapted_pair([FEW_BITS["int8"]]), [rows(4, 16)])
    topk: list[Pass] = [Quantize("int4-weight", where="up"), TopK(4, where="down")]
    config = register(peft.LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False))
    torch.manual_seed(0)
    mixed: Any = peft.get_peft_model(rewrite(MLP().eval(), topk[1:], rows(4, 16)), config)
    with pytest.raises(OptionError, match="cannot be merged into a TopKLinear, which is not lin"):
        merge(mixed)
    assert_equal(dict(adapted_pair([FEW_BITS["int4"]]).named_buffers()), held)


# layers that are not linear -----------------------------------------------------------------------


@pytest.mark.parametrize("passes", [[Quadratic()], [TopK(4)]], ids=["quadratic", "topk"])
def test_lora_on_what_is_not_linear(passes: list[Pass], tmp_path: pathlib.Path) -> None:
    from rewriter.training.peft import register

    x = rows(4, 16)
    adapted = peft.get_peft_model(rewritten(passes), register(METHODS["LoRA"]()))
    trained(adapted, x)
    after = adapted(x=x).detach()
    layer = adapted.get_base_model().down
    own, h = layer.base_layer, rows(4, 32)
    wanted = own(h) + layer.scaling["default"] * layer.lora_B.default(layer.lora_A.default(h))
    assert_reordered(layer(h), wanted)

    quietly(lambda: adapted.save_pretrained(tmp_path))
    config = register(peft.PeftConfig.from_pretrained(tmp_path))
    model = rewritten(passes)
    again = quietly(lambda: peft.PeftModel.from_pretrained(model, tmp_path, config=config).eval())
    assert torch.equal(again(x=x), after)
    with pytest.raises(OptionError, match="cannot be merged into a .*, which is not linear"):
        quietly(adapted.merge_and_unload)


def test_a_registered_config_adapts_linear_layers_as_ever() -> None:
    from rewriter.training.peft import register

    x = rows(4, 16)
    adapted = peft.get_peft_model(rewritten([Monarch(nblocks=2)]), register(METHODS["DoRA"]()))
    after = quietly(lambda: trained(adapted, x)(x=x).detach())
    assert_reordered(quietly(lambda: adapted.merge_and_unload()(x)), after)


def test_methods_that_need_a_weight_are_refused_where_there_is_none() -> None:
    from rewriter.training.peft import register

    with pytest.raises(OptionError, match="IA3Config takes linear layers only"):
        register(METHODS["IA3"]())
    with pytest.raises(OptionError, match="a QuadraticLinear is not linear: use LoRA"):
        peft.get_peft_model(rewritten([Quadratic()]), register(METHODS["DoRA"]()))
    with pytest.raises(ValueError, match="TopKLinear.* is not supported"):
        peft.get_peft_model(rewritten([TopK(4)]), METHODS["LoRA"]())
