"""Text as rules and terminals see it: one form for all spellings of the same letters, nothing that moves a cursor."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["escape_controls", "folded", "is_flood", "visible"]

# Unicode's Stream-Safe Text Format allows 30 marks in a row; sorting longer runs takes quadratic time.
_MAX_MARKS = 30
# The two characters that become 18 and 8 others under NFKC; every other one becomes at most 6.
_SPRAWLING = "\ufdfa\ufdfb"
_MAX_SPRAWLING = 1_000

# What shows nothing and joins nothing: the Default_Ignorable_Code_Point property without Hangul fillers' neighbours.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# C0, DEL, C1, line and paragraph separators, directional marks and invisible tags.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]")


def folded(text: str) -> str:
    """The form in which rules compare: NFKC, without case, and without characters that show nothing.

    Fullwidth, circled, ligature and mixed-case spellings of the same letters come out the same.
    """
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", visible(text).casefold())


def visible(text: str) -> str:
    """The NFKC form without characters that show nothing; upper and lower case stay."""
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))


def is_flood(text: str) -> bool:
    """Whether normalising `text` would take more than linear time or room: made to be slow, not to be read."""
    if text.isascii():
        return False
    if sum(map(text.count, _SPRAWLING)) > _MAX_SPRAWLING:
        return True
    run = 0
    for character in _INVISIBLE.sub("", text):
        run = run + 1 if unicodedata.combining(character) else 0
        if run > _MAX_MARKS:
            return True
    return False


def escape_controls(text: str) -> str:
    """`text` with every control, separator and direction character written as its escape, such as `\\x1b`.

    What a stranger wrote can then stand in a log line or on a terminal: it ends no line and moves no cursor.
    Half surrogate pairs are escaped as well, so the result can always be encoded.
    """
    shown = _CONTROL.sub(lambda found: _escape(found[0]), text)
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
