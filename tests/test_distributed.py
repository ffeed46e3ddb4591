"""DDP, FSDP2 and tensor parallel over rewritten models: two processes with gloo."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch.distributed as dist
from ranks import ddp, fsdp, fsdp_in_bfloat16, on_two_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]


@pytest.mark.parametrize("check", [ddp, fsdp, fsdp_in_bfloat16], ids=lambda c: c.__name__)
def test_a_step_equals_that_of_one_process(
    check: Callable[[int, str, pathlib.Path], None], tmp_path: pathlib.Path
) -> None:
    on_two_ranks(check, tmp_path)
