"""One public door, pinned: `__all__` of every public module, and the exact names of the package root.

Also a script: `make exports` writes the root's names to the golden file, when the change is meant.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from source_tree import PACKAGE, REPOSITORY, Module, read_package

GOLDEN = REPOSITORY / "tests" / "golden" / "exports.txt"


def is_public(module: Module) -> bool:
    """No part of the module's name begins with an underscore; the package root is public."""
    return not any(part.startswith("_") for part in module.short.split("."))


PUBLIC = [module for module in read_package(PACKAGE).values() if is_public(module)]


# --- checks on the source ---------------------------------------------------------------------------------------------


def declared_all(module: Module) -> list[str] | None:
    """The module's `__all__` when it is one literal list or tuple, else None."""
    for node in module.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets) and not isinstance(node, ast.AugAssign):
            written = getattr(node, "value", None)
            try:
                value = None if written is None else ast.literal_eval(written)
            except ValueError:
                return None
            return list(value) if isinstance(value, (list, tuple)) else None
    return None


def public_names(module: Module) -> set[str]:
    """Public names that the module defines, or passes on in the form `from .x import name as name`."""
    return {name for name in _bound_names(module.tree.body) if not name.startswith("_")}


def _bound_names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign) and not _is_type_variable(node.value):
            yield from (n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names if alias.asname == alias.name)
        elif isinstance(node, (ast.If, ast.Try)):
            for part in ("body", "handlers", "orelse", "finalbody"):
                inner = getattr(node, part, [])
                yield from _bound_names(
                    [s for h in inner for s in getattr(h, "body", [])] if part == "handlers" else inner
                )


def _is_type_variable(value: ast.expr) -> bool:
    """`T = TypeVar("T")` is a public-looking name by custom only."""
    return isinstance(value, ast.Call) and getattr(value.func, "id", None) in {"TypeVar", "ParamSpec", "TypeVarTuple"}


def sort_key(name: str) -> tuple[int, list[tuple[int, int | str]]]:
    """CONSTANTS, then Classes, then functions, digits by value: the order that `ruff check --fix` makes."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    parts = re.findall(r"\d+|\D+", name)
    return kind, [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def all_faults(module: Module) -> Iterator[str]:
    """What is wrong with the module's `__all__`, as far as its source tells."""
    names = declared_all(module)
    if names is None:
        if public_names(module):
            yield f"{module.name} has public names and no literal __all__"
        return
    if names != sorted(names, key=sort_key):
        yield f"{module.name}.__all__ is not sorted (ruff check --fix sorts it)"
    if len(set(names)) < len(names):
        yield f"{module.name}.__all__ has a name twice"
    for name in sorted(public_names(module) - set(names)):
        yield f"{module.name}.{name} is public and not in __all__: add it, or begin it with an underscore"


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.name)
def test_all_is_whole(module: Module) -> None:
    """`__all__` is sorted and misses no public name of the module."""
    assert list(all_faults(module)) == []


# --- checks on the imported modules -----------------------------------------------------------------------------------


def load(name: str) -> ModuleType:
    """Imports a module; skips the test where a library of an extra that tests do not need is absent."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] == PACKAGE.name:
            raise
        pytest.skip(f"{name} needs {exc.name}")


def missing_names(module: ModuleType) -> list[str]:
    """Names in `__all__` that the module does not have."""
    return [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]


def misplaced(module: ModuleType) -> Iterator[str]:
    """Exported classes and functions that do not say that they live in `module`.

    Structs keep their own: msgspec resolves their annotations in the module that `__module__` names.
    """
    for name in module.__all__:
        thing = getattr(module, name)
        own = inspect.isclass(thing) or inspect.isfunction(thing)
        struct = inspect.isclass(thing) and issubclass(thing, msgspec.Struct)
        if own and not struct and thing.__module__ != module.__name__:
            yield f"{name}.__module__ is {thing.__module__}"


def unresolvable(module: ModuleType) -> Iterator[str]:
    """Exported Structs whose annotations msgspec cannot resolve, so that nobody could decode them."""
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) and issubclass(thing, msgspec.Struct):
            try:
                msgspec.structs.fields(thing)
            except NameError as exc:
                yield f"{name}: {exc}"


@pytest.mark.parametrize("name", [module.name for module in PUBLIC])
def test_all_exists(name: str) -> None:
    """Everything in `__all__` is there."""
    assert missing_names(load(name)) == []


def test_root_says_where_names_live() -> None:
    """Tracebacks and help show `gorouter_trio.X`, wherever X is written."""
    root = load(PACKAGE.name)
    assert list(misplaced(root)) == []
    assert list(unresolvable(root)) == []


# --- the pinned names of the root -------------------------------------------------------------------------------------


def golden_diff(names: list[str], golden: Path) -> str:
    """The difference between the pinned names and the present ones as a unified diff, empty when there is none."""
    pinned = golden.read_text("utf-8").splitlines() if golden.exists() else []
    lines = difflib.unified_diff(pinned, sorted(names), golden.name, "gorouter_trio.__all__", lineterm="")
    return "\n".join(lines)


def write_golden(names: list[str], golden: Path) -> None:
    """Pins the names, one a line."""
    golden.parent.mkdir(parents=True, exist_ok=True)
    golden.write_text("".join(f"{name}\n" for name in sorted(names)), "utf-8")


def test_root_names_are_pinned() -> None:
    """The package root has exactly the names in the golden file."""
    diff = golden_diff(list(load(PACKAGE.name).__all__), GOLDEN)
    assert not diff, f"the public names changed; if that is meant, run `make exports`\n{diff}"


def test_version_is_the_projects() -> None:
    """`__version__` is what the distribution is built as."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert load(PACKAGE.name).__version__ == project["version"]


def test_type_checkers_see_every_name() -> None:
    """Each name of the root resolves for mypy too, which does not run the module."""
    pytest.importorskip("mypy", reason="mypy comes with the extra `lint`")
    code = "import gorouter_trio\n" + "".join(f"gorouter_trio.{name}\n" for name in load(PACKAGE.name).__all__)
    command = [sys.executable, "-m", "mypy", "--config-file=", "--strict", "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=55)
    assert [line for line in done.stdout.splitlines() if line.startswith("<string>")] == []


# --- the checks themselves --------------------------------------------------------------------------------------------

Source = Callable[[str], Module]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Reads one module from its text."""

    def read(text: str) -> Module:
        root = tmp_path / "pkg"
        root.mkdir(exist_ok=True)
        (root / "a.py").write_text(text)
        return read_package(root)["pkg.a"]

    return read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(): ...\n", "pkg.a has public names and no literal __all__"),
        ("__all__ = NAMES\ndef f(): ...\n", "pkg.a has public names and no literal __all__"),
        ("__all__ = ['f']\ndef f(): ...\nasync def g(): ...\n", "pkg.a.g is public"),
        ("__all__ = []\nclass C: ...\n", "pkg.a.C is public"),
        ("__all__ = []\nLIMIT: int = 3\n", "pkg.a.LIMIT is public"),
        ("__all__ = []\nx, (y, _z) = f()\n", "pkg.a.y is public"),
        ("__all__ = ()\nfrom .b import h as h\n", "pkg.a.h is public"),
        ("__all__ = ()\ntry:\n    import b\nexcept ImportError:\n    def g(): ...\n", "pkg.a.g is public"),
        ("__all__ = ['b', 'a']\na = b = 1\n", "pkg.a.__all__ is not sorted"),
        ("__all__ = ['a', 'B', 'C_D']\na = B = C_D = 1\n", "pkg.a.__all__ is not sorted"),
        ("__all__ = ['a', 'a']\na = 1\n", "pkg.a.__all__ has a name twice"),
    ],
)
def test_check_all(source: Source, text: str, expected: str) -> None:
    """Each fault of an `__all__` is named."""
    assert any(expected in line for line in all_faults(source(text)))


def test_check_all_accepts(source: Source) -> None:
    """Private names and plain imports need no mention; names that only `__all__` knows are left to the import."""
    text = "from .b import h\nimport c\nT = TypeVar('T')\n__all__ = ['LIMIT', 'Cell2', 'Cell10', 'f', 'lazy']\n"
    assert (
        list(all_faults(source(text + "_x = 1\nLIMIT = 1\nclass Cell2: ...\nclass Cell10: ...\ndef f(): ...\n"))) == []
    )
    assert list(all_faults(source("import x\n_y = 1\n"))) == []


def test_check_public() -> None:
    """A private package makes all in it private."""
    names = ["pkg", "pkg.a", "pkg._a", "pkg.a._b", "pkg._a.b", "pkg.__main__"]
    modules = [Module(name, Path(), False, "", ast.parse("")) for name in names]
    assert [m.name for m in modules if is_public(m)] == ["pkg", "pkg.a"]


def test_check_imported() -> None:
    """Missing names, foreign `__module__`s and Structs that lost their module are found."""

    class Apart:
        pass

    class Moved(msgspec.Struct):
        __annotations__ = {"x": "NotThere"}

    Moved.__module__ = "pkg"
    module = ModuleType("pkg")
    module.__dict__.update(__all__=["Apart", "Moved", "gone"], Apart=Apart, Moved=Moved)
    assert missing_names(module) == ["gone"]
    module.__dict__["__all__"].remove("gone")
    assert list(misplaced(module)) == [f"Apart.__module__ is {__name__}"]
    assert len(list(unresolvable(module))) == 1
    Apart.__module__ = "pkg"
    assert list(misplaced(module)) == []


def test_check_golden(tmp_path: Path) -> None:
    """A name more, a name less and a missing file are differences; what was just written is none."""
    golden = tmp_path / "golden" / "exports.txt"
    assert "+a" in golden_diff(["a"], golden)
    write_golden(["b", "a"], golden)
    assert golden.read_text() == "a\nb\n"
    assert golden_diff(["b", "a"], golden) == ""
    assert "\n+c" in golden_diff(["a", "b", "c"], golden)
    assert "\n-b" in golden_diff(["a"], golden)


if __name__ == "__main__":
    present = list(importlib.import_module(PACKAGE.name).__all__)
    print(golden_diff(present, GOLDEN) or f"{len(present)} names, none changed")
    write_golden(present, GOLDEN)
