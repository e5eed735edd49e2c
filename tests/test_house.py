"""The house: modules import one way, looking needs no torch, names and sizes hold, README is true.

An edge of the import graph is an import anywhere in a module, inside functions too: a lazy import
puts off the cost and still says who knows whom. Imports for the type checker alone do not count.
What is loaded when a module is imported follows the imports outside functions only.
"""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

import lsweep
from lsweep.commands.cli import _parser
from lsweep.plans.settings import Settings

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lsweep"
LONGEST = 420
PUBLIC = {
    "LsweepError",
    "Problem",
    "sweep",
    "open",
    "measure",
    "render",
    "accuracy",
    "classifier",
    "causal_lm",
    "load_state",
}
LOOKING = (
    "status",
    "merge",
    "verify",
    "prune",
    "measure",
    "render",
    "convert",
    "init",
    "doctor",
)  # without torch


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def imported(node: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Yield the full names of modules that ``node`` imports, ``lsweep.x`` or ``torch.nn``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are written in full"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield full if full in MODULES else str(child.module)
        if inside_functions or not isinstance(child, FUNCTIONS):
            yield from imported(child, inside_functions=inside_functions)


def loaded_with(names: set[str]) -> dict[str, str]:
    """Return every module that importing ``names`` loads, each with the one that asked for it."""
    loaded, waiting = {}, [(name, "the command") for name in sorted(names)]
    while waiting:
        name, asked = waiting.pop()
        if name not in loaded:
            loaded[name] = asked
            if name in TREES:
                more = imported(TREES[name], inside_functions=False)
                waiting += [(n, name) for n in more]
    return loaded


# -- imports ---------------------------------------------------------------------------------------


def test_imports_run_one_way():
    graph = {
        name: {n for n in imported(tree, inside_functions=True) if n in MODULES}
        for name, tree in TREES.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises at a cycle, naming it
    assert order[-1] == "lsweep.__main__" and len(order) == len(MODULES)


def test_packages_depend_one_way():
    graph: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        own = _package(name)
        if own is not None:
            found = {_package(n) for n in imported(tree, inside_functions=True) if n in MODULES}
            graph.setdefault(own, set()).update(found - {own, None})
    del graph["commands"]  # on top, with what the package itself offers
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert {"storage", "native", "pictures"} < set(order) and "commands" not in order


def _package(module: str) -> str | None:
    """Return the folder that a module is in, or None where that is lsweep itself."""
    parts = module.split(".")
    return parts[1] if len(parts) == 3 else None


def test_that_a_cycle_would_be_found():
    inside = ast.parse(
        "def f():\n    from lsweep.plans.plan import Plan\n    import lsweep.storage.files"
    )
    assert set(imported(inside, inside_functions=True)) == {
        "lsweep.plans.plan",
        "lsweep.storage.files",
    }
    assert set(imported(inside, inside_functions=False)) == set()
    checked = ast.parse("if TYPE_CHECKING:\n    import torch")
    assert set(imported(checked, inside_functions=True)) == set()


@pytest.mark.parametrize("command", LOOKING)
def test_looking_loads_no_torch(command):
    bodies = TREES["lsweep.commands.making"].body + TREES["lsweep.commands.looking"].body
    functions = {n.name: n for n in bodies if isinstance(n, ast.FunctionDef)}
    wanted = set(imported(functions[f"do_{command}"], inside_functions=True))
    loaded = loaded_with({"lsweep.commands.cli", *wanted})
    heavy = {n: by for n, by in loaded.items() if n.split(".")[0] in ("torch", "sklearn")}
    assert heavy == {}


def test_starting_loads_neither_torch_nor_matplotlib():
    loaded = {n.split(".")[0] for n in loaded_with({"lsweep", "lsweep.commands.cli"})}
    assert "argparse" in loaded and not loaded & {"torch", "matplotlib", "sklearn", "xarray"}


# -- names and sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_each_module_says_what_it_is_and_is_no_drawer(name):
    docstring = ast.get_docstring(TREES[name])
    assert docstring and docstring.splitlines()[0].endswith((".", ":"))
    assert name.rpartition(".")[2].strip("_") not in {"utils", "util", "core", "helpers", "base"}
    assert "common" not in name and "misc" not in name
    assert len(MODULES[name].read_text().splitlines()) <= LONGEST


def test_each_test_file_says_what_it_promises():
    for path in (ROOT / "tests").glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_public_names_are_those_of_the_contract():
    assert set(lsweep.__all__) == PUBLIC
    checked = next(n for n in TREES["lsweep"].body if isinstance(n, ast.If))
    aliases = [a for n in checked.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert {a.asname for a in aliases} == PUBLIC  # what the type checker is told
    namespace: dict[str, object] = {}
    exec("from lsweep import *", namespace)
    assert set(namespace) - {"__builtins__"} == PUBLIC
    assert all(getattr(lsweep, name).__doc__ for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'swep'"):
        lsweep.swep  # noqa: B018


def test_paths_of_a_run_are_made_in_one_place():
    inside = {"plan.json", "source.json", "surface.h5", "directions.h5", "rounds", "devices",
              "leases", "workers", "parts", "figures", "logs"}  # fmt: skip
    for name, tree in TREES.items():
        divisions = [n.right for n in ast.walk(tree) if isinstance(n, ast.BinOp)]
        made = {n.value for n in divisions if isinstance(n, ast.Constant)} & inside
        assert name == "lsweep.storage.folder" or not made, (name, made)


def test_only_the_command_line_exits():
    for name, tree in TREES.items():
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not calls & {"exit", "quit"}, name
        assert "os._exit" not in calls or name == "lsweep.working.watchdog", name
        assert "sys.exit" not in calls or name == "lsweep.__main__", name


# -- what is shipped -------------------------------------------------------------------------------


def test_files_that_are_no_modules_are_shipped():
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = built["package-data"]["lsweep"]
    data = [p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*") if p.is_file()]
    data = [n for n in data if not n.endswith((".py", ".pyc"))]
    assert {"py.typed", "starter/sweep.toml"} <= set(data)
    for name in data:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
    assert (resources.files("lsweep") / "py.typed").is_file()
    starter = (resources.files("lsweep.starter") / "sweep.toml").read_text(encoding="utf-8")
    assert list(Settings.from_text(starter).grid) == ["x", "y"]


def test_what_is_imported_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(r for extra in extras for r in extra)]
    required = {re.match(r"[\w-]+", r)[0] for r in wanted}
    required = {r.replace("scikit-learn", "sklearn") for r in required}
    for name, tree in TREES.items():
        for module in imported(tree, inside_functions=True):
            top = module.split(".")[0]
            if top in ("lsweep", "__future__", "mpl_toolkits") or _is_standard(top):
                continue
            assert top in required, (name, top)


def _is_standard(top: str) -> bool:
    origin = importlib.util.find_spec(top).origin or ""
    return "site-packages" not in origin


# -- README ----------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    """Return the code blocks of README.md in one language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no {language} block"
    return found


def test_sweep_files_in_the_readme_are_settings():
    first, *others = blocks("toml")
    for text in (first, *(t if "[grid" in t else first + t for t in others)):  # or added to one
        assert Settings.from_text(text, "README.md").grid


def test_python_in_the_readme_compiles():
    for text in blocks("python"):
        compile(text, "README.md", "exec")


def test_commands_in_the_readme_exist():
    parsed = 0
    for text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", line.split(" #")[0]):
                words = shlex.split(part)
                if words and Path(words[0]).name == "lsweep" and len(words) > 1:
                    assert hasattr(_parser().parse_args(words[1:]), "run_command"), part
                    parsed += 1
    assert parsed > 2
