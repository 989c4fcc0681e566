"""Lines of a batch's input: bytes in, a request or the reason why there is none out. Pure.

A line is a JSON object in one of two forms. The *batch form* is that of OpenAI's Batch API:
`custom_id`, `method`, `url` and `body`, the body being sent as it is. The *flat form* is a row of a
data set with `messages`, `prompt` or `question` (the first of them that is there counts) and an `id`
or `custom_id` if it likes; its columns that are request fields (`model`, `temperature`, ...) are
kept, unless they are null, and all others, such as the `answer`, stay here. With a template it is the
template that makes the request of a row's columns, and nothing of them goes into it unasked.

A *record* is a row that was no JSON: of CSV, whose values are texts, or of Parquet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from ..errors import BadRequestError, DecodeError
from ..wire.codec import check_options, decode_json
from ..wire.requests import ChatOptions
from .ids import IdTable
from .template import MissingColumn

if TYPE_CHECKING:
    from .template import Template

__all__ = ["BatchRow", "RowProblem", "RowReader", "parse_row"]

_OPTIONS = frozenset(ChatOptions.__struct_fields__)
_PROMPTS = ("messages", "prompt", "question")
# Fields that are texts whatever they look like.
_TEXTS = frozenset(
    (
        *("model", "user", "session_id", "reasoning_effort", "verbosity", "service_tier", "route"),
        "prompt_cache_key",
    )
)
_PARSED = (_OPTIONS | {"messages"}) - _TEXTS
_BATCH_FORM = ("body", "method", "url")
_SPACE = b" \t\r\n\f\v"
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SHOWN = 60
_MOST_SUFFIXES = 1024
# What explains a line that is no JSON; looked for only after it failed.
_NOT_A_NUMBER = re.compile(rb"""[:,\[]\s*-?(NaN|Infinity)\b""")
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


class BatchRow(Struct, frozen=True):
    """A usable line: `body` is a request body in wire names, `line_number` counts from 1."""

    line_number: int
    custom_id: str
    body: Mapping[str, object]


class RowProblem(Struct, frozen=True):
    """A line that makes no request, and why; `custom_id` where it has one that no line before it has.

    `is_json` is false for a line that is no JSON object at all.
    """

    line_number: int
    custom_id: str | None
    reason: str
    is_json: bool = True

    @property
    def message(self) -> str:
        """The reason with the line it is about."""
        return f"line {self.line_number}: {self.reason}"


class _Unusable(Exception):  # noqa: N818 - not an error of the package, it never leaves this module
    """The reason why a line makes no request."""


class _NotJson(_Unusable):
    """It is no JSON object."""


class RowReader:
    """Reads a batch's lines in order; refuses an id that a line before had, or gives it a suffix.

    Remembers the ids that lines gave themselves, in a temporary file when they are many, and one byte for each line.
    Whoever made it closes it. Reading raises `StoreError` when that file cannot be written, and nothing else.
    """

    __slots__ = ("_duplicates", "_ids", "_suffixes", "_template", "_unnamed", "line_number")

    def __init__(self, *, template: Template | None = None, duplicates: Literal["refuse", "suffix"] = "refuse") -> None:
        self.line_number = 0
        self._template = template
        self._duplicates = duplicates
        self._ids = IdTable()
        # Of ids that came again, the suffix that was given last: those below it are taken.
        self._suffixes: dict[str, int] = {}
        # For each line, whether it goes by its default id: those are too many to be kept as text.
        self._unnamed = bytearray(1)

    def read(self, line: bytes) -> BatchRow | RowProblem | None:
        """The next line, with or without its line end; None for a blank one."""
        self._count()
        text = line.strip(_SPACE)
        if self.line_number == 1:
            text = text.removeprefix(_BOM).strip(_SPACE)
        if not text:
            return None
        return self._claimed(parse_row(text, line_number=self.line_number, template=self._template))

    def read_record(self, record: dict[str, object], *, is_text: bool = False) -> BatchRow | RowProblem:
        """The next row as a record; `is_text` says that all its values are texts."""
        self._count()
        return self._claimed(_row_of(record, self.line_number, self._template, is_text=is_text))

    def skip(self, reason: str, *, is_json: bool = False) -> RowProblem:
        """The next line is one that could not even be read."""
        self._count()
        return RowProblem(self.line_number, None, reason, is_json=is_json)

    def close(self) -> None:
        """Forget the ids; may be called twice."""
        self._ids.close()

    def _count(self) -> None:
        self.line_number += 1
        self._unnamed.append(0)

    def _claimed(self, row: BatchRow | RowProblem) -> BatchRow | RowProblem:
        return row if row.custom_id is None else self._claim(row, row.custom_id)

    def _claim(self, row: BatchRow | RowProblem, custom_id: str) -> BatchRow | RowProblem:
        """Take the row's id, or refuse the row because the id is taken."""
        first = self._take(custom_id, row.line_number)
        if not first:
            return row
        if self._duplicates == "refuse":
            reason = f"the id {_show(custom_id)} stands on line {first} already"
            return RowProblem(row.line_number, None, reason)
        number = self._suffixes.pop(custom_id, 1) + 1
        while self._take(renamed := f"{custom_id}-{number}", row.line_number):
            number += 1
        self._suffixes[custom_id] = number
        if len(self._suffixes) > _MOST_SUFFIXES:
            del self._suffixes[next(iter(self._suffixes))]
        return msgspec.structs.replace(row, custom_id=renamed)

    def _take(self, custom_id: str, line_number: int) -> int:
        """Take the id; the line that has it already, or 0."""
        number = _default_number(custom_id)
        if number < len(self._unnamed) and self._unnamed[number]:
            return number
        if number and number == line_number:
            # Another row may have given itself this one's name.
            if first := self._ids.find(custom_id):
                return first
            self._unnamed[line_number] = 1
            return 0
        return self._ids.claim(custom_id, line_number)


def _default_number(custom_id: str) -> int:
    """The line that has this as its default id, or 0 when no line does."""
    digits = custom_id.removeprefix("row-")
    number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else 0
    return number if custom_id == _default_id(number) else 0


def parse_row(line: bytes, *, line_number: int, template: Template | None = None) -> BatchRow | RowProblem:
    """One line by itself, without white space around it. Never raises."""
    try:
        record = _decode(line)
    except _NotJson as exc:
        return RowProblem(line_number, None, str(exc), is_json=False)
    return _row_of(record, line_number, template)


def _row_of(
    record: dict[str, object], line_number: int, template: Template | None, *, is_text: bool = False
) -> BatchRow | RowProblem:
    custom_id: str | None = None
    try:
        typed = record
        if is_text:
            record = {name: text for name, text in record.items() if text != ""}
            typed = {name: _typed(name, text) for name, text in record.items()}
        custom_id = _find_id(record, line_number)
        body = _make_body(typed) if template is None else _from_template(record, template, typed=typed)
        return BatchRow(line_number, custom_id, body)
    except _Unusable as exc:
        return RowProblem(line_number, custom_id, str(exc))


def _typed(name: str, text: object) -> object:
    """What a text of CSV stands for where it is a field of a request, which may be a number or JSON."""
    if name not in _PARSED or not isinstance(text, str):
        return text
    try:
        value = decode_json(text.encode("utf-8", "surrogatepass"))
    except DecodeError:
        return text
    # A stop of digits is a text: it may be several, and never a number.
    return text if isinstance(value, str) or (name == "stop" and not isinstance(value, list)) else value


def _decode(line: bytes) -> dict[str, object]:
    try:
        record = decode_json(line)
    except DecodeError as exc:
        raise _NotJson(_explain(line, exc)) from exc
    if not isinstance(record, dict):
        raise _NotJson(f"not a JSON object but {_describe(record)}")
    return record


def _explain(line: bytes, error: DecodeError) -> str:
    if line.startswith(_UTF16):
        return "not UTF-8 but UTF-16; save the file as UTF-8"
    try:
        line.decode()
    except UnicodeDecodeError as exc:
        return f"not UTF-8: byte {line[exc.start]:#04x} at column {exc.start + 1}"
    if found := _NOT_A_NUMBER.search(line):
        return f"not JSON: {found[1].decode()} is no JSON number"
    if found := _HALF_PAIR.search(line):
        return f"not JSON: \\u escape of half a surrogate pair at column {found.start() + 1}"
    if isinstance(error.__cause__, RecursionError):
        return "nested too deeply"
    return error.message.partition(" - at ")[0].replace("JSON is malformed: ", "")


def _find_id(record: dict[str, object], line_number: int) -> str:
    name = "id" if record.get("custom_id") is None else "custom_id"
    value = record.get(name)
    if value is None:
        return _default_id(line_number)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _Unusable(f"{name} is {_describe(value)}, and must be a string or a whole number")
    if not value:
        raise _Unusable(f"{name} is empty")
    return value


def _make_body(record: dict[str, object]) -> Mapping[str, object]:
    name = next((name for name in _PROMPTS if record.get(name) is not None), None)
    if isinstance(record.get("body"), dict) or (name is None and any(field in record for field in _BATCH_FORM)):
        return _batch_form(record)
    if name is None:
        raise _Unusable("no messages, prompt or question")
    return _flat_form(record, name)


def _from_template(record: dict[str, object], template: Template, *, typed: dict[str, object]) -> Mapping[str, object]:
    try:
        body = template.fill(record, typed=typed)
    except MissingColumn as exc:
        raise _Unusable(str(exc)) from exc
    _check_messages(body.get("messages"), "messages")
    options = {name: value for name, value in body.items() if name in _OPTIONS}
    if options:
        _check_options(options)
    return body


def _batch_form(record: dict[str, object]) -> Mapping[str, object]:
    body, method, url = (record.get(name) for name in _BATCH_FORM)
    if method != "POST":
        raise _Unusable(f'method must be "POST"{_not(record, "method")}')
    if not isinstance(url, str) or not url.endswith("/chat/completions"):
        raise _Unusable(f"url must end in /chat/completions{_not(record, 'url')}")
    if not isinstance(body, dict):
        raise _Unusable(f"body must be an object{_not(record, 'body')}")
    _check_messages(body.get("messages"), "body.messages")
    return body


def _flat_form(record: dict[str, object], name: str) -> Mapping[str, object]:
    value = record[name]
    if name == "messages":
        _check_messages(value, name)
    elif not isinstance(value, str):
        raise _Unusable(f"{name} is {_describe(value)}, and must be a string")
    elif not value.strip():
        raise _Unusable(f"{name} is blank")
    else:
        value = [{"role": "user", "content": value}]
    fields = {key: field for key, field in record.items() if field is not None and key in _OPTIONS}
    if fields:
        _check_options(fields)
    return {"messages": value, **fields}


def _check_options(fields: dict[str, object]) -> None:
    # A column may have the name of a request field and mean something else: better said here than by the API.
    try:
        check_options(fields)
    except BadRequestError as exc:
        raise _Unusable(exc.message) from exc


def _check_messages(value: object, name: str) -> None:
    if not isinstance(value, list) or not value:
        raise _Unusable(f"{name} must be a list of messages, not {_describe(value)}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise _Unusable(f"{name}: number {number} is {_describe(message)}, not a message")


def _default_id(line_number: int) -> str:
    return f"row-{line_number}"


def _not(record: dict[str, object], name: str) -> str:
    return f", not {_describe(record[name])}" if name in record else " and is missing"


def _describe(value: object) -> str:
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return _show(value)
        case list():
            return "an array" if value else "an empty array"
        case dict():
            return "an object"
        case _:
            return f"the number {_shorten(str(value))}"


def _show(text: str) -> str:
    return repr(_shorten(text))


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
