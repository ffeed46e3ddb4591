"""The columns of the table that need one process: what people do with a rewritten model.

Each takes a recipe and compares what the client got with the same model left alone. It returns
where that holds, and raises otherwise: `table` tells refusals from failures.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from closeness import assert_equal, assert_reordered, sqnr
from saving import saved_bytes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from interop import recipes
from interop.recipes import Recipe, Refused, batch, bert, ids, llama, net, random, ready, rewritten
from rewriter import export, load
from rewriter.passes import RoutedLinear, StaticQuantizedLinear

EXACT = 60.0
"""dB of signal over noise: float32 in another order, where int8 may round a few levels apart."""


SHORT = {torch.float32: EXACT, torch.bfloat16: 48.0}
"""By the dtype of products, what another library's sums of them may differ by: in bfloat16 the last
of 8 bits, 20·log₁₀ 2⁸ dB."""


def loss_of(model: nn.Module, given: Any) -> Tensor:
    """A loss that every output has a part in."""
    out = model(**given) if isinstance(given, dict) else model(given)
    logits = out if isinstance(out, Tensor) else out.logits
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def outputs(model: nn.Module, given: Any) -> Tensor:
    with torch.no_grad():
        out = model(**given) if isinstance(given, dict) else model(given)
    return out if isinstance(out, Tensor) else out.logits


def gradients(model: nn.Module, given: Any) -> dict[str, Tensor]:
    """name → gradient of `loss_of` in train mode, of those that have one."""
    model.train().zero_grad()
    loss_of(model, given).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got: Any, want: Any, floor: float = EXACT) -> None:
    """Equal up to the order of float32 sums; of a dict, all values together."""
    if isinstance(want, Mapping):
        assert set(got) == set(want), sorted(set(got) ^ set(want))
        names = sorted(want)
        got, want = (torch.cat([v[n].flatten() for n in names]) for v in (got, want))
    assert want.abs().sum() > 0, "the check compares zeros"
    assert sqnr(got, want) >= floor, f"{sqnr(got, want):.0f} dB"


# storage and copies


def save_and_load(recipe: Recipe) -> None:
    model = ready(recipe, bert)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/saved")
        again = load(f"{folder}/saved", bert())
    assert_equal(outputs(again, batch(3)), outputs(model, batch(3)))
    assert_equal(gradients(again, batch()), gradients(model, batch()))


def deep_copy(recipe: Recipe) -> None:
    model = ready(recipe, bert)
    want, other = outputs(model, batch(3)), copy.deepcopy(model)
    assert_equal(outputs(other, batch(3)), want)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.mul_(2) if tensor.is_floating_point() else None
    assert_equal(outputs(model, batch(3)), want)
    assert not torch.equal(outputs(other, batch(3)), want)


def pickled(recipe: Recipe) -> None:
    model = ready(recipe, bert)
    again = pickle.loads(pickle.dumps(model))
    assert_equal(outputs(again, batch(3)), outputs(model, batch(3)))
    assert_equal(gradients(again, batch()), gradients(model, batch()))


def tied_weights(recipe: Recipe) -> None:
    """One gradient for both uses of a tied weight: the sum of what two weights would get; of
    integers, one tensor for both uses."""
    model = rewritten(recipe, llama(tied=True), batch())
    embedding, head = model.model.embed_tokens.weight, model.lm_head
    if head is model.model.embed_tokens:
        untied = copy.deepcopy(model)
        untied.lm_head = copy.deepcopy(head)
        assert_close(outputs(model, batch(3)), outputs(untied, batch(3)))
        return
    assert model.lm_head.weight is embedding
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(embedding.detach().clone())
    assert_close(outputs(model, batch(3)), outputs(untied, batch(3)))
    both = gradients(untied, batch())
    apart = both["model.embed_tokens.weight"] + both["lm_head.weight"]
    assert_close(gradients(model, batch())["model.embed_tokens.weight"], apart)


# compilers


def torch_compile(recipe: Recipe) -> None:
    torch._dynamo.reset()
    model = ready(recipe, bert)
    fast = torch.compile(model, backend="aot_eager")
    assert_close(outputs(fast, batch()), outputs(model, batch()))
    want = gradients(model, batch())
    got = gradients(fast, batch())
    assert_close({n.removeprefix("_orig_mod."): g for n, g in got.items()}, want)


def inductor(recipe: Recipe) -> None:
    torch._dynamo.reset()
    model = ready(recipe, net)
    assert_close(outputs(torch.compile(model), random(4, 16)), outputs(model, random(4, 16)))


def torch_export(recipe: Recipe) -> None:
    model = ready(recipe, bert)
    sizes = {name: {0: torch.export.Dim.DYNAMIC} for name in batch()}
    program = torch.export.export(model, (), batch(), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    assert_close(outputs(again.module(), batch(3)), outputs(model, batch(3)))


def _in_onnx_runtime(recipe: Recipe, file: str, given: Any) -> Tensor:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Missing

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Missing as error:
        if recipe.dtype != torch.bfloat16:
            raise
        raise Refused("ONNX Runtime multiplies no bfloat16 matrices on a CPU") from error
    given = given if isinstance(given, dict) else {session.get_inputs()[0].name: given}
    return torch.from_numpy(session.run(None, {n: t.numpy() for n, t in given.items()})[0])


def onnx_export(recipe: Recipe) -> None:
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    model, x = ready(recipe, net), random(7, 16)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        torch.onnx.export(
            model, (random(4, 16),), file, dynamic_shapes=sizes, dynamo=True, verbose=False
        )
        got = _in_onnx_runtime(recipe, file, x)
    assert_close(got, outputs(model, x), SHORT[recipe.dtype])


def our_onnx(recipe: Recipe) -> None:
    """Attention and tables, which every pass leaves alike, where a pass takes tables too."""
    tables = any(getattr(p, "embeddings", False) for p in recipe.passes)
    kind = bert if tables else net
    model, example = ready(recipe, kind), recipes.INPUTS[kind]()
    given = batch(3) if tables else random(7, 16)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        options = recipes.calibrated(recipe, example)
        export(kind(), recipe.passes, example, format="onnx", package=file, **options)
        got = _in_onnx_runtime(recipe, file, given)
    assert_close(got, outputs(model, given), SHORT[recipe.dtype])


# adapters


def _adapted(model: nn.Module, *layers: str, **options: Any) -> Any:
    """PEFT's LoRA over these layers of a model, with adapters that do something."""
    import peft

    from rewriter.training.peft import register

    torch.manual_seed(0)  # of which PEFT draws
    config = peft.LoraConfig(r=2, target_modules=list(layers), **options)
    inside = [m for n, m in model.named_modules() if n.endswith(layers)]
    if not all(isinstance(m, nn.Linear) for m in inside):
        register(config)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * random(*parameter.shape, seed=len(name)))
    return adapted.eval()


def _beside(model: nn.Module, adapters: Mapping[str, Tensor]) -> nn.Module:
    """y = layer(x) + α/r·B·A·x by hooks: what LoRA over a model has to compute."""
    scale = 8 / 2  # PEFT's default α over r

    def hook(down: Tensor, up: Tensor) -> Callable[..., Tensor]:
        return lambda layer, args, y: y + scale * F.linear(F.linear(args[0], down), up)

    for name, layer in model.named_modules():
        key = f"base_model.model.{name}.lora_{{}}.default.weight"
        if key.format("A") in adapters:
            pair = [adapters[key.format(side)].detach().clone() for side in "AB"]
            layer.register_forward_hook(hook(*pair))
    return model


def _calibrated_as(adapted: nn.Module, model: nn.Module) -> nn.Module:
    """The model, with the layers that were calibrated while the adapters were there."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, StaticQuantizedLinear | RoutedLinear):
            own: Any = adapted.get_submodule(f"base_model.model.{name}")
            model.set_submodule(name, copy.deepcopy(getattr(own, "base_layer", own)))
    return model


def lora_before(recipe: Recipe) -> None:
    """The base layers are rewritten, the adapters stay and train."""
    adapted = _adapted(llama(), "q_proj", "v_proj")
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    model = rewritten(recipe, adapted, batch())
    after = dict(model.named_parameters())
    lost = [n for n in adapters if n not in after or not after[n].requires_grad]
    gone = [n for n in lost if ".layers.1." not in n] if recipe.name == "RemoveBlocks" else lost
    assert not gone, f"{len(gone)} of {len(adapters)} adapters were rewritten"
    want = _beside(_calibrated_as(model, ready(recipe, llama)), adapters)
    assert_close(outputs(model, batch(3)), outputs(want, batch(3)))
    trained = gradients(model, batch())
    assert all(trained[n].abs().sum() > 0 for n in adapters if n in after)


def lora_after(recipe: Recipe) -> None:
    """Adapters over the rewritten layers add what they say, and merging changes nothing more."""
    adapted = _adapted(ready(recipe, llama), "q_proj", "up_proj", "down_proj")
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    want = outputs(_beside(ready(recipe, llama), adapters), batch(3))
    assert_close(outputs(adapted, batch(3)), want)
    trained = gradients(adapted, batch())
    assert all(trained[n].abs().sum() > 0 for n in adapters)
    merged = adapted.eval().merge_and_unload()
    assert not any("lora_" in n for n, _ in merged.named_modules())
    floor = 20.0 if any(p.phase.name == "PRECISION" for p in recipe.passes) else EXACT
    if any(p.needs_calibration for p in recipe.passes):
        floor = 15.0  # what adapters add may lie beyond the range; without them it is 9
    assert sqnr(outputs(merged, batch(3)), want) >= floor, "merging lost the adapters"


# training loops

STEPS, RATE = 3, 0.1


def _labelled() -> dict[str, Tensor]:
    return {**batch(), "labels": torch.tensor([0, 1, 2, 0])}


def _rows() -> list[dict[str, Tensor]]:
    given = _labelled()
    return [{name: values[i] for name, values in given.items()} for i in range(4)]


def _by_hand(recipe: Recipe) -> dict[str, Tensor]:
    """The parameters after a few steps of plain SGD."""
    model = ready(recipe, bert).train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    given = _labelled()
    labels = given.pop("labels")
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(**given).logits, labels).backward()
        optimizer.step()
    return _moved(model, recipe)


def _moved(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """How far each parameter went from where training began."""
    start = dict(ready(recipe, bert).named_parameters())
    return {n: p.detach() - start[n].detach() for n, p in model.named_parameters()}


def hf_trainer(recipe: Recipe) -> None:
    from transformers import Trainer, TrainingArguments

    model = ready(recipe, bert)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=4, max_grad_norm=0.0,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=_rows(), optimizers=(optimizer, constant)).train()
    assert_close(_moved(model, recipe), _by_hand(recipe))


def lightning_trainer(recipe: Recipe) -> None:
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, given: dict[str, Tensor], index: int) -> Tensor:
            labels = given.pop("labels")
            return F.cross_entropy(self.model(**given).logits, labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), RATE)

    model = ready(recipe, bert)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Task(model.train()), DataLoader(_rows() * STEPS, batch_size=4))
    assert_close(_moved(model, recipe), _by_hand(recipe))


# memory


def _saved_bytes(model: nn.Module, given: Any) -> int:
    """What a training step keeps for its backward, the model's own tensors left out."""
    held = [*model.parameters(), *model.buffers()]
    saved, loss = saved_bytes(lambda: loss_of(model.train(), given), held)
    return saved if loss.requires_grad else 0


def gradient_checkpointing(recipe: Recipe) -> None:
    """The same gradients, and less kept for the backward."""
    plain, model = ready(recipe, bert), ready(recipe, bert)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(gradients(model, batch()), gradients(plain, batch()))
    assert _saved_bytes(model, batch()) < _saved_bytes(plain, batch()), "nothing is recomputed"


def memory_budget(recipe: Recipe) -> None:
    """The same gradients, within the planned peak and below that of the model alone."""
    from _tracker import Tracker

    x = random(256, 16)
    model = rewritten(recipe, net(), x, memory_budget=0.9).train()
    plain = rewritten(recipe, net(), x).train()
    assert_close(gradients(model, x), gradients(plain, x))
    peaks = []
    for run in (model, plain):
        run.zero_grad()
        with Tracker(given=[*run.parameters(), *run.buffers(), x]) as tracker:
            loss_of(run, x).backward()
        peaks.append(tracker.peak)
    assert peaks[0] < peaks[1], f"a peak of {peaks[0]} bytes, and {peaks[1]} without the budget"


# calls


def generate(recipe: Recipe) -> None:
    """Greedy decoding with a cache gives the tokens of the model called on the whole text."""
    model, text = ready(recipe, llama), ids(2, 5)
    greedy = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    got = model.generate(text, attention_mask=torch.ones_like(text), **greedy)
    want = text
    for _ in range(5):
        given = {"input_ids": want, "attention_mask": torch.ones_like(want)}
        want = torch.cat([want, outputs(model, given)[:, -1:].argmax(-1)], 1)
    assert_equal(got, want)


def _function(model: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return (lambda w, x: functional_call(model, w, (x,))), weights


def func_grad(recipe: Recipe) -> None:
    model, x = ready(recipe, net), random(4, 16).requires_grad_()
    call, weights = _function(model)
    loss_of(model, x).backward()
    got = torch.func.grad(lambda w, v: loss_of(lambda u: call(w, u), v), argnums=(0, 1))(
        weights, x.detach()
    )
    assert_close(got[1], x.grad)
    assert_close(got[0], {n: p.grad for n, p in model.named_parameters()})


def func_jvp(recipe: Recipe) -> None:
    """⟨v, J·u⟩ = ⟨Jᵀ·v, u⟩, with Jᵀ·v as the backward gives it."""
    model, x = ready(recipe, net), random(4, 16).requires_grad_()
    call, weights = _function(model)
    loss_of(model, x).backward()
    along = tree_map(torch.cos, weights), random(4, 16, seed=1)
    out, moved = torch.func.jvp(call, (weights, x.detach()), along)
    cotangent = torch.linspace(-1, 1, out.numel()).view_as(out)
    want = (x.grad * along[1]).sum()
    want = want + sum((p.grad * along[0][n]).sum() for n, p in model.named_parameters())
    assert_reordered((cotangent * moved).sum(), want, recipe.dtype)


def func_vmap(recipe: Recipe) -> None:
    """Per-sample gradients, as a loop gives them."""
    model, x = ready(recipe, net), random(4, 16)
    call, weights = _function(model)

    def loss(w: dict[str, Tensor], row: Tensor) -> Tensor:
        return loss_of(lambda u: call(w, u), row[None])

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i, row in enumerate(x):
        assert_close({n: g[i] for n, g in got.items()}, gradients(model, row[None]))


CLIENTS: Mapping[str, Callable[[Recipe], None]] = {
    "`save`, `load`": save_and_load,
    "`copy.deepcopy`": deep_copy,
    "`pickle`": pickled,
    "`torch.compile`, forward and backward": torch_compile,
    "`torch.compile` with Inductor, forward": inductor,
    "`torch.export`, saved and loaded": torch_export,
    "`torch.onnx.export`, in ONNX Runtime": onnx_export,
    '`rewriter.export(format="onnx")`': our_onnx,
    "tied weights": tied_weights,
    "LoRA, then rewritten": lora_before,
    "rewritten, then LoRA and merged": lora_after,
    "transformers' `Trainer`": hf_trainer,
    "Lightning's `Trainer`": lightning_trainer,
    "gradient checkpointing": gradient_checkpointing,
    "`memory_budget`": memory_budget,
    "`generate` with a cache": generate,
    "`torch.func.grad`": func_grad,
    "`torch.func.jvp`": func_jvp,
    "`torch.func.vmap`": func_vmap,
}
