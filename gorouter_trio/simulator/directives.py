"""Directives: what a prompt may tell the simulator to do, in double square brackets in the last user message.

* `[[say TEXT]]`: reply with exactly TEXT.
* `[[refuse TEXT]]`: refuse with TEXT, and say nothing else.
* `[[tokens 200]]`: reply with prose of exactly 200 tokens, and stop there.
* `[[call NAME]]`, `[[call NAME {"city": "Aber"}]]`: call the offered tool NAME, with these arguments or made-up ones
  that satisfy its schema. Several directives make several calls in one message (only the first when the request says
  `parallel_tool_calls: false`). After the results of the tools, the reply is text.
* `[[call NAME#my_id {"city": "Aber"}]]`: the call has this id. `[[call NAME = TEXT]]`: its arguments are TEXT as it
  stands, which need not be JSON. `[[call2 NAME]]`, `[[call3 NAME]]`: call it in the second, third round of tools, which
  are told by the assistant's messages since the user spoke.
* `[[broken]]`, `[[broken x2]]`: where the request asks for JSON, answer with JSON that is cut off, always or for the
  first two answers since the message that says so, with the same request again counting too.
* `[[fault 502]]`, `[[fault 429_upstream x2]]`: meet this fault (a name of `simulator.faults`), or meet it the first
  two times that an equal request comes and answer the third.

`SimulatorConfig.directives` turns them off.
"""

from __future__ import annotations

import math
import re
from typing import Final

from msgspec import Struct

from .faults import FAULTS, FaultKind

__all__ = [
    "NONE",
    "CallDirective",
    "Directives",
    "broken_answers",
    "read_directives",
    "without_directives",
]

_DIRECTIVE: Final = re.compile(r"\[\[(say|refuse|tokens|call\d?|fault)\s+(.*?)\]\](?!\])", re.DOTALL)
_CALL: Final = re.compile(r"([A-Za-z0-9_-]{1,64})(?:#([\w-]{1,64}))?\s*(?:=\s*(.*)|(\{.*\})?\s*)", re.DOTALL)
_BROKEN: Final = re.compile(r"\[\[broken(?:\s+x(\d{1,6}))?\]\]")
_FAULT: Final = re.compile(r"(\w+)(?:\s+x(\d{1,6}))?")
_MAX_TOKENS: Final = 1_000_000


class CallDirective(Struct, frozen=True):
    """A tool to call; no arguments means made-up ones."""

    name: str
    arguments: str | None
    id: str | None = None
    round: int = 1
    """In which round of tools it is called."""


class Directives(Struct, frozen=True):
    """What a prompt asks of the simulator."""

    say: str | None = None
    refuse: str | None = None
    tokens: int | None = None
    calls: tuple[CallDirective, ...] = ()
    fault: FaultKind | None = None
    fault_times: int | None = None
    """How many equal requests meet the fault; None is all."""


NONE: Final = Directives()


def read_directives(text: str) -> Directives:
    """The directives in *text*; what is not well-formed is left to stand as text."""
    if "[[" not in text:
        return NONE
    say: str | None = None
    refuse: str | None = None
    tokens: int | None = None
    calls: list[CallDirective] = []
    fault: tuple[FaultKind, int | None] | None = None
    for verb, rest in _DIRECTIVE.findall(text):
        if verb == "say":
            say = rest
        elif verb == "refuse":
            refuse = rest
        elif verb == "tokens":
            tokens = _read_tokens(rest)
        elif verb.startswith("call"):
            calls += _read_call(rest, turn=int(verb[4:] or 1))
        else:
            fault = _read_fault(rest)
    kind, times = fault or (None, None)
    return Directives(say=say, refuse=refuse, tokens=tokens, calls=tuple(calls), fault=kind, fault_times=times)


def without_directives(text: str) -> str:
    """*text* as a reader who knows no directives would like it."""
    return _BROKEN.sub(" ", _DIRECTIVE.sub(" ", text)) if "[[" in text else text


def broken_answers(text: str) -> float:
    """How many answers to *text* are to be broken: none, some, or all (infinite)."""
    found = _BROKEN.search(text) if "[[broken" in text else None
    if found is None:
        return 0
    return int(found.group(1)) if found.group(1) else math.inf


def _read_call(text: str, *, turn: int) -> list[CallDirective]:
    found = _CALL.match(text)
    if found is None:
        return []
    name, call_id, verbatim, arguments = found.groups()
    return [CallDirective(name, arguments if verbatim is None else verbatim, call_id, turn)]


def _read_tokens(text: str) -> int | None:
    digits = text.strip().lstrip("0") or text.strip()[-1:]
    if not digits.isdecimal():
        return None
    # Python reads no number of thousands of digits.
    return min(int(digits), _MAX_TOKENS) if len(digits) <= len(str(_MAX_TOKENS)) else _MAX_TOKENS


def _read_fault(text: str) -> tuple[FaultKind, int | None] | None:
    found = _FAULT.fullmatch(text.strip())
    if found is None:
        return None
    kind: FaultKind | None = next((known for known in FAULTS if known == found.group(1)), None)
    return None if kind is None else (kind, int(found.group(2)) if found.group(2) else None)
