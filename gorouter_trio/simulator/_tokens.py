"""The simulator's tokenizer: words with the space before them, in pieces of at most seven characters.

English prose has about 4.5 characters a token this way. Joining the pieces gives the text back, so counting, cutting
at a token limit and streaming agree with each other.
"""

from __future__ import annotations

from typing import Final

_PIECE: Final = 7


def count(text: str) -> int:
    """How many tokens *text* has."""
    words = text.split(" ")
    # A word of n characters and its space are ceil((n + 1) / 7) pieces; the first word has no space.
    return sum([(len(word) + _PIECE) // _PIECE for word in words]) - (len(words[0]) % _PIECE == 0)


def split(text: str) -> list[str]:
    """The tokens of *text*, in order."""
    pieces: list[str] = []
    first, *words = text.split(" ")
    if first:
        pieces += _slices(first)
    for word in words:
        if len(word) < _PIECE:
            pieces.append(f" {word}")
        else:
            pieces += _slices(f" {word}")
    return pieces


def _slices(word: str) -> list[str]:
    return [word[at : at + _PIECE] for at in range(0, len(word), _PIECE)]
