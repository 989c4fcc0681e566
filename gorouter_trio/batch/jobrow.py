"""A row of a job on its way, as back ends get it."""

from __future__ import annotations

from msgspec import Struct

from ..errors import BadRequestError
from ..wire.mail import CallSettings
from .journal import RowMark

__all__ = ["JobRow"]


class JobRow(Struct, frozen=True):
    """A row on its way: what it is called, what is sent for it, or why nothing is."""

    position: int
    custom_id: str | None
    line_number: int | None
    mark: RowMark
    body: bytes
    settings: CallSettings | None
    error: BadRequestError | None
    was_in_flight: bool = False
