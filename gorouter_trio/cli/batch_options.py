"""The options of `gorouter-trio batch`, as a job and what holds for its rows."""

from __future__ import annotations

import codecs
import importlib
import sys
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from .._turns.request import TurnKeywords
from ..batch.settings import BatchJob
from ..errors import DecodeError
from ..wire.codec import decode_json
from .batch import BatchCommand
from .failures import CliError, why
from .options import FLAG
from .terminal import clean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

__all__ = ["BatchChoices", "choose_batch", "import_named", "import_tools", "is_module_name"]

_STDIN, _STDOUT = 0, 1
_EACH = Parameter(negative="", show_default=False)
# What is no JSON cannot be given here.
_OPTIONS = TurnKeywords.__annotations__.keys() - {"output", "tool_limits", "approve", "access_token"}
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BatchChoices:
    """What a batch may be told."""

    max_in_flight: int = 256
    """How many requests run at a time."""
    limit: int | None = None
    """Take only so many rows."""
    input_format: Literal["auto", "jsonl", "csv", "tsv", "parquet"] = "auto"
    """How the rows are written; by default as the name says."""
    template: str | None = None
    """What is asked, with {{column}} for a row's values; @FILE reads it from a file. A text, or JSON with messages."""
    ordered: Annotated[bool, FLAG] = False
    """Write the answers in the order of the rows."""
    resume: Annotated[bool, FLAG] = False
    """Go on with a job that was stopped; begin it where it was not begun."""
    retry_failed: Annotated[bool, FLAG] = False
    """Go on with a job, and run the rows again that have failed."""
    overwrite: Annotated[bool, FLAG] = False
    """Replace an output that exists."""
    suffix_duplicates: Annotated[bool, FLAG] = False
    """Give rows whose id was there before another one (id-2, id-3) in place of an error."""
    schema: Path | None = None
    """A file with the JSON schema that every answer has to follow."""
    tools: Annotated[list[str] | None, _EACH] = None
    """Functions that the model may call, as MODULE:FUNCTION; may be given several times."""
    option: Annotated[list[str] | None, _EACH] = None
    """NAME=VALUE for every request, such as temperature=0; may be given several times."""
    system: str | None = None
    """Instructions for the model, where a row has none."""
    budget_usd: str | None = None
    """The most that the job may cost, all its runs together."""
    deadline: str | None = None
    """Take no more rows after so long, such as 90m or 8h."""
    via: Literal["live", "api", "auto"] = "live"
    """How rows are sent: live; by the API's Batch API, at half the price within a day; or as the deadline allows."""
    dedup: Annotated[bool, FLAG] = False
    """Ask equal requests once."""
    cache: str | None = None
    """A file of answers: what is in it is not asked again, and what is asked gets in."""
    max_failures: int | None = None
    """Stop when so many rows have failed."""
    dry_run: Annotated[bool, FLAG] = False
    """Say what the job will come to, and send nothing."""
    report: str | None = None
    """Write the summary as JSON into this file as well."""


def choose_batch(source: str, output: str, *, choices: BatchChoices) -> BatchCommand:
    """The job that the options ask for; raises `CliError` for those that cannot be."""
    if choices.overwrite and (choices.resume or choices.retry_failed):
        raise CliError("--overwrite begins again, and --resume and --retry-failed go on: give one of them")
    for name in ("max_in_flight", "limit", "max_failures"):
        value = getattr(choices, name)
        if value is not None and value < 1:
            raise CliError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    job = BatchJob(
        source=_STDIN if source == "-" else source,
        output=_STDOUT if output == "-" else output,
        input_format=choices.input_format,
        template=None if choices.template is None else _text_of(choices.template),
        duplicates="suffix" if choices.suffix_duplicates else "refuse",
        max_in_flight=choices.max_in_flight,
        limit=choices.limit,
        ordered=choices.ordered,
        if_exists="resume" if choices.resume else "overwrite" if choices.overwrite else "fail",
        retry_failed=choices.retry_failed,
        budget_usd=None if choices.budget_usd is None else _amount(choices.budget_usd),
        deadline_s=None if choices.deadline is None else _seconds(choices.deadline),
        max_failures=choices.max_failures,
        via=choices.via,
        dedup=choices.dedup,
        cache=choices.cache,
    )
    system = None if choices.system is None else clean(choices.system)
    return BatchCommand(job, dict(_options(choices)), system=system, report=choices.report, dry=choices.dry_run)


def _options(choices: BatchChoices) -> Iterator[tuple[str, object]]:
    for text in choices.option or ():
        name, sign, value = text.partition("=")
        if not (name and sign):
            raise CliError(f"--option must be NAME=VALUE, not {text!r}")
        if name not in _OPTIONS:
            raise CliError(f"--option: requests have no field {name!r}")
        yield name, _value(clean(value))
    if choices.schema is not None:
        yield "response_schema", _schema(choices.schema)
    if choices.tools:
        yield "tools", import_tools(choices.tools)


def import_tools(names: Sequence[str]) -> list[object]:
    """The functions that are named as MODULE:FUNCTION; raises `CliError` for one that is not there."""
    return [_function(name) for name in names]


def import_named(module: str) -> ModuleType:
    """The module, which may be in the directory in which the command runs; raises `ImportError`."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(module)


def is_module_name(text: str) -> bool:
    """Whether it may be the whole name of a module."""
    return all(part.isidentifier() for part in text.split("."))


def _value(text: str) -> object:
    """JSON where it is some, else the text."""
    try:
        return decode_json(text)
    except DecodeError:
        return text


def _schema(path: Path) -> object:
    try:
        schema = decode_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as exc:
        raise CliError(f"{path}: {why(exc)}") from exc
    except DecodeError as exc:
        raise CliError(f"{path}: is no JSON: {exc.message}") from exc
    if not isinstance(schema, dict):
        raise CliError(f"{path}: must be a JSON schema, which is an object")
    return schema


def _function(name: str) -> object:
    module, sign, attribute = name.partition(":")
    if not (is_module_name(module) and sign and attribute):
        raise CliError(f"--tools must be MODULE:FUNCTION, not {name!r}")
    try:
        found = getattr(import_named(module), attribute, None)
    except ImportError as exc:
        raise CliError(f"--tools: {exc}") from exc
    if not callable(found):
        raise CliError(f"--tools: {module} has no function {attribute}")
    return found


def _text_of(given: str) -> str:
    """The template, or what is in the file that is named with an @."""
    if not given.startswith("@"):
        return clean(given)
    try:
        return Path(given[1:]).read_text("utf-8-sig")
    except OSError as exc:
        raise CliError(f"{given[1:]}: {why(exc)}") from exc
    except UnicodeDecodeError as exc:
        raise CliError(f"{given[1:]}: is not UTF-8") from exc


def _amount(text: str) -> Decimal:
    try:
        usd = Decimal(text.removeprefix("$"))
    except InvalidOperation as exc:
        raise CliError(f"--budget-usd must be an amount such as 2.50, not {text!r}") from exc
    if not (usd.is_finite() and usd > 0):
        raise CliError(f"--budget-usd must be above 0, not {text}")
    return usd


def _seconds(text: str) -> float:
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError as exc:
        raise CliError(f"--deadline must be a time such as 90m or 8h, not {text!r}") from exc
    if not 0 < seconds < float("inf"):
        raise CliError(f"--deadline must be above 0, not {text}")
    return seconds
