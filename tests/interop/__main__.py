"""Runs the table and writes docs/interop.md; `--only TEXT` prints the clients named like that,
`--columns TEXT` the columns; `--part NAME` runs one of the tables of the page and needs `--out`."""

from __future__ import annotations

import argparse
import pathlib

import torch

from interop import clients, group
from interop.recipes import RECIPES
from interop.table import markdown, run

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "interop.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="interop", description=__doc__)
    parser.add_argument("--only", default="", help="clients whose name holds this; prints them")
    parser.add_argument("--columns", default="", help="passes whose name holds this; prints them")
    parser.add_argument("--part", help="one table of the page; needs --out")
    parser.add_argument("--out", type=pathlib.Path, default=PAGE, help="where to write the page")
    given = parser.parse_args()
    printed = bool(given.only or given.columns)
    if given.part and given.out == PAGE and not printed:
        parser.error("a part of the page is not the page: give another --out")
    torch.set_num_threads(1)
    names = [n for n in [*clients.CLIENTS, *group.CLIENTS] if given.only.lower() in n.lower()]
    columns = [
        r for r in RECIPES
        if given.columns.lower() in r.name.lower() and given.part in (None, r.part)
    ]  # fmt: skip
    page = markdown(run(names, columns, said=True), columns)
    if printed:
        print(page)
    else:
        given.out.write_text(page)


if __name__ == "__main__":
    main()
