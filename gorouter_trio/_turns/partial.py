"""JSON that is still arriving: the value of what is there so far. Pure."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["PartialValue"]

_FENCE: Final = re.compile(r"\s*```[A-Za-z0-9_-]*[ \t]*\n")
# A number at the end may have more digits to come: 1 would be shown before 12. In a string this holds back a little.
_OPEN_NUMBER: Final = re.compile(r"(?:\A|(?<=[:,\[]))\s*-?[0-9.eE+-]+\Z")


class PartialValue:
    """The value of a JSON text that arrives in pieces, as one that a reader may look at before it is whole.

    Objects and lists have the members that have begun to arrive, a string what there is of it; numbers, true, false
    and null appear when they are whole. A fence around the JSON, which models like to draw, is not part of it.
    """

    __slots__ = ("_is_new", "_text", "value")

    def __init__(self) -> None:
        self._text = ""
        self._is_new = True
        self.value: object = None

    def add(self, text: str) -> bool:
        """Take another piece; tells whether there is a value, and another one than before."""
        self._text += text
        return self._look(_OPEN_NUMBER.sub("", self._text))

    def end(self) -> bool:
        """There are no more pieces; tells whether that makes another value."""
        return self._look(self._text)

    def _look(self, text: str) -> bool:
        # Here, since few programs ever want it.
        from jiter import from_json

        fence = _FENCE.match(text)
        try:
            value = from_json(text[fence.end() :].encode() if fence else text.encode(), partial_mode="trailing-strings")
        except ValueError:
            return False
        if not self._is_new and value == self.value:
            return False
        self.value, self._is_new = value, False
        return True
