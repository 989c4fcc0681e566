"""What a docstring says about a function and its parameters, in the three styles that people write. Pure.

Google (`Args:` and an indented list), NumPy (`Parameters` underlined) and Sphinx (`:param name:`). Only
descriptions are read: types come from the signature.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Docstring", "parse_docstring"]

_SECTIONS: Final = (
    "args|arguments|attributes|examples?|keyword args|keyword arguments|notes?|other parameters|parameters|params|"
    "raises|references|return|returns|see also|todo|warnings?|warns|yields?"
)
_PARAMETERS: Final = frozenset(
    {"args", "arguments", "keyword args", "keyword arguments", "other parameters", "parameters", "params"}
)
_GOOGLE: Final = re.compile(rf"({_SECTIONS}):\s*", re.IGNORECASE)
_NUMPY: Final = re.compile(rf"({_SECTIONS})\s*", re.IGNORECASE)
_UNDERLINE: Final = re.compile(r"-{3,}\s*")
_GOOGLE_ITEM: Final = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")
_NUMPY_ITEM: Final = re.compile(r"(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?::.*)?")
_FIELD: Final = re.compile(r"[:@](\w+)\b([^:]*):\s*(.*)")
_PARAMETER_FIELDS: Final = frozenset({"param", "parameter", "arg", "argument", "key", "keyword"})


class Docstring(Struct, frozen=True):
    """The text before the first section, and a description each of the parameters that have one."""

    description: str = ""
    parameters: Mapping[str, str] = {}


def parse_docstring(text: str | None) -> Docstring:
    """What `text` says; nothing for None."""
    description: list[str] = []
    found: dict[str, list[str]] = {}
    for kind, body in _split(inspect.cleandoc(text or "").splitlines()):
        if not kind:
            description += body
        elif kind == "field":
            _read_field(body, found)
        elif kind == "numpy":
            _read_items(body, found, item=_NUMPY_ITEM)
        elif kind == "google":
            _read_items(body, found, item=_GOOGLE_ITEM)
    named = {name: " ".join(" ".join(lines).split()) for name, lines in found.items()}
    return Docstring("\n".join(description).strip(), {name: said for name, said in named.items() if said})


def _split(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The docstring in blocks: "" for what is before the first section, then what each following block is."""
    kind, body = "", list[str]()
    position = 0
    while position < len(lines):
        line = lines[position]
        following = lines[position + 1] if position + 1 < len(lines) else ""
        began = _begin(line, following)
        if began is None:
            body.append(line)
        else:
            yield kind, body
            kind, body = began, [line] if began == "field" else []
            position += _UNDERLINE.fullmatch(following) is not None and began != "field"
        position += 1
    yield kind, body


def _begin(line: str, following: str) -> str | None:
    """The kind of block that begins in a line, if one does; "skipped" for sections about other things."""
    if _FIELD.match(line):
        return "field"
    section = _NUMPY.fullmatch(line) if _UNDERLINE.fullmatch(following) else None
    if section is not None:
        return "numpy" if section[1].lower() in _PARAMETERS else "skipped"
    section = _GOOGLE.fullmatch(line)
    if section is not None:
        return "google" if section[1].lower() in _PARAMETERS else "skipped"
    return None


def _read_field(body: list[str], found: dict[str, list[str]]) -> None:
    field = _FIELD.match(body[0])
    if field is not None and field[1] in _PARAMETER_FIELDS and field[2].split():
        # `:param str name: ...` has the type before the name.
        found[field[2].split()[-1].lstrip("*")] = [field[3], *body[1:]]


def _read_items(body: list[str], found: dict[str, list[str]], *, item: re.Pattern[str]) -> None:
    """Items are indented as the first one is; what is indented further goes on with the item before it."""
    indent = next((_indent_of(line) for line in body if line.strip()), 0)
    names: list[str] = []
    for line in body:
        begun = item.fullmatch(line.strip()) if _indent_of(line) == indent else None
        if begun is not None:
            names = [name.strip().lstrip("*") for name in begun[1].split(",")]
            for name in names:
                found[name] = [begun[2]] if item is _GOOGLE_ITEM else []
        elif line.strip() and _indent_of(line) < indent:
            return
        else:
            for name in names:
                found[name].append(line)


def _indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())
