"""Templates: the columns of a row into the messages of a request. Pure.

A template is a text, which becomes the user's message, or JSON: a list of messages, or a request body that has one. In
each of its strings `{{column}}` stands for the row's value, as text: a string as it is, everything else as JSON. A
string that is nothing but one `{{column}}` is that value itself, whatever it is. Nothing else is special, so braces of
examples in a prompt need no escaping. The texts of CSV stand in messages as they were written; beside the messages,
those of columns with the name of a request field are the number or the JSON that they look like.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import ConfigError, DecodeError
from ..wire.codec import decode_json, encode_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["MissingColumn", "Template"]

_HOLE = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")


class MissingColumn(Exception):  # noqa: N818 - not an error of the package, it becomes a row's problem
    """A row has no value for a column that the template needs."""


class Template:
    """A template made of `text`; raises `ConfigError` for one that cannot be, or that has no column in it."""

    __slots__ = ("_form", "columns", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._form = _form_of(text)
        self.columns = tuple(dict.fromkeys(_holes_of(self._form)))
        if not self.columns:
            raise ConfigError("template: has no {{column}} in it, so that every row would be the same request")

    def __repr__(self) -> str:
        return f"<Template of {', '.join(self.columns)}>"

    def fill(self, record: Mapping[str, object], *, typed: Mapping[str, object] | None = None) -> dict[str, object]:
        """The request body for a row; `typed` are its values beside the messages. Raises `MissingColumn`."""
        missing = [name for name in self.columns if record.get(name) is None]
        if missing:
            state = "is null" if missing[0] in record else "is missing"
            raise MissingColumn(f"the template needs the column {missing[0]!r}, which {state}")
        beside = record if typed is None else typed
        return {
            name: _filled(form, record, whole=record if name == "messages" else beside)
            for name, form in self._form.items()
        }


def _form_of(text: str) -> dict[str, object]:
    """The request body with holes that the text stands for."""
    if not text.strip():
        raise ConfigError("template: is empty")
    start = text.lstrip()[:1]
    form: object = None
    # `{{column}} ...` begins like JSON and is a text.
    if start == "[" or (start == "{" and not text.lstrip().startswith("{{")):
        try:
            form = decode_json(text.encode())
        except DecodeError as exc:
            if '"messages"' in text or '"role"' in text:
                raise ConfigError(f"template: looks like JSON and is none: {exc.message}") from exc
    if isinstance(form, list) and form and all(isinstance(message, dict) for message in form):
        return {"messages": form}
    if isinstance(form, dict) and isinstance(form.get("messages"), list):
        return form
    return {"messages": [{"role": "user", "content": text}]}


def _holes_of(form: object) -> Iterator[str]:
    match form:
        case str():
            yield from _HOLE.findall(form)
        case list():
            for item in form:
                yield from _holes_of(item)
        case dict():
            for item in form.values():
                yield from _holes_of(item)
        case _:
            return


def _filled(form: object, record: Mapping[str, object], *, whole: Mapping[str, object]) -> object:
    """The form with its holes filled; `whole` has the values of strings that are nothing but one."""
    match form:
        case str():
            hole = _HOLE.fullmatch(form)
            if hole is not None:
                return whole[hole[1]]
            return _HOLE.sub(lambda hole: _as_text(record[hole[1]]), form)
        case list():
            return [_filled(item, record, whole=whole) for item in form]
        case dict():
            return {name: _filled(item, record, whole=whole) for name, item in form.items()}
        case _:
            return form


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else encode_json(value).decode()
