"""The simulator's tokenizer: pieces of words, about four characters each in English prose.

A token is up to eight letters, three digits or three other signs, with the space before it, or a run of white space.
Joining the pieces gives the text back, so counting, cutting at a token limit and streaming agree with each other.
"""

from __future__ import annotations

import re
from typing import Final

_PIECE: Final = re.compile(r" ?[A-Za-z]{1,8}| ?\d{1,3}| ?[^\sA-Za-z\d]{1,3}|\s+")

split: Final = _PIECE.findall
"""The tokens of a text, in order."""


def count(text: str) -> int:
    """How many tokens *text* has."""
    return len(_PIECE.findall(text))
