"""Reads a package's source without importing it: its modules, what they import, and the loops between them.

Shared by test_layers.py, test_exports.py and test_structure.py. Every function takes the package's directory, so each
check is also tried on small broken trees.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "gorouter_trio"

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: `target` is a module, own ones by their full dotted name."""

    target: str
    line: int
    eager: bool
    """Runs when the importing module is imported: not inside a function, not under TYPE_CHECKING."""
    absolute: bool
    """Written without leading dots."""


@dataclass(frozen=True, slots=True)
class Module:
    """One source file. `name` is the full dotted name (`package.wire.codec`, `package` for the root)."""

    name: str
    path: Path
    is_package: bool
    source: str
    tree: ast.Module
    imports: tuple[Import, ...] = ()

    @property
    def short(self) -> str:
        """The name without the package's own: `wire.codec`, and the empty string for the root."""
        return self.name.partition(".")[2]


def read_package(root: Path) -> dict[str, Module]:
    """Every module below `root`, the package's directory, by its full name."""
    found: dict[str, Module] = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        source = path.read_text("utf-8")
        found[name] = Module(name, path, is_package, source, ast.parse(source, str(path)))
    return {
        name: Module(name, m.path, m.is_package, m.source, m.tree, tuple(_imports(m, found, root.name)))
        for name, m in found.items()
    }


def _imports(module: Module, known: Collection[str], package: str) -> Iterator[Import]:
    for node, eager in _walk(module.tree.body, eager=True):
        for target, absolute in _targets(node, module, known):
            own = target == package or target.startswith(package + ".")
            yield Import(_own_module(target, known) if own else target, node.lineno, eager, absolute)


def _own_module(target: str, known: Collection[str]) -> str:
    """The longest known module that `target` begins with: `import package.wire.codec.name` is about the codec."""
    while target not in known and "." in target:
        target = target.rpartition(".")[0]
    return target


def _targets(node: ast.stmt | ast.expr, module: Module, known: Collection[str]) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, True
    elif isinstance(node, ast.ImportFrom):
        prefix = _absolute_name(node.module or "", node.level, module)
        for alias in node.names:
            full = f"{prefix}.{alias.name}"
            yield (full if full in known else prefix), node.level == 0
    elif isinstance(node, ast.Call) and node.args:
        name = _imported_by_call(node)
        if name is not None:
            bare = name.lstrip(".")
            yield _absolute_name(bare, len(name) - len(bare), module), not name.startswith(".")


def _imported_by_call(node: ast.Call) -> str | None:
    """The constant in `importlib.import_module("...")` and `__import__("...")`, so that neither goes round a check."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    argument = node.args[0]
    if called not in {"import_module", "__import__"} or not isinstance(argument, ast.Constant):
        return None
    return argument.value if isinstance(argument.value, str) else None


def _absolute_name(name: str, level: int, module: Module) -> str:
    if level == 0:
        return name
    parts = module.name.split(".")
    base = parts[: len(parts) - level + module.is_package]
    return ".".join([*base, name] if name else base)


def _walk(body: list[ast.stmt], *, eager: bool) -> Iterator[tuple[ast.stmt | ast.expr, bool]]:
    for statement in body:
        yield from _walk_node(statement, eager=eager)


def _walk_node(node: ast.AST, *, eager: bool) -> Iterator[tuple[ast.stmt | ast.expr, bool]]:
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)):
        yield node, eager
    if isinstance(node, ast.If) and is_type_checking(node.test):
        yield from _walk(node.body, eager=False)
        yield from _walk(node.orelse, eager=eager)
        return
    inside = eager and not isinstance(node, (*FUNCTIONS, ast.Lambda))
    for child in ast.iter_child_nodes(node):
        yield from _walk_node(child, eager=inside)


def is_type_checking(test: ast.expr) -> bool:
    """`TYPE_CHECKING` or `typing.TYPE_CHECKING`."""
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def import_graph(modules: Mapping[str, Module], *, eager_only: bool) -> dict[str, set[str]]:
    """Who imports whom, own modules only. A package's own `__init__` above a module does not count as its import."""
    return {
        name: {
            i.target for i in module.imports if i.target in modules and i.target != name and (i.eager or not eager_only)
        }
        for name, module in modules.items()
    }


def find_cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other, each sorted: Tarjan's strongly connected components, with a loop."""
    search = _Components(graph)
    for name in sorted(graph):
        search.visit(name)
    return sorted(search.found)


class _Components:
    def __init__(self, graph: Mapping[str, set[str]]) -> None:
        self.found: list[list[str]] = []
        self._graph = graph
        self._index: dict[str, int] = {}
        self._low: dict[str, int] = {}
        self._stack: list[str] = []

    def visit(self, name: str) -> None:
        if name in self._index:
            return
        self._index[name] = self._low[name] = len(self._index)
        self._stack.append(name)
        for other in sorted(self._graph[name]):
            self.visit(other)
            if other in self._stack:
                self._low[name] = min(self._low[name], self._low[other])
        if self._low[name] == self._index[name]:
            self._close(name)

    def _close(self, name: str) -> None:
        start = self._stack.index(name)
        component, self._stack[start:] = self._stack[start:], []
        if len(component) > 1 or name in self._graph[name]:
            self.found.append(sorted(component))


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Every module that importing `start` could bring in, through other own modules, `start` left out."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = graph[todo.pop()] - seen
        seen |= new
        todo.extend(new)
    return seen - {start}


def functions(module: Module) -> Iterator[tuple[str, Function]]:
    """Every function and method with its qualified name, nested ones included."""
    yield from _functions(module.tree, "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)
