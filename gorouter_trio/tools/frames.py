"""What this program and the process of a tool say to each other: a byte, four bytes of length, and JSON.

The request comes first; then come any number of `P`, and one `R`, which is an `EncodedResult`, or `E`.
"""

from __future__ import annotations

import struct
from typing import Final

from msgspec import Struct

from ..security.rules import Principal

__all__ = ["HEAD", "ChildError", "ChildProgress", "ChildRequest"]

HEAD: Final = struct.Struct("!cI")
"""What stands before each piece of JSON."""


class ChildRequest(Struct, frozen=True, kw_only=True):
    """One call, for a child: where the function is, what it gets, and how much may come back."""

    module: str
    qualname: str
    tool: str
    arguments: dict[str, object]
    call_id: str
    principal: Principal | None
    session: str | None
    turn_id: str | None
    remaining_s: float
    idempotent: bool
    raw_schema: bool
    max_result_bytes: int
    keep_value: bool
    max_process_bytes: int | None


class ChildProgress(Struct, frozen=True):
    """A frame `P`: what the tool says about how far it is."""

    message: str
    fraction: float | None


class ChildError(Struct, frozen=True, kw_only=True):
    """A frame `E`: the exception that ended the tool; `for_model` says that its message is meant for the model."""

    type: str
    message: str
    traceback: str = ""
    for_model: bool = False
    details: dict[str, object] = {}
