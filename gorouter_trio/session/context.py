"""How much of a history goes into a request, decided. Pure.

Tokens are those that the replies have counted (`usage`), per turn; of what no reply has counted yet they are
estimated from the bytes. What is left out is always a number of whole turns from the first one on, and never parts a
tool call from its result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from .transcript import BYTES_PER_TOKEN

if TYPE_CHECKING:
    from ..config import ContextPolicy
    from .transcript import Transcript

__all__ = ["Context", "decide"]


class Context(Struct, frozen=True):
    """Leave out the turns before `first`, once those before `fold` are in a summary; 0 is none."""

    first: int = 0
    fold: int = 0


_WHOLE = Context()


def decide(policy: ContextPolicy | None, transcript: Transcript, *, new_bytes: int, end: int | None = None) -> Context:
    """What of `transcript` goes into a request that adds messages of `new_bytes` bytes.

    `end` is where the history ends for this request: the place of the turn that it replaces.
    """
    if policy is None:
        return _WHOLE
    turns = transcript.length if end is None else min(end, transcript.length)
    first = max(
        _back_to_group(transcript, turns - policy.max_turns) if policy.max_turns is not None else 0,
        _within(policy.max_tokens, transcript, turns=turns, new_tokens=new_bytes // BYTES_PER_TOKEN),
    )
    if first <= transcript.folded or end is not None:
        return Context(first)
    if policy.summarise is None:
        return Context(first)
    return Context(first, max(first, _back_to_group(transcript, turns - policy.keep_turns)))


def _back_to_group(transcript: Transcript, place: int) -> int:
    """The turn at `place`, or the one in which its first messages have their calls."""
    while place > 0 and transcript.is_inside(place):
        place -= 1
    return max(place, 0)


def _within(max_tokens: int | None, transcript: Transcript, *, turns: int, new_tokens: int) -> int:
    """The first turn with which a request has at most `max_tokens`; what answers its calls comes with the last one."""
    if max_tokens is None:
        return 0
    room = max_tokens - transcript.fixed_tokens - new_tokens
    total = transcript.tokens_before(turns)
    low, high = 0, turns
    while low < high:
        middle = (low + high) // 2
        if total - transcript.tokens_before(middle) <= room:
            high = middle
        else:
            low = middle + 1
    while low < turns and transcript.is_inside(low):
        low += 1
    return _back_to_group(transcript, low) if low == turns else low
