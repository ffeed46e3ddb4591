"""The shape of the code base: who may import whom, who may mutate, and what a pass is made of.

That every pass also appears in README.md or an example is checked where those are tested.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import networkx
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
            assert not node.level, f"{path}: imports are absolute"
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] in (*FOLDERS, "tests", "benchmarks"))


ROOMS = (
    "doors", "compiler", "store", "training", "engine", "recipe", "lowering", "planner", "capture",
    "report", "cost", "passes", "base", "edits", "sites", "spellings", "layer", "modules",
    "kernels", "errors",
)  # fmt: skip
"""Top to bottom: a file imports its own room and those below it."""
DOORS = {"rewriter", "rewriter.__main__", "rewriter.api", "rewriter.cli"}


def module_of(path: str) -> str:
    """`kernels/pack.py` → `rewriter.kernels.pack`; a package is named without `__init__`."""
    parts = list(pathlib.PurePath(path).with_suffix("").parts)
    dotted = ".".join([FOLDERS[parts[0]], *parts[1:]])
    return dotted.removesuffix(".__init__")


MODULES = {module_of(name): path for name, path in FILES.items()}


def room_of(module: str) -> str:
    return "doors" if module in DOORS else module.split(".")[1]


@functools.cache
def imported(module: str) -> set[str]:
    """The files of ours that a file names in an import, wherever it stands."""
    found = set()
    for name in imports(MODULES[module], module):
        while name and name not in MODULES:  # `from rewriter.errors import warn`
            name = name.rpartition(".")[0]
        found |= {name} - {module}
    return found


def test_every_folder_is_a_room() -> None:
    assert {room_of(m) for m in MODULES} <= set(ROOMS)
    assert {m for m in MODULES if room_of(m) == "doors"} == DOORS


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_its_own_room_and_those_below(module: str) -> None:
    for other in imported(module):
        assert ROOMS.index(room_of(module)) <= ROOMS.index(room_of(other)), other


def test_no_circle_of_files() -> None:
    graph = networkx.DiGraph((m, other) for m in MODULES for other in imported(m))
    assert not [c for c in networkx.strongly_connected_components(graph) if len(c) > 1]


def test_the_top_of_the_package_is_small() -> None:
    top = {p.stem for p in (ROOT / "rewriter").glob("*.py")} - {"__init__"}
    assert len(top) <= 8, top


def test_every_folder_is_installed() -> None:
    """setuptools is told the packages one by one, as `passes/` and `kernels/` move under ours."""
    settings = (ROOT / "pyproject.toml").read_text()
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            assert f'"{module}",' in settings, module


def in_folder(folder: str) -> list[str]:
    return [name for name in FILES if name.startswith(f"{folder}/")]


@pytest.mark.parametrize("name", in_folder("rewriter"))
def test_no_pass_is_imported_but_by_name(name: str) -> None:
    # layers by name, from an allow-list; what the command line names
    allowed = (
        "rewriter/recipe/names.py", "rewriter/recipe/parse.py", "rewriter/store/old_names.py",
    )  # fmt: skip
    text = FILES[name].read_text()
    assert "import rewriter.passes" not in text
    assert "from rewriter.passes" not in text
    if room_of(module_of(name)) != "lowering":  # whose rules name the fused ops that they run
        kernels = {m for m in imported(module_of(name)) if room_of(m) == "kernels"}
        assert kernels <= {"rewriter.kernels", "rewriter.kernels.ops"}
    if name not in allowed:
        assert "import_module" not in text


MUTATORS = {
    "setattr", "delattr", "__setattr__", "add_module", "register_module", "set_submodule",
    "erase_node", "node_copy", "create_node", "call_module", "call_function", "call_method",
    "inserting_before", "inserting_after", "replace_all_uses_with", "replace_input_with",
    "eliminate_dead_code", "recompile",
}  # fmt: skip


MAY_MUTATE = {
    # the engine and its hands
    "rewriter/capture/reads.py": "passes on what a forward sets, while it notes it",
    "rewriter/engine/install.py": "puts layers into graphs and module tree; removes and resizes",
    "rewriter/engine/undo.py": "puts a model back where a plan, or rewriting it in place, fails",
    "rewriter/engine/trials.py": "tries a layer in a graph of its own; notes calls, and undoes it",
    "rewriter/engine/decide.py": "prices a layer in a graph of its own",
    "rewriter/engine/watching.py": "looks at the inputs of sites, and undoes it",
    "rewriter/layer.py": "a layer that computes its weight turns dense where that is written to",
    "rewriter/engine/forms.py": "puts what stood at a place into a twin; keeps a form's constants",
    # making graphs, and hosting them
    "rewriter/capture/program.py": "makes graphs out of pickled ones",
    "rewriter/capture/hosted.py": "gives a module its generated forward",
    "rewriter/capture/ladder.py": "drops constants that no graph reads",
    "rewriter/capture/exporting.py": "keeps the constants that graphs read",
    "rewriter/capture/rehost.py": "makes graphs out of exported ones",
    "rewriter/capture/replay.py": "makes the train graph out of the traced eval graph",
    "rewriter/capture/settling.py": "sets the constants that a first call sets",
    "rewriter/capture/submodules.py": "notes the calls of submodules, and undoes it",
    "rewriter/sites.py": "builds a root around a free-standing module",
    "rewriter/lowering/alone.py": "puts layers to be timed into a graph of their own",
    "rewriter/lowering/lowering.py": "makes the lowered graph, a copy of the eval graph",
    "rewriter/lowering/inputs.py": "checks the inputs of a packaged program, and undoes it",
    "rewriter/lowering/joining.py": "joins calls in a graph that Inductor compiles",
    "rewriter/lowering/single_rows.py": "puts our attention into a graph that Inductor compiles",
    "rewriter/lowering/sparse_products.py": "puts our products into a copy of a graph of Dynamo's",
    "rewriter/lowering/planning.py": "makes the lowered graph, a copy of the eval graph",
    "rewriter/modules/pointwise.py": "hands a parameter that user code sets to the layer inside",
    "rewriter/modules/generated.py": "copies a graph whose names cannot be written as code",
    "rewriter/modules/quiet.py": "keeps a tracer's patches of nn.Module from other threads",
    # weights into models, and models out of recipes
    "rewriter/modules/tensors.py": "puts a tensor in another's place",
    "rewriter/recipe/replaying.py": "builds the layer that stood at a place",
    "rewriter/store/filling.py": "fills a loaded model",
    "rewriter/training/recovery.py": "looks at outputs of modules, and undoes it",
    "rewriter/training/sparsity.py": "looks at what layers are given and give, and undoes it",
    "rewriter/training/peft.py": "looks at the inputs of adapted layers, and undoes it",
    "rewriter/training/optimizers.py": "says on an optimizer what was remapped",
    # compilers
    "rewriter/compiler/dynamo.py": "makes graphs out of Dynamo's",
    "rewriter/compiler/inner.py": "makes graphs for the inner compiler",
    "rewriter/compiler/installing.py": "puts new layers on the user's module",
    "rewriter/planner/joint/builder.py": "builds the two graphs of a plan",
    "rewriter/planner/apply/trace.py": "splits the joint graph that it traced",
    "rewriter/planner/apply/transform.py": "builds the two graphs of a plan",
    "rewriter/cost/machine/calibrate.py": "times calls in graphs of its own",
}
"""Every file that mutates a graph or a module, and what for; CONTRIBUTING.md has the rule."""
TABLES = {"_modules", "_parameters", "_buffers", "__dict__"}
HOOKS = ("register_buffer", "register_parameter", "register_forward", "register_full_backward")


def mutations(path: pathlib.Path) -> list[tuple[int, str]]:
    """(line, what) of everything in a file that changes a graph or somebody else's module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("setattr", "delattr") and ast.unparse(node.args[0]) != "self":
                found.append((node.lineno, node.func.id))
        elif isinstance(node, ast.Attribute):
            own = ast.unparse(node.value) in ("self", "object")
            if not own and (node.attr in MUTATORS or node.attr.startswith(HOOKS)):
                found.append((node.lineno, node.attr))
            elif node.attr == "__class__" and isinstance(node.ctx, ast.Store):
                found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            holder = node.value
            held = isinstance(holder, ast.Attribute) and holder.attr in TABLES
            if held or ast.unparse(holder).startswith("vars("):
                found.append((node.lineno, ast.unparse(holder)))
    return found


@pytest.mark.parametrize("name", in_folder("rewriter"))
def test_who_may_mutate_is_a_named_list(name: str) -> None:
    assert name in MAY_MUTATE or not mutations(FILES[name])


@pytest.mark.parametrize("name", MAY_MUTATE)
def test_the_list_of_who_may_mutate_is_true(name: str) -> None:
    assert mutations(FILES[name]), "takes a right that it does not use"


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
    exported = {getattr(rewriter.passes, name).__module__ for name in rewriter.passes.__all__}
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
    assert len({"propose", "plan"} & set(vars(cls))) == 1
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
    arguments = set(inspect.signature(cls).parameters)
    assert {"device", "dtype"} <= arguments
    sizes = ("in_features", "out_features"), ("num_embeddings", "embedding_dim")
    sizes += (("in_channels", "out_channels"),)
    assert cls.acts or any(arguments.issuperset(pair) for pair in sizes)
    with pytest.raises((OptionError, TypeError)):
        cls()  # nothing is guessed


def test_tolerances_live_in_one_helper() -> None:
    """In the tests' own code and in the scripts that they hand to other processes."""
    found = [
        f"{path.name}:{number}"
        for path in sorted((ROOT / "tests").glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\b[ra]tol\s*=", line)
    ]
    assert not found, f"{found}: use tests/helpers/closeness.py"


def recorded() -> list[Record]:
    ops.load()
    return [r for r in ops.records() if r.needs.startswith("rewriter.kernels.")]


@pytest.mark.parametrize(
    "name", [n for n in in_folder("rewriter") if not n.startswith("rewriter/lowering/")]
)
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
        for spelling in (r'define\(\s*"(?:rewriter::)?(\w+)', r'_op\(\s*"rewriter::(\w+)')
        for match in re.findall(spelling, FILES[n].read_text())
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
