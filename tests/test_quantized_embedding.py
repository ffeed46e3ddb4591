"""Embeddings in int8: what they look up, what their heads multiply by, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import pathlib
import pickle
from typing import Any

import pytest
import torch
from closeness import assert_equal, assert_reordered, sqnr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from rewriter import OptionError, RewriteWarning, load, rewrite
from rewriter.passes import Int4Embedding, Monarch, Quantize, QuantizedEmbedding, QuantizedLinear
from rewriter.passes.quantize import SCHEMES
from rewriter.sites import EMBEDDING, Site

ROWS = Quantize("int8-dynamic", embeddings=True)
IDS = torch.tensor([[3, 0, 19], [19, 7, 0]])


def propose(module: nn.Module, rewriting: Quantize = ROWS) -> Any:
    return rewriting.propose(Site.of(module))


def table(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(20, 6, dtype=dtype, **options)


class Tied(nn.Module):
    """A head that shares the weight of the embedding, as language models have it."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def tied(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Tied(**options).eval()


# the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_it_looks_up_rows_within_half_a_step(dtype: torch.dtype) -> None:
    dense = table(dtype)
    out = propose(dense)
    got, want = out.layer(IDS), dense(IDS).detach()
    assert got.dtype == dtype
    assert got.shape == want.shape
    step = dense.weight.detach().double().abs().amax(1) / 127
    # rounding of the result in its own dtype comes on top
    room = 0.5 * step[IDS].unsqueeze(-1) + want.double().abs() * torch.finfo(dtype).eps
    assert bool(((got.double() - want.double()).abs() <= room).all())
    assert_equal(got, out.layer.dense_weight()[IDS])
    assert 0 < out.error < 0.01
    assert "frozen" in out.note


def test_rows_of_a_float16_table_keep_their_step() -> None:
    """A step of 1e-5 would be a subnormal of two digits in float16."""
    dense = table(torch.float16)
    with torch.no_grad():
        dense.weight.mul_(1e-3)
    assert sqnr(propose(dense).layer(IDS), dense(IDS)) > 38


@pytest.mark.parametrize("value", [0.0, 1e-45, 1.0, -3e38])
def test_constant_rows(value: float) -> None:
    dense = table()
    with torch.no_grad():
        dense.weight[3] = value
    got = propose(dense).layer(torch.tensor([3]))
    assert_close(got, torch.full((1, 6), 0.0 if abs(value) < 1e-40 else value))


def test_no_columns_and_no_ids() -> None:
    assert propose(nn.Embedding(4, 0)).layer(IDS % 4).shape == (2, 3, 0)
    assert propose(table()).layer(torch.empty(0, dtype=torch.int64)).shape == (0, 6)


def test_an_index_beyond_the_rows_is_an_error() -> None:
    with pytest.raises(IndexError):
        propose(table()).layer(torch.tensor([20]))


def test_it_is_an_embedding_to_who_asks_and_loses_no_write() -> None:
    layer = propose(table(padding_idx=-1, sparse=True, scale_grad_by_freq=False)).layer
    assert isinstance(layer, nn.Embedding)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (20, 6, 19)
    assert (layer.max_norm, layer.sparse, layer.scale_grad_by_freq) == (None, True, False)
    want = layer.dense_weight() + 1
    with pytest.warns(RewriteWarning, match="20×6, was written to, and rounded to its form"):
        layer.weight.data += 1
    assert_equal(
        layer.qweight, type(layer).from_embedding(nn.Embedding(20, 6, _weight=want)).qweight
    )
    with pytest.warns(RewriteWarning, match="20×6, was written to: it is an nn.Embedding now"):
        layer.weight = nn.Parameter(want)
    assert type(layer) is nn.Embedding
    assert_equal(layer(IDS), F.embedding(IDS, want))
    assert layer.padding_idx == 19
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    assert "bias" not in layer._parameters
    repr(layer)


def test_round_trips() -> None:
    layer = propose(table(padding_idx=2)).layer
    want = layer(IDS)
    assert_equal(copy.deepcopy(layer)(IDS), want)
    assert_equal(pickle.loads(pickle.dumps(layer))(IDS), want)
    again = type(layer)(**layer.config())
    again.load_state_dict(layer.state_dict())
    assert_equal(again(IDS), want)
    half = copy.deepcopy(layer).half()
    assert half(IDS).dtype == torch.float16
    assert half.qweight.dtype == torch.int8


def test_compile_export_and_vmap() -> None:
    layer = propose(table()).layer.eval()
    want = layer(IDS)
    assert_equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(IDS), want)
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(layer, (IDS,), dynamic_shapes=sizes)
    assert_equal(exported.module()(IDS[:1].expand(5, 3)), want[:1].expand(5, 3, 6))
    assert_equal(torch.vmap(layer)(IDS), want)


def test_under_autocast_rows_keep_their_dtype_as_those_of_an_embedding_do() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert propose(table()).layer(IDS).dtype == table()(IDS).dtype == torch.float32


def test_meta() -> None:
    out = propose(nn.Embedding(20, 6, device="meta"))
    assert out.error is None
    assert all(t.is_meta for t in out.layer.state_dict().values())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_4_bits(dtype: torch.dtype, symmetric: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Embedding(20, 40, padding_idx=3, dtype=dtype)  # no multiple of the group
    out = propose(
        dense, Quantize("int4-weight", embeddings=True, group_size=32, symmetric=symmetric)
    )
    layer = out.layer
    assert isinstance(layer, Int4Embedding)
    assert layer.qweight.shape == (20, 32)
    got = layer(IDS)
    assert got.dtype == dtype
    assert sqnr(got, dense(IDS)) > 18
    assert_equal(got, layer.dense_weight()[IDS])
    again = type(layer)(**layer.config(), dtype=dtype)
    again.load_state_dict(layer.state_dict())
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(other(IDS), got)
    assert copy.deepcopy(layer).half()(IDS).dtype == torch.float16
    exported = torch.export.export(layer.eval(), (IDS,))
    assert_equal(exported.module()(IDS), got)


def test_a_table_of_4_bits_that_is_written_to_is_rounded() -> None:
    layer = propose(nn.Embedding(20, 8), Quantize("int4-weight", embeddings=True)).layer
    want = layer.dense_weight() + 1
    with pytest.warns(RewriteWarning, match="rounded to its form"):
        layer.weight.data += 1
    rounded = Int4Embedding.from_embedding(nn.Embedding(20, 8, _weight=want))
    assert_equal(layer(IDS), rounded(IDS))
    with pytest.warns(RewriteWarning, match="it is an nn.Embedding now"):
        layer.weight = nn.Parameter(want)
    assert_equal(layer(IDS), F.embedding(IDS, want))


# the pass


def test_embeddings_stay_unless_asked() -> None:
    assert EMBEDDING in ROWS.kinds
    assert EMBEDDING not in Quantize().kinds
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 4)).eval()
    made = rewrite(model, [Quantize()], IDS)
    assert type(made[0]) is nn.Embedding
    (look,) = [d for d in made.report.skipped if d.site == "0"]
    assert (
        look.reason == "an Embedding looks rows up and multiplies nothing: no pass here takes one; "
        'Quantize("int8-dynamic", embeddings=True) does'
    )


def test_a_max_norm_is_refused() -> None:
    answer = propose(table(max_norm=1.0))
    assert answer.reason == "max_norm=1.0 rescales its rows while it looks them up"


def test_option_errors() -> None:
    with pytest.raises(OptionError, match="embeddings must be True or False, not 1"):
        Quantize(embeddings=1)
    with pytest.raises(OptionError, match="QuantizedEmbedding: activation"):
        QuantizedEmbedding(4, 2, activation="x")
    with pytest.raises(OptionError, match="Int4Embedding: group_size"):
        Int4Embedding(4, 2, group_size=5)
    with pytest.raises(OptionError, match="padding_idx=4 is none of 4 rows"):
        QuantizedEmbedding(4, 2, padding_idx=4)
    assert str(Quantize.parse("int8-dynamic,embeddings=true")) == str(ROWS)
    assert "embeddings" in SCHEMES["int8-dynamic"].options


def test_a_rewritten_model_is_saved_loaded_and_given_other_weights(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 4)).eval()
    made = rewrite(model, [ROWS], IDS)
    (row,) = [d for d in made.report.replaced if d.site == "0"]
    assert (row.before.param_bytes, row.after.param_bytes) == (20 * 8 * 4, 20 * 8 + 20 * 4)
    made.save(tmp_path)
    assert_equal(load(tmp_path, model)(IDS), made(IDS))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(3)
    made.load_original(other.state_dict())
    assert_equal(made(IDS), rewrite(other, [ROWS], IDS)(IDS))


def test_the_objective_of_latency_times_it_on_ids() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4)).eval()
    made = rewrite(model, [Quantize(embeddings=True, where="0")], IDS, objective="latency")
    looks = [d for d in made.report.decisions if d.site == "0"]
    assert all("measured" in d.reason for d in looks if d.action == "declined")
    assert {d.action for d in looks} <= {"declined", "replaced"}


def test_calibration_asks_nothing_of_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8)).eval()
    rewrite(model, [Monarch(nblocks=2), ROWS], IDS, calibration=[IDS, IDS])


# a tied head


def test_a_tied_head_and_its_embedding_are_one_quantized_tensor(tmp_path: Any) -> None:
    model = tied()
    made = rewrite(model, [ROWS], IDS)
    assert made.head is made.embed
    assert isinstance(made.embed, QuantizedEmbedding)
    # by one scale a row: what the head would be by itself
    alone = QuantizedLinear.from_weight(model.head.weight, None)
    x = torch.randn(5, 8)
    assert_equal(made.head(x), alone(x))
    assert sqnr(made(IDS), model(IDS)) > 35
    assert {d.reason for d in made.report.replaced if d.site == "head"} == {"tied to embed"}
    for other in (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        copy.deepcopy(made).float(),
    ):
        assert other.head is other.embed
        assert_equal(other(IDS), made(IDS))
    made.save(tmp_path)
    again = load(tmp_path, tied())
    assert again.head is again.embed
    assert_equal(again(IDS), made(IDS))
    assert (
        sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 2 * (20 * 8 + 8 * 8) + 800
    )


@pytest.mark.parametrize(
    ("scheme", "floor"), [("int8-weight", 38), ("int4-weight", 14), ("int4-dynamic", 14)]
)
def test_other_schemes_share_their_integers_too(scheme: str, floor: float, tmp_path: Any) -> None:
    model = tied()
    made = rewrite(model, [Quantize(scheme, embeddings=True)], IDS)
    assert made.head is made.embed
    x = torch.randn(5, 8)
    alone = Quantize(scheme).propose(Site.of(nn.Linear(8, 20, bias=False))).layer
    alone = type(alone).from_weight(model.head.weight, None, *_of_head(alone))
    assert_reordered(made.head(x), alone(x))
    assert sqnr(made(IDS), model(IDS)) > floor
    made.save(tmp_path)
    assert_equal(load(tmp_path, tied())(IDS), made(IDS))


def _of_head(layer: Any) -> tuple[Any, ...]:
    names = ("group_size", "symmetric", "dynamic")
    return tuple(getattr(layer, n) for n in names if hasattr(layer, n))


def test_static_int8_takes_embeddings_too() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4)).eval()
    rewriting = Quantize("int8-static", embeddings=True)
    made = rewrite(model, [rewriting], IDS, calibration=[IDS, IDS])
    assert [type(m).__name__ for m in made] == ["QuantizedEmbedding", "StaticQuantizedLinear"]


@pytest.mark.parametrize("left_out", ["", "embed.weight", "head.weight"])
def test_a_checkpoint_of_a_tied_model_goes_through_the_same_rewrite(left_out: str) -> None:
    made, other = rewrite(tied(), [ROWS], IDS), tied()
    with torch.no_grad():
        other.embed.weight.mul_(2)
    state = {k: v for k, v in other.state_dict().items() if k != left_out}
    made.load_original(state)
    assert_equal(made(IDS), rewrite(other, [ROWS], IDS)(IDS))


def test_a_tied_head_takes_gradients_through() -> None:
    made = rewrite(tied(), [ROWS], IDS)
    x = torch.randn(3, 8, requires_grad=True)
    (got,) = torch.autograd.grad(made.head(x).sum(), x)
    assert_close(got, made.head.dense_weight().sum(0).expand_as(x))


@pytest.mark.parametrize("rewriting", [Quantize(), Quantize(embeddings=True, where="embed")])
def test_half_of_a_tie_is_left_with_the_reason(rewriting: Quantize) -> None:
    model = tied()
    made = rewrite(model, [rewriting], IDS)
    assert made.head.weight is made.embed.weight
    assert type(made.head) is nn.Linear
    reasons = {d.site: d.reason for d in made.report.skipped}
    whole = "rewritten together or not at all"
    assert whole in reasons["head"] or whole in reasons["embed"]


def test_a_tied_head_with_a_bias_stays_tied() -> None:
    made = rewrite(tied(bias=True), [ROWS], IDS)
    assert made.head.weight is made.embed.weight
    assert "rewritten together or not at all" in next(
        d.reason for d in made.report.skipped if d.site == "head"
    )


def test_the_reason_of_a_skipped_head_names_the_options() -> None:
    made = rewrite(tied(), [Quantize()], IDS)
    (reason,) = (d.reason for d in made.report.skipped if d.site == "head")
    assert reason == (
        "its weight is tied to embed.weight: rewritten together or not at all (untie=True gives it "
        "weights of its own, embeddings=True rounds both where that is possible)"
    )


def test_a_head_is_cut_off_where_the_user_says_so() -> None:
    made = rewrite(tied(), [Quantize(untie=True)], IDS)
    assert type(made.embed) is nn.Embedding
    (head,) = (d for d in made.report.decisions if d.site == "head" and d.changed)
    assert "embed.weight keeps the weight that it was tied to: the tie is cut" in head.reason


class ByHand(nn.Module):
    """The head is a function of the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.body(self.embed(ids)), self.embed.weight)


def test_an_embedding_that_code_reads_as_a_head_stays() -> None:
    torch.manual_seed(0)
    model = ByHand().eval()
    made = rewrite(model, [ROWS], IDS)
    assert type(made.embed) is nn.Embedding
    assert sqnr(made(IDS), model(IDS)) > 30
    reasons = {d.site: d.reason for d in made.report.skipped}
    assert set(reasons) == {"embed", "embed.weight"}
    assert all("rewritten together or not at all" in r for r in reasons.values())


# on disk


@pytest.mark.slow
def test_minilm_with_its_embeddings_takes_27_percent_on_disk_and_16_in_4_bits(
    tmp_path: Any,
) -> None:
    path = pathlib.Path(__file__).parents[1] / "examples/_data.py"
    spec = importlib.util.spec_from_file_location("data_of_examples", path)
    data: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    model = data.load_minilm()[0].eval()
    given = {"input_ids": torch.arange(1000, 1016)[None]}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    dense = sum(t.numel() * t.itemsize for t in model.state_dict().values())
    made = rewrite(model, [ROWS], given)
    made.save(tmp_path)
    taken = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert taken <= 0.27 * dense, taken / dense
    with torch.no_grad():
        got, want = made(**given)[0], model(**given)[0]
    assert F.cosine_similarity(got.mean(1), want.mean(1)) > 0.995
    small = rewrite(model, [Quantize("int4-weight", embeddings=True)], given)
    small.save(tmp_path / "4")
    assert sum(f.stat().st_size for f in (tmp_path / "4").iterdir()) <= 0.16 * dense
    tokenizer = data.load_minilm()[1]
    for score, whole in ((data.wordsim, data.WORDSIM_DENSE), (data.simlex, data.SIMLEX_DENSE)):
        assert score(made, tokenizer) == pytest.approx(whole, abs=0.005)
        assert score(small, tokenizer) > whole - 0.03
