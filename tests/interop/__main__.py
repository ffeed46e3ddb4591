"""Runs the table and writes docs/interop.md; `--only TEXT` prints the clients named like that."""

from __future__ import annotations

import argparse
import pathlib

import torch

from interop import clients, group
from interop.table import markdown, run

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "interop.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="interop", description=__doc__)
    parser.add_argument("--only", default="", help="clients whose name holds this; prints them")
    parser.add_argument("--out", type=pathlib.Path, default=PAGE, help="where to write the page")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = [n for n in [*clients.CLIENTS, *group.CLIENTS] if given.only.lower() in n.lower()]
    page = markdown(run(names, said=True))
    if given.only:
        print(page)
    else:
        given.out.write_text(page)


if __name__ == "__main__":
    main()
