"""Monarch of order p, MM* and (MM*)²: the class, its projection, and exact constructions."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import networkx
import numpy
import pytest
import torch
from closeness import assert_reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from rewriter import OptionError, Site, Skip, load, rewrite
from rewriter.kernels.monarch import monarch_dense
from rewriter.kernels.monarch_chain import (
    chain_dense,
    chain_grid,
    chain_linear,
    chain_project,
    chain_shapes,
    star_axes,
)
from rewriter.kernels.monarch_project import monarch_project
from rewriter.kernels.monarch_star import star_factorise, star_project
from rewriter.passes import MonarchChain, MonarchChainLinear

M = 4
N = M * M
OUTER, INNER = 0, 1
COMPLEX = torch.complex128


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# The class ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(1, 3000), st.integers(2, 4))
def test_grids_hold_the_size_and_little_more(size: int, order: int) -> None:
    grid = chain_grid(size, order)
    product = int(numpy.prod(grid))
    assert len(grid) == order
    assert size <= product < size + sum(product // side for side in grid)
    root = round(size ** (1 / order))
    if root**order == size:
        assert grid == (root,) * order


def test_a_mix_is_the_formula() -> None:
    x, factor = torch.randn(5, 2, 3, 4).double(), torch.randn(2, 4, 6, 3).double()
    y = chain_linear(x.flatten(1), [factor], [1], (2, 3, 4), None, 48)
    assert_close(y.view(5, 2, 6, 4), torch.einsum("acoi,baic->baoc", factor, x))


def test_order_two_is_monarch_of_rank_one() -> None:
    weight = torch.randn(N, N).double()
    factors, error = chain_project(weight, (M, M), (M, M))
    right, left, want = monarch_project(weight, M, 1, interleaved=True)
    assert error == pytest.approx(want)
    dense = chain_dense(factors, [1, 0], (M, M), N, N)
    assert_close(dense, monarch_dense(right, left, N, N, interleaved=True))


@pytest.mark.parametrize("sizes", [(27, 27, 3), (16, 81, 4), (30, 20, 3), (7, 11, 2)])
def test_projection_is_exact_in_the_class(sizes: tuple[int, int, int]) -> None:
    layer = MonarchChainLinear(*sizes, bias=False, dtype=torch.float64)
    weight = layer.dense_weight().detach()
    factors, error = chain_project(weight, layer.grid, chain_grid(sizes[1], sizes[2]))
    assert error is not None
    assert error < 1e-7
    assert [f.shape for f in factors] == [f.shape for f in layer.factors]
    other = torch.randn_like(weight)
    assert 0 < (chain_project(other, layer.grid, chain_grid(sizes[1], sizes[2]))[1] or 0) < 1


@settings(max_examples=15)
@given(st.integers(2, 6), st.integers(2, 6), st.booleans())
def test_mmstar_is_factorised_exactly(outer: int, inner: int, complex_: bool) -> None:
    grid, n = (outer, inner), outer * inner
    dtype = COMPLEX if complex_ else torch.float64
    torch.manual_seed(n)
    made = [torch.randn(s, dtype=dtype) for s in chain_shapes([0, 1, 0], grid, grid)]
    weight = chain_dense(made, [0, 1, 0], grid, n, n)
    factors = star_factorise(weight, grid)
    assert factors is not None
    lost = chain_dense(factors, [0, 1, 0], grid, n, n) - weight
    assert float(lost.norm() / weight.norm()) < 1e-6
    if not complex_:
        assert star_project(weight, [0, 1, 0], grid)[1] == pytest.approx(0, abs=1e-6)


def test_factorisation_says_where_it_cannot() -> None:
    """Permutations have singular blocks; other matrices have complex eigenvectors, or give factors
    of something else."""
    assert star_factorise(torch.eye(N)[torch.randperm(N)], (M, M)) is None
    other = torch.randn(N, N).double()
    factors = star_factorise(other, (M, M))
    if factors is not None:
        assert float((chain_dense(factors, [0, 1, 0], (M, M), N, N) - other).norm()) > 0.1
    with pytest.raises(ValueError, match=r"wants a weight \[16, 16\]"):
        star_factorise(torch.randn(4, 4), (M, M))


@pytest.mark.parametrize("sizes", [(64, 64), (30, 20), (40, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_factors_come_closer(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Monarch ⊂ MM* ⊂ (MM*)²: each starts at the one before it, and every step lowers the error."""
    weight = torch.randn(*sizes).to(dtype)
    grid = chain_grid(max(sizes), 2)
    errors = [chain_project(weight, grid, grid)[1]]
    for power in (1, 2):
        axes = star_axes(power)
        once = star_project(weight, axes, grid, sweeps=1)[1]
        factors, error = star_project(weight, axes, grid)
        lost = chain_dense([f.double() for f in factors], axes, grid, *sizes) - weight.double()
        found = float(lost.norm() / weight.double().norm())
        assert found == pytest.approx(error, abs=0.02 if dtype == torch.bfloat16 else 1e-5)
        assert once is not None
        assert error is not None
        assert error <= once
        errors.append(error)
    assert errors[0] > errors[1] > errors[2]
    assert star_project(weight.to("meta"), star_axes(2), grid)[1] is None


@pytest.mark.parametrize("options", [{"order": 3}, {"stars": 1}, {"stars": 2, "expansion": 2}])
@pytest.mark.parametrize("sizes", [(27, 64), (13, 7)])
def test_layers_compute_their_dense_weight(options: dict[str, int], sizes: tuple[int, int]) -> None:
    layer = MonarchChainLinear(*sizes, **options, dtype=torch.float64)
    x = torch.randn(2, 5, sizes[0], dtype=torch.float64, requires_grad=True)
    y, want = layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias)
    assert_close(y, want)
    inputs = [x, *layer.parameters()]
    g = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, inputs, g), torch.autograd.grad(want, inputs, g))
    assert bool((layer.dense_weight() != 0).all())  # no pair of places is disconnected
    with FlopCounterMode(display=False) as counter:
        layer(x.detach())
    assert counter.get_total_flops() == 2 * 10 * sum(f.numel() for f in layer.factors)
    fresh = MonarchChainLinear(**layer.config(), dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)


@pytest.mark.parametrize("options", [{"order": 3}, {"stars": 1}, {"stars": 2}])
def test_random_init_has_the_scale_of_nn_linear(options: dict[str, int]) -> None:
    layer = MonarchChainLinear(500, 300, **options)
    with torch.no_grad():
        std = (layer(torch.randn(3000, 500)) - layer.bias).std().item()
    assert std == pytest.approx(3**-0.5, rel=0.08)


def test_parameters_grow_as_the_theory_says() -> None:
    """p·n^(1+1/p), and (2w + 1)·n^1.5."""
    for order, count in ((2, 2 * 4096**1.5), (3, 3 * 4096 ** (4 / 3)), (4, 4 * 4096**1.25)):
        layer = MonarchChainLinear(4096, 4096, order, bias=False, device="meta")
        assert sum(p.numel() for p in layer.parameters()) == round(count)
    layer = MonarchChainLinear(4096, 4096, stars=2, bias=False, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == 5 * 4096**1.5


# Exact constructions (Dao et al. 2022, appendix), each as mixes of an M×M grid -------------------


def star(*mixes: Tensor) -> Tensor:
    """The matrix of outer, inner, outer, … mixes, each [place on the other axis, o, i]."""
    axes = star_axes(len(mixes) // 2)
    return chain_dense([m.to(COMPLEX) for m in mixes], axes, (M, M), N, N)


def root(n: int, power: Tensor) -> Tensor:
    return torch.exp(-2j * torch.pi * power.to(COMPLEX) / n)


def dft(n: int) -> Tensor:
    i = torch.arange(n)
    return root(n, i[:, None] * i)


def same(matrix: Tensor) -> Tensor:
    return matrix.expand(M, M, M)


EYE = torch.eye(M)


def test_hadamard_is_one_outer_and_one_inner_mix() -> None:
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    h4 = torch.kron(h, h)
    assert_close(star(same(EYE), same(h4), same(h4)), torch.kron(h4, h4).to(COMPLEX))


def fourier_mixes() -> tuple[Tensor, Tensor]:
    """F·P as outer ∘ inner: F[l·M+j, i·M+k] = ω^((lM+j)(iM+k)) with the input read as (k, i)."""
    j = torch.arange(M)
    inner = same(dft(M))  # over i, for every k: ω_M^(j·i)
    # for every j, over k: ω_N^((lM + j)·k)
    outer = root(N, (j[None, :, None] * M + j[:, None, None]) * j)
    return inner, outer


def test_fourier_times_a_permutation_is_in_the_class() -> None:
    inner, outer = fourier_mixes()
    p = torch.arange(N).view(M, M).t().reshape(-1)
    assert_reordered(star(same(EYE), inner, outer), dft(N)[:, p])
    real = dft(N)[:, p].real.contiguous()
    assert monarch_project(real, M, 2, interleaved=True)[2] == pytest.approx(0, abs=1e-12)


def permutation_mixes(target: Tensor) -> list[Tensor]:
    """y[target[n]] = x[n] as outer, inner, outer (Clos): an edge colouring of the multigraph
    between input columns i and output columns j gives each value a row to travel in."""
    mixes = [torch.zeros(M, M, M) for _ in range(3)]
    left = [(n // M, n % M, int(t) // M, int(t) % M) for n, t in enumerate(target)]
    for row in range(M):
        graph = networkx.Graph()
        graph.add_nodes_from(range(M))
        graph.add_edges_from((i, M + j) for _, i, _, j in left)
        match = networkx.bipartite.maximum_matching(graph, range(M))
        for i in range(M):
            edge = next(e for e in left if e[1] == i and M + e[3] == match[i])
            left.remove(edge)
            k, _, out, j = edge
            mixes[0][i, row, k] = 1  # in column i from row k to its own row
            mixes[1][row, j, i] = 1  # along the row
            mixes[2][j, out, row] = 1  # in column j to where it belongs
    return mixes


def test_every_permutation_is_in_mm_star() -> None:
    for _ in range(20):
        target = torch.randperm(N)
        matrix = torch.zeros(N, N, dtype=COMPLEX)
        matrix[target, torch.arange(N)] = 1
        assert_close(star(*permutation_mixes(target)), matrix)


def test_the_fourier_transform_is_in_mm_star_squared() -> None:
    """F = (F·P)·P⁻¹ with F·P in M and P in MM*; mixes along one axis that meet are one."""
    p = torch.arange(N).view(M, M).t().reshape(-1)
    first = [m.to(COMPLEX) for m in permutation_mixes(p)]
    inner, outer = fourier_mixes()
    mixes = [*first, inner.to(COMPLEX), outer]
    assert_reordered(star(*mixes), dft(N))


def circulant(c: Tensor) -> Tensor:
    i = torch.arange(len(c))
    return c.to(COMPLEX)[(i[:, None] - i) % len(c)]


def circulant_mixes(c: Tensor) -> list[Tensor]:
    """Outer Fourier with twiddles, inner circulants, and back: ĉ[q + M·] on the inner axis."""
    q, f = torch.arange(M), dft(M)
    spectrum = torch.fft.fft(c.to(COMPLEX))
    back = f.conj().t()
    first = torch.stack([torch.diag(root(N, i * q)) @ f for i in range(M)])
    inner = torch.stack([back @ torch.diag(spectrum[int(j) + M * q]) @ f / N for j in q])
    last = torch.stack([back @ torch.diag(root(N, -i * q)) for i in range(M)])
    return [first, inner, last]


def test_circulant_matrices_are_in_mm_star() -> None:
    c = torch.randn(N).double()
    assert_reordered(star(*circulant_mixes(c)), circulant(c))


def test_toeplitz_matrices_are_a_crop_of_twice_the_size() -> None:
    n = N // 2
    t = torch.randn(2 * n - 1).double()
    i = torch.arange(n)
    want = t[i[:, None] - i + n - 1].to(COMPLEX)
    c = torch.cat([t[n - 1 :], torch.zeros(1).double(), t[: n - 1]])
    found = chain_dense(circulant_mixes(c), star_axes(1), (M, M), n, n)
    assert_reordered(found, want)


def test_afdf_is_in_mm_star() -> None:
    """A F⁻¹ D F with diagonal A and D: a circulant whose last mix takes A in."""
    a, c = torch.randn(N).double(), torch.randn(N).double()
    first, inner, last = circulant_mixes(c)
    rows = torch.stack([torch.diag(a[torch.arange(M) * M + i]).to(COMPLEX) for i in range(M)])
    want = torch.diag(a).to(COMPLEX) @ circulant(c)
    assert_reordered(star(first, inner, rows @ last), want)


def test_the_cosine_transform_is_a_scaled_fourier_of_a_permutation() -> None:
    """DCT-II of real x: 2 Re(e^(-iπk/2n) F v), v the even places, then the odd ones backwards."""
    order = torch.cat([torch.arange(0, N, 2), torch.arange(N - 1, 0, -2)])
    p = torch.arange(N).view(M, M).t().reshape(-1)
    target = torch.empty(N, dtype=torch.long)
    target[order[p]] = torch.arange(N)  # x → v → P⁻¹v in one permutation
    inner, outer = fourier_mixes()
    k = torch.arange(N)
    twist = root(4 * N, k).view(M, M)
    outer = torch.stack([torch.diag(twist[:, j]) @ outer[j] for j in range(M)])
    mixes = [*(m.to(COMPLEX) for m in permutation_mixes(target)), inner.to(COMPLEX), outer]
    want = 2 * torch.cos(torch.pi * (2 * k[None, :] + 1).double() * k[:, None] / (2 * N))
    assert_reordered(2 * star(*mixes).real, want)


# The pass ----------------------------------------------------------------------------------------


def test_the_pass_projects_saves_and_loads(tmp_path: pathlib.Path) -> None:
    model = nn.Sequential(nn.Linear(64, 125), nn.ReLU(), nn.Linear(125, 27)).eval()
    x = torch.randn(6, 64)
    optimized = rewrite(model, [MonarchChain(3)], x)
    assert [d.action for d in optimized.report.steps[-1].decisions] == ["replaced"] * 2
    assert all(0 < (d.error or 0) < 1 for d in optimized.report.replaced)
    optimized.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", model)(x), optimized(x))
    stars = rewrite(model, [MonarchChain(stars=1, init="random", where="0")], x)
    assert "forgotten" in stars.report.replaced[0].reason
    stars(x).sum().backward()
    assert rewrite(model.to("meta"), [MonarchChain()], x.to("meta")).report.replaced


def test_a_member_of_the_class_comes_back() -> None:
    linear = nn.Linear(27, 64)
    linear.weight.data = MonarchChainLinear(27, 64, 3).dense_weight().detach()
    answer = MonarchChain(3).propose(Site.of(linear))
    assert not isinstance(answer, Skip)
    assert answer.error == pytest.approx(0, abs=1e-3)
    assert answer.layer.bias is linear.bias


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1}, "order must be an integer from 2 to 64"),
        ({"stars": -1}, "stars must be"),
        ({"stars": 1, "expansion": 0}, "expansion must be"),
        ({"expansion": 2}, "expansion=2 is for stars"),
        ({"stars": 1, "expansion": 10**400}, "expansion must be an integer from 1 to 64"),
        ({"init": "best"}, "MonarchChain: init='best' is unknown; there are project, random"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MonarchChain(**options)


def test_what_would_not_shrink_is_left() -> None:
    answer = MonarchChain(stars=2).propose(Site.of(nn.Linear(8, 8)))
    assert isinstance(answer, Skip)
    assert "would hold" in answer.reason
    with pytest.raises(OptionError, match="mixes a grid of two axes"):
        MonarchChainLinear(8, 8, order=3, stars=1)
    with pytest.raises(ValueError, match="does not mix axis 1 of the grid"):
        chain_linear(torch.randn(2, 4), [torch.randn(3, 2, 2)], [1], (2, 2), None, 4)
    assert chain_shapes([1, 0], (2, 3), (4, 5)) == [(2, 5, 3), (5, 4, 2)]
