"""DDP, FSDP2 and tensor parallel over rewritten models: two processes with gloo."""

from __future__ import annotations

import pathlib

import pytest
import torch.distributed as dist
from ranks import ddp, fsdp, fsdp_in_bfloat16, on_two_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]


def test_a_step_equals_that_of_one_process(tmp_path: pathlib.Path) -> None:
    on_two_ranks([ddp, fsdp, fsdp_in_bfloat16], tmp_path)
