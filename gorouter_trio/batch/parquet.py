"""Rows of a Parquet file, some at a time, by pyarrow (extra `parquet`)."""

from __future__ import annotations

import importlib
import math
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ParquetRows", "plain_value"]

_ROWS = 512


class _Column(Protocol):
    def to_pylist(self) -> list[object]: ...

    def cast(self, to: str) -> _Column: ...


class _Schema(Protocol):
    names: list[str]


class _Batch(Protocol):
    schema: _Schema
    columns: list[_Column]

    def to_pylist(self) -> list[dict[str, object]]: ...


class _File(Protocol):
    def iter_batches(self, batch_size: int) -> Iterator[_Batch]: ...

    def close(self) -> None: ...


class ParquetRows:
    """The rows of the file at `path` as mappings. Used by one thread at a time; the caller closes it.

    Raises `ConfigError` without pyarrow and for what is no Parquet file, `OSError` when reading fails.
    """

    def __init__(self, path: str) -> None:
        try:
            parquet = importlib.import_module("pyarrow.parquet")
            arrow = importlib.import_module("pyarrow")
        except ImportError as exc:
            raise ConfigError(f"{path}: Parquet needs the extra: pip install gorouter-trio[parquet]") from exc
        self._broken = cast("type[Exception]", arrow.ArrowException)
        self._path = path
        try:
            self._file = cast("_File", parquet.ParquetFile(path))
        except self._broken as exc:
            raise ConfigError(f"{path}: is no Parquet file ({_first_line(exc)})") from exc
        self._batches = self._file.iter_batches(batch_size=_ROWS)

    def read(self) -> list[dict[str, object]]:
        """The next rows; none at the end."""
        try:
            for batch in self._batches:
                if rows := _rows_of(batch):
                    return [{name: plain_value(value) for name, value in row.items()} for row in rows]
        except self._broken as exc:
            raise OSError(f"{self._path}: the Parquet file is damaged ({_first_line(exc)})") from exc
        return []

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _rows_of(batch: _Batch) -> list[dict[str, object]]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        columns = [_values_of(column) for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values_of(column: _Column) -> list[object]:
    """The values of a column; as texts where Python has no form for one, such as for a time with nanoseconds."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        texts = column.cast("string").to_pylist()
        return [text.replace(" ", "T", 1) if isinstance(text, str) else text for text in texts]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def plain_value(value: object) -> object:
    """A value of a column as JSON has it; what is no number is null."""
    match value:
        case dict():
            return {str(name): plain_value(item) for name, item in value.items()}
        case list():
            return [plain_value(item) for item in value]
        case bytes():
            return value.decode(errors="replace")
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Decimal():
            return str(value)
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
