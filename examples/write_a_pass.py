"""A pass of your own, in under 20 lines: replaces a linear layer by two thin ones.

Run it with `python examples/write_a_pass.py`.
"""

from __future__ import annotations

# [pass]
from dataclasses import dataclass

import torch
from torch import nn

from rewriter import LINEAR, Pass, Replacement, Site, Skip, rewrite


@dataclass(frozen=True)
class LowRank(Pass):
    """W ≈ U·V with U [out, rank], V [rank, in], from the truncated SVD."""

    matches = (LINEAR,)
    rank: int = 8

    def propose(self, site: Site) -> Replacement | Skip:
        if self.rank * (site.in_features + site.out_features) >= site.weight.numel():
            return Skip("rank {} saves nothing", self.rank)
        u, s, v = torch.linalg.svd(site.weight.detach(), full_matrices=False)
        first = nn.Linear(site.in_features, self.rank, bias=False)
        second = nn.Linear(self.rank, site.out_features, bias=site.bias is not None)
        first.weight.data = (s[: self.rank, None] * v[: self.rank]).contiguous()
        second.weight.data = u[:, : self.rank].contiguous()
        second.bias = site.bias
        error = float(s[self.rank :].norm() / s.norm())
        return Replacement(nn.Sequential(first, second), error=error)


# [/pass]


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimized = rewrite(model, [LowRank(rank=8)], torch.randn(4, 64))
    print(optimized.report)
    print(optimized)


if __name__ == "__main__":
    main()
