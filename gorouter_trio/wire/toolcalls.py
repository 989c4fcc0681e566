"""What became of tool calls: rows of the execution report. Values, which can be stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

__all__ = ["ToolCallError", "ToolCallReport", "ToolStatus"]

ToolStatus = Literal[
    "success",
    "error_parsing",
    "error_validation",
    "error_security",
    "error_execution",
    "error_unknown",
    "error_not_found",
    "error_timeout",
    "error_limit",
    "cancelled",
]
"""How a call ended: it gave a result; its arguments are no JSON object; they do not fit the tool; it was not allowed;
the tool failed; it named no tool; there is no such tool; it took too long; there were too many calls; the turn was
cancelled before it ended. The last three are this package's own, beside those of GoRouter Kit, where each of them is
an `error_execution`."""


class ToolCallError(Struct, frozen=True, kw_only=True):
    """Why a call failed, for whoever runs the program: the model is told less.

    `type` is the name of an exception class, or the status where there was no exception. `details` may
    hold `traceback`, without local variables, and what a `ToolError` was given.
    """

    type: str
    message: str
    details: Mapping[str, object] = {}


class ToolCallReport(Struct, frozen=True, kw_only=True):
    """One row of the execution report.

    `raw_arguments` is the text that the model wrote, `arguments` what it says, where it says anything.
    `has_run` says that the tool was begun, so that the call may have had an effect, whatever the status is.
    `text` is what the model got, cut when `is_cut`. `result` is the tool's value as JSON, kept only when
    `ToolLimits.include_results` asks for it and it was not cut. `duration_s` runs from when the call's turn
    came to its end, waiting for an approval or for a free place included.
    """

    call_id: str
    name: str
    status: ToolStatus
    raw_arguments: str = ""
    arguments: object = None
    result: object = None
    error: ToolCallError | None = None
    text: str = ""
    is_cut: bool = False
    has_run: bool = False
    duration_s: float = 0.0

    @property
    def is_success(self) -> bool:
        """Whether the tool gave a result."""
        return self.status == "success"
