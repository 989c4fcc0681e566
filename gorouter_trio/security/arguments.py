"""Dangerous arguments: rules on what a model wants to hand to a tool, matched on the values that the tool would get.

Theory of operation. Not the JSON text is looked at, in which a letter has many spellings, but each text, key and number
in it, decoded; and of what is not ASCII also the NFKC form, and that without case and invisible characters. Thousands
of small values would take thousands of searches, so all texts are first searched as one, a line each: where that
finds nothing no single one can have a hit, since `^`, `$` and `\\b` see a line's end as a text's. Only a hit is
looked for text by text.

Patterns run on RE2 alone, which takes linear time; `re` can be made to run for hours by the text it searches.
What cannot be checked, because it is no JSON, no Unicode or too much, counts as a hit.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from msgspec import Struct

from ..errors import SecurityConfigError
from .text import folded, is_flood, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import ModuleType

__all__ = ["ArgumentChecker", "Finding", "FindingKind", "check_patterns"]

FindingKind = Literal["blocked_value", "pattern", "unreadable"]
"""A blocked value or a pattern was found, or the arguments could not be checked."""

_MAX_DEPTH = 500
# Between two texts: line ends, so that `^` and `$` hold there, and a character that white space does not cross.
_BETWEEN = "\n\x1f\n"
# Patterns that can tell a text's end from a line's are searched for text by text.
_MINDS_ENDS = re.compile(r"\\[AzCQ]|\(\?[a-zA-Z]*-?[a-zA-Z]*m")


class Finding(Struct, frozen=True):
    """One hit: `rule` is the value or pattern, or says why the arguments could not be checked."""

    kind: FindingKind
    rule: str


class _Match(Protocol):
    def span(self) -> tuple[int, int]: ...


class _Pattern(Protocol):
    def search(self, text: bytes) -> _Match | None: ...


_Found: TypeAlias = tuple[Finding, ...]


class ArgumentChecker:
    """The rules of one configuration, compiled. Arguments of more than `max_chars` are not looked at, and a hit."""

    def __init__(
        self,
        patterns: Sequence[str],
        tool_patterns: Mapping[str, Sequence[str]],
        *,
        blocked_values: Sequence[str],
        max_chars: int,
    ) -> None:
        self._max_chars = max_chars
        self._blocked = [(folded(value), value) for value in blocked_values]
        self._every = _Patterns(patterns)
        self._by_tool = {tool: _Patterns([*patterns, *own]) for tool, own in tool_patterns.items()}

    def check(self, tool: str, arguments: object) -> _Found:
        """Every rule that `arguments`, decoded JSON, break; none when they are clean."""
        try:
            texts = _Texts(self._max_chars).collect(arguments)
            whole = _BETWEEN.join(texts)
            if is_flood(whole):
                raise _UnreadableError("a text that cannot be normalised in time")
            patterns = self._by_tool.get(tool, self._every)
            return (*self._find_blocked(whole), *patterns.find(texts))
        except _UnreadableError as exc:
            return (Finding("unreadable", str(exc)),)
        except UnicodeEncodeError:
            return (Finding("unreadable", "a text with half of a surrogate pair"),)

    def _find_blocked(self, whole: str) -> list[Finding]:
        seen = folded(whole) if self._blocked else ""
        return [Finding("blocked_value", value) for form, value in self._blocked if form in seen]


class _Patterns:
    """Patterns that are looked for together."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._each: Mapping[str, _Pattern] = {pattern: _compile(pattern) for pattern in patterns}
        self._ended = {p: compiled for p, compiled in self._each.items() if _MINDS_ENDS.search(p)}
        self._probes = _probes([p for p in self._each if p not in self._ended])

    def find(self, texts: Sequence[str]) -> list[Finding]:
        """The patterns that one of `texts`, in one of its forms, has a hit of."""
        if not self._each:
            return []
        whole = _BETWEEN.join(_forms_at_once(texts)).encode()
        if not self._ended and not any(probe.search(whole) for probe in self._probes):
            return []
        found = [pattern for pattern, compiled in self._each.items() if self._has_hit(pattern, compiled, whole, texts)]
        return [Finding("pattern", pattern) for pattern in found]

    def _has_hit(self, pattern: str, compiled: _Pattern, whole: bytes, texts: Sequence[str]) -> bool:
        if pattern not in self._ended:
            hit = compiled.search(whole)
            if hit is None or _is_in_one_text(whole, *hit.span()):
                return hit is not None
        return any(compiled.search(form.encode()) for text in texts for form in _forms(text))


def _is_in_one_text(whole: bytes, start: int, end: int) -> bool:
    """Whether a hit has no part in what is between two texts; when in doubt, no."""
    return not (
        b"\x1f" in whole[start:end]
        or whole[max(0, start - 1) : start + 1] == b"\x1f\n"
        or whole[end - 1 : end + 1] == b"\n\x1f"
    )


def check_patterns(place: str, patterns: Sequence[str]) -> None:
    """Raise `SecurityConfigError` for a pattern that RE2 does not take, and for any where it is not installed."""
    for index, pattern in enumerate(patterns):
        problem = _pattern_problem(pattern)
        if problem is not None:
            raise SecurityConfigError(f"{place}[{index}]: {problem}")


def _pattern_problem(pattern: str) -> str | None:
    try:
        re2 = _re2()
    except ImportError:
        return "patterns need google-re2; install the extra with `pip install gorouter-trio[security]`"
    try:
        re2.compile(pattern, _options(re2))  # by itself: in a group, as below, it could close that
        compiled = _compile(pattern)
    except re2.error as exc:
        said = exc.args[0] if exc.args else ""
        return f"is no pattern of RE2: {said.decode('utf-8', 'replace') if isinstance(said, bytes) else said}"
    if compiled.search(b""):
        return "matches the empty text, and so would deny every call"
    return None


def _compile(pattern: str) -> _Pattern:
    """A line of a text is what `^` and `$` are about, and `.` crosses lines: a line end must hide nothing."""
    re2 = _re2()
    compiled: _Pattern = re2.compile(f"(?m:{pattern})", _options(re2))
    return compiled


def _options(re2: ModuleType) -> object:
    options = re2.Options()
    options.case_sensitive = False
    options.dot_nl = True
    options.never_capture = True
    options.log_errors = False
    return options


def _probes(patterns: Sequence[str]) -> list[_Pattern]:
    """One pattern that has a hit where any has, or all of them where RE2 finds that one too large."""
    if not patterns:
        return []
    try:
        return [_compile("|".join(f"(?:{pattern})" for pattern in patterns))]
    except _re2().error:
        return [_compile(pattern) for pattern in patterns]


def _re2() -> ModuleType:
    return importlib.import_module("re2")


class _UnreadableError(ValueError):
    """Arguments that cannot be checked; never leaves this module."""


class _Texts:
    """Collects every text, key and number in decoded JSON, each once."""

    def __init__(self, max_chars: int) -> None:
        self._room = max_chars
        self._found: dict[str, None] = {}

    def collect(self, value: object) -> list[str]:
        todo: list[tuple[object, int]] = [(value, 0)]
        while todo:
            item, depth = todo.pop()
            if isinstance(item, dict):
                for key in item:
                    self._take(key)
                self._descend(item.values(), depth, todo)
            elif isinstance(item, (list, tuple)):
                self._descend(item, depth, todo)
            else:
                self._take(item)
        return list(self._found)

    def _descend(self, items: Iterable[object], depth: int, todo: list[tuple[object, int]]) -> None:
        if depth >= _MAX_DEPTH:
            raise _UnreadableError(f"nested more than {_MAX_DEPTH} deep")
        for item in items:
            if isinstance(item, (dict, list, tuple)):
                todo.append((item, depth + 1))
                self._spend(1)
            else:
                self._take(item)

    def _take(self, item: object) -> None:
        if isinstance(item, str):
            self._spend(len(item) + 1)
            self._found[item] = None
            return
        for text in _spellings(item):
            self._spend(len(text) + 1)
            self._found[text] = None

    def _spend(self, count: int) -> None:
        self._room -= count
        if self._room < 0:
            raise _UnreadableError("more text than can be checked")


def _spellings(item: object) -> tuple[str, ...]:
    """What is no text, as JSON writes it; a whole float also without its point."""
    if item is None:
        return ("null",)
    if item is True or item is False:
        return ("true",) if item else ("false",)
    try:
        if isinstance(item, int):
            return (str(item),)
        if isinstance(item, float):
            return (repr(item), str(int(item))) if item.is_integer() else (repr(item),)
    except ValueError:
        raise _UnreadableError("a number with too many digits") from None
    raise _UnreadableError(f"a {type(item).__name__}, which is no JSON")


def _forms(text: str) -> tuple[str, ...]:
    """The text as it is and, where it is not ASCII, its visible NFKC form and its folded one."""
    return (text,) if text.isascii() else (text, visible(text), folded(text))


def _forms_at_once(texts: Sequence[str]) -> list[str]:
    """All forms of all texts: folding many short ones together is several times faster than one by one."""
    others = [text for text in texts if not text.isascii()]
    return [*texts, *_forms(_BETWEEN.join(others))[1:]] if others else [*texts]
