"""The numbers the code is held to: sizes, nesting, loops, broad excepts, untyped names, unexplained suppressions.

Also a script: `make structure` prints the figures and whatever breaks a rule.
"""

from __future__ import annotations

import ast
import io
import math
import re
import statistics
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from source_tree import (
    FUNCTIONS,
    PACKAGE,
    REPOSITORY,
    Function,
    Module,
    find_cycles,
    functions,
    import_graph,
    read_package,
)

MEDIAN_LINES = 10
P90_LINES = 30
MAX_LINES = 60
MAX_NESTING = 3
POSITIONAL_PARAMETERS = 2
IGNORES_PER_KLOC = 3

# Functions that nest deeper, each with its reason.
DEEP: dict[str, str] = {}

# Functions whose positional parameters or `Any` somebody else prescribes, each with its reason.
FOREIGN_SIGNATURES: dict[str, str] = {
    "gorouter_trio.tools.leash.Leash.throw": "the generator protocol, in its old form too",
}

# Where a crash is contained, and turned into an event or a tool's result.
MAY_CATCH_EXCEPTION = {"_contain", "tools.supervisor"}


# --- measures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measure:
    """One function: its lines from `def` to its end without the docstring, and its deepest block."""

    where: str
    lines: int
    nesting: int


def measure(modules: dict[str, Module]) -> list[Measure]:
    """Every function with a body; overloads and protocol members (`...`) are declarations and do not count."""
    return [
        Measure(f"{module.name}.{name}", _length(node), nesting(node.body))
        for module in modules.values()
        for name, node in functions(module)
        if not _is_declaration(node)
    ]


def _docstring(node: Function) -> ast.stmt | None:
    return node.body[0] if ast.get_docstring(node, clean=False) is not None else None


def _is_declaration(node: Function) -> bool:
    rest = node.body[1:] if _docstring(node) else node.body
    return all(
        isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) and s.value.value is Ellipsis for s in rest
    ) and (bool(rest) or _docstring(node) is not None)


def _length(node: Function) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    docstring = _docstring(node)
    if docstring is not None:
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


def nesting(body: list[ast.stmt]) -> int:
    """How many blocks deep the statements go; an `elif` is as deep as its `if`, a nested function starts anew."""
    return max((_depth(statement) for statement in body), default=0)


def _depth(node: ast.AST) -> int:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
        return 0
    if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        return max(1 + nesting(node.body), _depth(node.orelse[0]))
    inside = max((_depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return inside + isinstance(node, _BLOCKS)


def percentile(values: list[int], share: float) -> int:
    """The smallest value that `share` of all values do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


# --- rules: each yields one line a breach -----------------------------------------------------------------------------


def sizes(modules: dict[str, Module]) -> Iterator[str]:
    """The distribution of all function lengths, and the longest."""
    found = measure(modules)
    lengths = [m.lines for m in found]
    if statistics.median(lengths) > MEDIAN_LINES:
        yield f"the median function has {statistics.median(lengths):g} lines, more than {MEDIAN_LINES}"
    if percentile(lengths, 0.9) > P90_LINES:
        yield f"one function in ten has {percentile(lengths, 0.9)} lines or more, above {P90_LINES}"
    for m in found:
        if m.lines > MAX_LINES:
            yield f"{m.where} has {m.lines} lines, more than {MAX_LINES}"


def deep_nesting(modules: dict[str, Module]) -> Iterator[str]:
    """Functions with blocks in blocks in blocks in blocks."""
    for m in measure(modules):
        if m.nesting > MAX_NESTING and m.where not in DEEP:
            yield f"{m.where} nests {m.nesting} blocks, more than {MAX_NESTING}"


def import_loops(modules: dict[str, Module]) -> Iterator[str]:
    """Modules that import each other when they are imported."""
    for cycle in find_cycles(import_graph(modules, eager_only=True)):
        yield "import loop: " + ", ".join(cycle)


def broad_excepts(modules: dict[str, Module]) -> Iterator[str]:
    """`except Exception` outside the modules that contain crashes; anything broader, or Cancelled, that is kept."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler):
                yield from _judge(node, f"{module.name}:{node.lineno}", module)
            elif isinstance(node, ast.Call) and _last_name(node.func) == "suppress":
                for name in {_last_name(a) for a in node.args} & {"Exception", "BaseException", "Cancelled"}:
                    yield f"{module.name}:{node.lineno} suppresses {name}"


def _judge(handler: ast.ExceptHandler, where: str, module: Module) -> Iterator[str]:
    if handler.type is None:
        yield f"{where} is a bare except"
        return
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {_last_name(c) for c in caught}
    if "Exception" in names and module.short not in MAY_CATCH_EXCEPTION:
        yield f"{where} catches Exception"
    if names & {"BaseException", "Cancelled"} and not _ends_in_raise(handler.body):
        yield f"{where} catches {' and '.join(sorted(names & {'BaseException', 'Cancelled'}))} and keeps it"


def _ends_in_raise(body: list[ast.stmt]) -> bool:
    """Whether every way through ends in a raise, as far as the last statement tells."""
    last = body[-1]
    if isinstance(last, ast.If):
        return bool(last.orelse) and _ends_in_raise(last.body) and _ends_in_raise(last.orelse)
    if isinstance(last, (ast.With, ast.AsyncWith)):
        return _ends_in_raise(last.body)
    if isinstance(last, ast.Try) and last.finalbody:
        return _ends_in_raise(last.finalbody) or _ends_in_raise(last.body)
    return isinstance(last, ast.Raise)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def untyped(modules: dict[str, Module]) -> Iterator[str]:
    """Functions with a parameter or a result without annotation."""
    for module in modules.values():
        for name, node in functions(module):
            bare = [a.arg for a in _parameters(node) if a.annotation is None]
            if bare and bare[0] in {"self", "cls"}:
                del bare[0]
            if bare or node.returns is None:
                yield f"{module.name}.{name} lacks types: {', '.join([*bare, *([] if node.returns else ['return'])])}"


def _parameters(node: Function) -> list[ast.arg]:
    a = node.args
    return [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]


def any_in_public(modules: dict[str, Module]) -> Iterator[str]:
    """`Any` in the signature of a public function or method."""
    for module in modules.values():
        for name, node in functions(module):
            annotations = [a.annotation for a in _parameters(node)] + [node.returns]
            where = f"{module.name}.{name}"
            if _is_public(where) and where not in FOREIGN_SIGNATURES and any(_has_any(a) for a in annotations):
                yield f"{where} has Any in its signature"


def _is_public(where: str) -> bool:
    return not any(part.startswith("_") and not part.endswith("__") for part in where.split("."))


def _has_any(annotation: ast.expr | None) -> bool:
    if annotation is None:
        return False
    return any(
        (isinstance(n, (ast.Name, ast.Attribute)) and _last_name(n) == "Any")
        or (isinstance(n, ast.Constant) and isinstance(n.value, str) and re.search(r"\bAny\b", n.value))
        for n in ast.walk(annotation)
    )


def positional(modules: dict[str, Module]) -> Iterator[str]:
    """Public functions that take more than two parameters by position.

    Dunder methods have theirs from the language, private functions may save the cost of keywords.
    """
    for module in modules.values():
        for name, node in functions(module):
            own = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            count = len(own) - (bool(own) and own[0] in {"self", "cls"})
            dunder = node.name.startswith("__") and node.name.endswith("__") and node.name != "__init__"
            where = f"{module.name}.{name}"
            if count > POSITIONAL_PARAMETERS and _is_public(where) and not dunder and where not in FOREIGN_SIGNATURES:
                yield f"{where} takes {count} parameters by position, more than {POSITIONAL_PARAMETERS}"


def globals_and_state(modules: dict[str, Module]) -> Iterator[str]:
    """`global` statements, and module-level names that begin empty and so can only be filled later."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                yield f"{module.name}:{node.lineno} has a global statement"
        for statement in module.tree.body:
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and _is_state(statement.value):
                yield f"{module.name}:{statement.lineno} is mutable state of the module"


_STATEFUL_CALLS = {"ContextVar", "Lock", "RLock", "WeakKeyDictionary", "WeakValueDictionary", "count", "local"}
_EMPTY_CALLS = {"list", "dict", "set", "deque", "defaultdict", "OrderedDict", "Counter", "bytearray"}


def _is_state(value: ast.expr | None) -> bool:
    if isinstance(value, (ast.List, ast.Set)):
        return not value.elts
    if isinstance(value, ast.Dict):
        return not value.keys
    if not isinstance(value, ast.Call):
        return False
    name = _last_name(value.func)
    filled = [a for a in value.args if not (name == "defaultdict" and a is value.args[0])]
    return name in _STATEFUL_CALLS or (name in _EMPTY_CALLS and not filled and not value.keywords)


def async_generators(modules: dict[str, Module]) -> Iterator[str]:
    """Public async generators; as the body of an async context manager they are fine."""
    for module in modules.values():
        for name, node in functions(module):
            managed = any(_last_name(d) == "asynccontextmanager" for d in node.decorator_list)
            where = f"{module.name}.{name}"
            if isinstance(node, ast.AsyncFunctionDef) and _yields(node) and not managed and _is_public(where):
                yield f"{where} is an async generator that the public can reach"


def _yields(node: ast.AST) -> bool:
    return any(
        isinstance(child, (ast.Yield, ast.YieldFrom))
        or (not isinstance(child, (*FUNCTIONS, ast.Lambda, ast.ClassDef)) and _yields(child))
        for child in ast.iter_child_nodes(node)
    )


def future_annotations(modules: dict[str, Module]) -> Iterator[str]:
    """Modules with code that lack `from __future__ import annotations`."""
    for module in modules.values():
        has = any(isinstance(s, ast.ImportFrom) and s.module == "__future__" for s in module.tree.body)
        only_docstring = ast.get_docstring(module.tree) is not None and len(module.tree.body) == 1
        if module.tree.body and not only_docstring and not has:
            yield f"{module.name} lacks `from __future__ import annotations`"


# --- comments ---------------------------------------------------------------------------------------------------------


def comments(module: Module) -> Iterator[tuple[int, str]]:
    """Every comment with its line."""
    for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


_IGNORE = re.compile(r"#\s*type:\s*ignore(?P<code>\[[\w\-, ]+\])?(?P<rest>.*)")
_NOQA = re.compile(r"#\s*(?:ruff:\s*)?noqa(?P<code>:\s*[A-Z]+\d+(?:[, ]+[A-Z]+\d+)*)?(?P<rest>.*)", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{3}")


def suppressions(modules: dict[str, Module]) -> Iterator[str]:
    """`type: ignore` and `noqa` without a code or without a reason beside it, and too many of the first."""
    count = 0
    for module in modules.values():
        for line, text in comments(module):
            for kind, pattern in (("type: ignore", _IGNORE), ("noqa", _NOQA)):
                found = pattern.search(text)
                if found and not (found["code"] and _WORD.search(_without_suppressions(found["rest"]))):
                    yield f"{module.name}:{line} has a {kind} without {'a reason' if found['code'] else 'a code'}"
            count += _IGNORE.search(text) is not None
    allowed = IGNORES_PER_KLOC * max(1.0, kloc(modules))
    if count >= allowed:
        yield f"{count} of `type: ignore` in {kloc(modules):.1f} kLOC, {allowed:.0f} or more"


def _without_suppressions(text: str) -> str:
    """The text less other suppressions on the same line, which are no reason for this one."""
    return re.sub(r"#\s*(noqa:\s*[A-Z]+\d+|type:\s*ignore(\[[\w\-, ]+\])?)", "", text)


def todos(modules: dict[str, Module]) -> Iterator[str]:
    """Work left for later without the number of an issue."""
    for module in modules.values():
        for line, text in comments(module):
            if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text) and not re.search(r"#\d+", text):
                yield f"{module.name}:{line} leaves work without an issue's number"


def kloc(modules: dict[str, Module]) -> float:
    """Thousands of source lines, blank ones included."""
    return sum(m.source.count("\n") for m in modules.values()) / 1000


RULES: tuple[Callable[[dict[str, Module]], Iterator[str]], ...] = (
    sizes,
    deep_nesting,
    import_loops,
    broad_excepts,
    untyped,
    any_in_public,
    positional,
    globals_and_state,
    async_generators,
    future_annotations,
    suppressions,
    todos,
)


# --- the tests' own rules ---------------------------------------------------------------------------------------------


def undescribed(tests: Path) -> Iterator[str]:
    """Tests that no docstring describes."""
    for path in sorted(tests.rglob("test_*.py")):
        tree = ast.parse(path.read_text("utf-8"), str(path))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
        for node in [*tree.body, *(member for c in classes for member in c.body)]:
            if isinstance(node, FUNCTIONS) and node.name.startswith("test_") and not ast.get_docstring(node):
                yield f"{path.relative_to(tests)}:{node.lineno} {node.name} has no docstring"


def real_sleeps(tests: Path) -> Iterator[str]:
    """`time.sleep` in tests and their helpers: it stops trio, and no mock clock can shorten it."""
    for path in sorted(tests.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
            direct = isinstance(node, ast.Attribute) and node.attr == "sleep" and _last_name(node.value) == "time"
            named = (
                isinstance(node, ast.ImportFrom) and node.module == "time" and "sleep" in {a.name for a in node.names}
            )
            if isinstance(node, (ast.expr, ast.stmt)) and (direct or named):
                yield f"{path.relative_to(tests)}:{node.lineno} sleeps for real"


# --- the report -------------------------------------------------------------------------------------------------------


def figures(modules: dict[str, Module]) -> list[tuple[str, str]]:
    """What the rules look at, as numbers with their limits."""
    found = measure(modules)
    lengths = [m.lines for m in found]
    nestings = [m.nesting for m in found]
    ignores = sum(_IGNORE.search(text) is not None for m in modules.values() for _, text in comments(m))
    return [
        ("modules, lines", f"{len(modules)}, {kloc(modules) * 1000:,.0f}"),
        ("functions", f"{len(found)}"),
        ("function lines, median", f"{statistics.median(lengths):g}  (at most {MEDIAN_LINES})"),
        ("function lines, 9 in 10 up to", f"{percentile(lengths, 0.9)}  (at most {P90_LINES})"),
        ("function lines, longest", f"{max(lengths)}  (at most {MAX_LINES})"),
        ("functions over 50 lines", f"{sum(n > 50 for n in lengths) / len(lengths):.1%}"),
        ("nesting, 9 in 10 up to; deepest", f"{percentile(nestings, 0.9)}; {max(nestings)}  (at most {MAX_NESTING})"),
        ("type: ignore", f"{ignores}  (below {IGNORES_PER_KLOC * max(1.0, kloc(modules)):.0f})"),
    ]


def report(root: Path) -> int:
    """Prints the figures, the longest functions and every breach; returns 1 when there is a breach, else 0."""
    modules = read_package(root)
    for name, value in figures(modules):
        print(f"{name:<34}{value}")
    print("\nlongest functions")
    for m in sorted(measure(modules), key=lambda m: -m.lines)[:10]:
        print(f"{m.lines:>6}  {m.where}")
    print("\nbreaches")
    breaches = [(rule.__name__, line) for rule in RULES for line in rule(modules)]
    for name, line in breaches:
        print(f"  {name}: {line}")
    print("  none" if not breaches else f"  {len(breaches)} in all")
    return 1 if breaches else 0


# --- the package ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_package(PACKAGE)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package(rule: Callable[[dict[str, Module]], Iterator[str]], modules: dict[str, Module]) -> None:
    """The package keeps the rule."""
    assert len(modules) > 10
    assert list(rule(modules)) == []


def test_exceptions_are_needed(modules: dict[str, Module]) -> None:
    """An entry in a list of exceptions names a function that still breaks the rule."""
    deep = {m.where for m in measure(modules) if m.nesting > MAX_NESTING}
    known = {f"{m.name}.{name}" for m in modules.values() for name, _ in functions(m)}
    assert set(DEEP) - deep == set()
    assert set(FOREIGN_SIGNATURES) - known == set()


def test_tests_are_described() -> None:
    """Every test says in a sentence what it shows."""
    assert list(undescribed(REPOSITORY / "tests")) == []


def test_tests_do_not_sleep() -> None:
    """No test and no helper blocks the thread to wait."""
    assert list(real_sleeps(REPOSITORY / "tests")) == []


# --- the rules themselves, on small broken trees ----------------------------------------------------------------------


def _write(root: Path, sources: dict[str, str]) -> dict[str, Module]:
    for name, source in {"__init__": "", **sources}.items():
        path = (root / name).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_package(root)


def _function(lines: int, name: str = "f") -> str:
    return f"def {name}() -> None:\n" + "    x = 1\n" * (lines - 1)


def _nested(depth: int, name: str = "f") -> str:
    blocks = [f"{'    ' * (i + 1)}while {name}:\n" for i in range(depth)]
    return f"def {name}() -> None:\n{''.join(blocks)}{'    ' * (depth + 1)}pass\n"


BROKEN: list[tuple[Callable[[dict[str, Module]], Iterator[str]], str, str]] = [
    (sizes, "".join(_function(12, f"f{i}") for i in range(3)), "median function has 12"),
    (sizes, "".join(_function(3 if i < 17 else 40, f"f{i}") for i in range(20)), "one function in ten has 40"),
    (sizes, "".join(_function(3 if i else 61, f"f{i}") for i in range(20)), "f0 has 61 lines"),
    (deep_nesting, _nested(4), "f nests 4"),
    (deep_nesting, "class C:\n    async def m(self) -> None:\n        async with a:\n            async for b in c:\n"
     "                try:\n                    pass\n                except* E:\n                    match b:\n"
     "                        case _:\n                            pass\n", "C.m nests 4"),
    (import_loops, "from .b import y\n", "import loop: pkg.a, pkg.b"),
    (broad_excepts, "try:\n    x\nexcept Exception:\n    raise\n", "a:3 catches Exception"),
    (broad_excepts, "try:\n    x\nexcept (ValueError, Exception) as e:\n    pass\n", "a:3 catches Exception"),
    (broad_excepts, "try:\n    x\nexcept* builtins.Exception:\n    pass\n", "a:3 catches Exception"),
    (broad_excepts, "try:\n    x\nexcept:\n    raise\n", "a:3 is a bare except"),
    (broad_excepts, "try:\n    x\nexcept BaseException:\n    if y:\n        raise\n", "a:3 catches BaseException and"),
    (broad_excepts, "try:\n    x\nexcept trio.Cancelled:\n    return\n", "a:3 catches Cancelled and keeps"),
    (broad_excepts, "with contextlib.suppress(Exception):\n    x\n", "a:1 suppresses Exception"),
    (untyped, "def f(a, *, b: int):\n    pass\n", "a.f lacks types: a, return"),
    (untyped, "class C:\n    def m(self, *args) -> None:\n        pass\n", "C.m lacks types: args"),
    (untyped, "def f() -> None:\n    async def g(x: int):\n        pass\n", "f.g lacks types: return"),
    (any_in_public, "def f(a: dict[str, Any]) -> None:\n    pass\n", "a.f has Any"),
    (any_in_public, "class C:\n    def m(self) -> typing.Any:\n        pass\n", "a.C.m has Any"),
    (any_in_public, "def f(a: 'list[Any]') -> None:\n    pass\n", "a.f has Any"),
    (positional, "def f(a: int, b: int, c: int) -> None:\n    pass\n", "a.f takes 3"),
    (positional, "class C:\n    def __init__(self, a: int, b: int, c: int) -> None: ...\n", "__init__ takes 3"),
    (globals_and_state, "def f() -> None:\n    global x\n    x = 1\n", "a:2 has a global statement"),
    (globals_and_state, "_cache: dict[str, int] = {}\n", "a:1 is mutable state"),
    (globals_and_state, "_all = set()\n", "a:1 is mutable state"),
    (globals_and_state, "_by = collections.defaultdict(list)\n", "a:1 is mutable state"),
    (globals_and_state, "_now = ContextVar('now')\n", "a:1 is mutable state"),
    (async_generators, "class C:\n    async def rows(self) -> Rows:\n        yield 1\n", "a.C.rows is an async"),
    (future_annotations, "x = 1\n", "a lacks"),
    (suppressions, "x = 1  # type: ignore\n", "a:1 has a type: ignore without a code"),
    (suppressions, "x = 1  # type: ignore[misc]\n", "a:1 has a type: ignore without a reason"),
    (suppressions, "x = 1  # noqa: S101\n", "a:1 has a noqa without a reason"),
    (suppressions, "x = 1  # type: ignore[misc]  # noqa: S101\n", "a:1 has a type: ignore without a reason"),
    (suppressions, "# ruff: noqa: S101\n", "a:1 has a noqa without a reason"),
    (suppressions, "x = 1  # noqa\n", "a:1 has a noqa without a code"),
    (suppressions, "x = 1  # type: ignore[misc]  # untyped in foo\n" * 3, "3 of `type: ignore`"),
    (todos, "# TODO: later\n", "a:1 leaves work"),
    (todos, "x = 1  # FIXME this\n", "a:1 leaves work"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "source", "expected"), BROKEN)
def test_rule_finds(
    rule: Callable[[dict[str, Module]], Iterator[str]], source: str, expected: str, tmp_path: Path
) -> None:
    """Each rule sees each kind of breach."""
    lines = list(rule(_write(tmp_path / "pkg", {"a": source, "b": "from . import a\n"})))
    assert any(expected in line for line in lines), lines


SOUND = '''"""A module that keeps every rule."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from .b import Other

TABLE = {"a": 1}
x = risky()  # type: ignore[no-untyped-call]  # risky has no types
y = 1  # noqa: S101, S102 - a table
# TODO(#12): with an issue


class C:
    def __exit__(self, a: object, b: object, c: object) -> None:
        try:
            x
        except BaseException:
            self.repair()
            raise

    async def _private(self) -> AsyncIterator[int]:
        yield 1

    def method(self, first: int, second: int, *, third: int = 0) -> None:
        """A contract.

        Long, and not counted.
        """
        if first:
            if second:
                while third:
                    pass
        elif second:
            pass
        elif third:
            pass
        else:
            for a in b:
                with c:
                    pass


@asynccontextmanager
async def open_thing() -> AsyncIterator[int]:
    yield 1


@overload
def f(a: int) -> int: ...
def _f(a: Any, b: int, c: int) -> Any:
    pass
'''


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts(rule: Callable[[dict[str, Module]], Iterator[str]], tmp_path: Path) -> None:
    """No rule complains about sound code, and the two modules that may catch everything may."""
    caught = "from __future__ import annotations\n\ntry:\n    x\nexcept Exception:\n    pass\n"
    modules = _write(tmp_path / "pkg", {"a": SOUND, "b": "", "_contain": caught, "tools/supervisor": caught})
    assert list(rule(modules)) == []


def test_measure(tmp_path: Path) -> None:
    """Docstrings, decorators and declarations do not count; nested functions count by themselves as well."""
    modules = _write(
        tmp_path / "pkg",
        {"a": 'class P:\n    def p(self) -> int: ...\n\n@d\ndef f() -> None:\n    """One.\n\n    Two."""\n'
              "    def g() -> None:\n        if x:\n            pass\n    return g\n"},
    )  # fmt: skip
    assert measure(modules) == [Measure("pkg.a.f", 5, 0), Measure("pkg.a.f.g", 3, 1)]


def test_percentile() -> None:
    """The 90th percentile of 1 to 10 is 9, of one value that value."""
    assert percentile(list(range(10, 0, -1)), 0.9) == 9
    assert percentile([7], 0.9) == 7


def test_rules_for_tests(tmp_path: Path) -> None:
    """Tests without a docstring and real sleeps are found in every form, and described ones are left alone."""
    (tmp_path / "test_a.py").write_text(
        "import time\n\ndef test_one():\n    time.sleep(1)\n\nclass TestMany:\n    async def test_two(self):\n"
        '        pass\n\ndef test_three():\n    """Fine."""\n\ndef helper():\n    pass\n'
    )
    (tmp_path / "helper.py").write_text("from time import sleep\n")
    assert list(undescribed(tmp_path)) == [
        "test_a.py:3 test_one has no docstring",
        "test_a.py:7 test_two has no docstring",
    ]
    assert list(real_sleeps(tmp_path)) == ["helper.py:1 sleeps for real", "test_a.py:4 sleeps for real"]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report names the longest function and every breach, and its result says whether there is one."""
    _write(tmp_path / "pkg", {"a": _function(61)})
    assert report(tmp_path / "pkg") == 1
    printed = capsys.readouterr().out
    assert "61  pkg.a.f" in printed
    assert "future_annotations: pkg.a lacks" in printed
    _write(tmp_path / "other", {"a": SOUND, "b": ""})
    assert report(tmp_path / "other") == 0
    assert "none" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(report(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE))
