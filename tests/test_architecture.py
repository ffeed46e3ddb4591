"""The shape of the code base: who may import whom, who may mutate, and what a pass is made of.

That every pass also appears in README.md or an example is checked where those are tested.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import rewriter
import rewriter.passes
from rewriter.base import Layer, Pass, Phase
from rewriter.errors import OptionError
from rewriter.kernels import ops
from rewriter.kernels.ops import Record

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {"rewriter": "rewriter", "passes": "rewriter.passes", "kernels": "rewriter.kernels"}
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PASSES = [
    value
    for value in (getattr(rewriter.passes, name) for name in rewriter.passes.__all__)
    if issubclass(value, Pass)
]


def imports(path: pathlib.Path, package: str) -> Iterator[str]:
    """Every module of ours that a file imports, wherever in the file; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split("."))], base]).strip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] in (*FOLDERS, "tests", "benchmarks"))


def starts(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def in_folder(folder: str) -> list[str]:
    return [name for name in FILES if name.startswith(f"{folder}/")]


@pytest.mark.parametrize("name", in_folder("kernels"))
def test_kernels_import_kernels_only(name: str) -> None:
    for imported in imports(FILES[name], "rewriter.kernels"):
        assert starts(imported, "rewriter.kernels"), imported


@pytest.mark.parametrize("name", in_folder("passes"))
def test_passes_import_what_they_may(name: str) -> None:
    for imported in imports(FILES[name], "rewriter.passes"):
        assert starts(
            imported,
            "rewriter.kernels",
            "rewriter.passes",
            "rewriter.errors",
            "rewriter.base",
            "rewriter.sites",
            "rewriter.cost",
        ), imported


@pytest.mark.parametrize("name", in_folder("rewriter"))
def test_the_rewriter_imports_no_pass(name: str) -> None:
    package = "rewriter" if name.count("/") == 1 else "rewriter." + name.split("/")[1]
    for imported in imports(FILES[name], package):
        assert starts(imported, "rewriter"), imported
        assert not starts(imported, "rewriter.passes"), imported
        assert not starts(imported, "rewriter.kernels") or starts(imported, "rewriter.kernels.ops")
    # layers by name, from an allow-list; what the command line names
    allowed = (
        "rewriter/recipe/names.py",
        "rewriter/recipe/parse.py",
        "rewriter/store/old_names.py",
    )
    if name not in allowed:
        assert "import_module" not in FILES[name].read_text()


MUTATORS = {
    "setattr", "delattr", "__setattr__", "add_module", "register_module", "set_submodule",
    "erase_node", "node_copy", "create_node", "call_module", "call_function", "call_method",
    "inserting_before", "inserting_after", "replace_all_uses_with", "replace_input_with",
    "eliminate_dead_code", "recompile",
}  # fmt: skip


@pytest.mark.parametrize("name", in_folder("passes"))
def test_passes_mutate_nothing(name: str) -> None:
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in MUTATORS | {"graph"}, (node.lineno, node.attr)
        elif isinstance(node, ast.Name):
            assert node.id not in MUTATORS, (node.lineno, node.id)


@pytest.mark.parametrize("name", FILES)
def test_no_placeholders_and_no_swallowed_exceptions(name: str) -> None:
    text = FILES[name].read_text()
    assert "TODO" not in text
    assert "FIXME" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            empty = all(isinstance(s, ast.Pass | ast.Continue) for s in node.body)
            assert not (broad and empty), node.lineno


def test_every_pass_file_is_exported() -> None:
    exported = {p.__module__ for p in PASSES}
    assert exported == {
        f"rewriter.passes.{pathlib.Path(n).stem}"
        for n in in_folder("passes")
        if not n.endswith("__init__.py")
    }


@pytest.mark.parametrize("cls", PASSES, ids=lambda c: c.__name__)
def test_a_pass_is_one_frozen_dataclass_with_tests(cls: type[Pass]) -> None:
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert cls.matches
    assert isinstance(cls.phase, Phase)
    assert "propose" in vars(cls)
    assert inspect.getdoc(cls)
    assert "where" in {f.name for f in dataclasses.fields(cls)}
    stem = cls.__module__.rpartition(".")[2]
    assert stem == cls.__name__.lower()
    assert (ROOT / "tests" / f"test_{stem}.py").exists()
    assert f"`{cls.__name__}(" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "cls",
    [c for c in map(rewriter.passes.__dict__.get, rewriter.passes.__all__) if c not in PASSES],
    ids=lambda c: c.__name__,
)
def test_a_layer_says_what_it_is(cls: type[Layer]) -> None:
    assert issubclass(cls, Layer)
    assert cls.op
    assert inspect.getdoc(cls)
    arguments = inspect.signature(cls).parameters
    assert {"in_features", "out_features", "device", "dtype"} <= set(arguments)
    with pytest.raises((OptionError, TypeError)):
        cls()  # nothing is guessed


def recorded() -> list[Record]:
    ops.load()
    return [r for r in ops.records() if r.needs.startswith("rewriter.kernels.")]


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("rewriter/")])
def test_the_rewriter_names_no_op_and_no_kernel(name: str) -> None:
    own = {n.partition("::")[2] for r in recorded() for n in r.names}
    files = {pathlib.Path(n).stem for n in in_folder("kernels")} - {"ops", "__init__"}
    text = FILES[name].read_text()
    assert not re.findall(rf"\b({'|'.join(own)})\b", text)
    assert not re.findall(rf"kernels[./ ]+(?:import )?({'|'.join(files)})\b", text)
    assert "torch.ops.rewriter" not in text


def test_a_report_schema_names_no_op() -> None:
    text = (ROOT / "rewriter/report/schema.json").read_text()
    kinds = {r.kind for r in recorded() if r.own_kind}
    assert [k for k in kinds if f'"{k}"' in text] == []


def test_every_op_of_ours_has_a_record() -> None:
    names = {n for r in recorded() for n in r.names}
    defined = {
        f"rewriter::{match}"
        for n in in_folder("kernels")
        for match in re.findall(r'define\(\s*"(\w+)\(', FILES[n].read_text())
    }
    assert defined == names


def test_import_is_lean() -> None:
    code = (
        "import sys, rewriter; heavy = ('transformers', 'matplotlib', 'scipy', 'gensim', "
        "'pandas', 'sklearn', 'IPython', 'rewriter.passes'); "
        "kernels = [m for m in sys.modules if m.startswith('rewriter.kernels.')]; "
        "kernels.remove('rewriter.kernels.ops'); "
        "print([m for m in heavy if m in sys.modules] + kernels)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd="/"
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_the_root_is_not_on_the_path() -> None:
    """`kernels` is also a distribution that transformers imports: ours must not shadow it."""
    code = (
        "import importlib.util as u, sys, rewriter.kernels; "
        "print([str(getattr(u.find_spec(n), 'origin', '')) for n in ('kernels', 'passes')], "
        "sys.path)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    found, path = run.stdout.strip(), str(ROOT)
    assert found, run.stderr
    assert f"'{path}'" not in found
    assert f"{path}/kernels" not in found
    assert f"{path}/passes" not in found
    assert not (ROOT / "conftest.py").exists()
    assert pathlib.Path(rewriter.passes.__file__).parent == ROOT / "passes"
