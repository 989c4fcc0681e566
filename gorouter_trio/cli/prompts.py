"""Prompts for the demonstration: the kinds of rows that batches are made of, drawn from a seed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ..wire.messages import Message, SystemMessage, UserMessage
from ..wire.requests import ChatRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["CONVERSATION", "make_requests"]

CONVERSATION = (
    "Hello! My name is Ada.",
    "What would you look at first in a queue that is slow?",
    "What is my name?",
)
"""Three turns; the last one needs the first."""

_PRODUCTS = ("kettle", "bicycle lamp", "desk chair", "tent", "rain jacket", "coffee grinder", "keyboard", "backpack")
_TROUBLES = (
    "arrived with a broken handle",
    "stopped working after two weeks",
    "is a different colour from the picture",
    "came without the manual",
    "makes a loud noise",
    "works better than I had hoped",
)
_WISHES = ("Please send a new one.", "I would like my money back.", "Thank you!", "What should I do?")
_PLACES = ("Lisbon", "Osaka", "Tromsø", "Valparaíso", "Kraków", "Nairobi", "Galway", "Tallinn")
_SUBJECTS = (
    "how tides work",
    "why bread rises",
    "what a hash table is",
    "how vaccines train the body",
    "why the sky is blue",
    "what makes a good index in a database",
    "how bees find their way home",
)
_LANGUAGES = ("French", "German", "Portuguese", "Polish", "Japanese")
_SENTENCES = (
    "The meeting was moved to Thursday because the room is being painted.",
    "Please keep the receipt, since the warranty starts with the purchase.",
    "Our train leaves from platform four, ten minutes later than planned.",
    "The soup tastes better when it has rested for an hour.",
)
_NAMES = ("Ines", "Tomasz", "Amara", "Kenji", "Saoirse", "Luís", "Freya", "Nikhil")
_THINGS = ("apples", "pencils", "stamps", "eggs", "marbles")


def make_requests(count: int, seed: int) -> Iterator[ChatRequest]:
    """`count` requests of several kinds, the same ones for the same seed, no two alike."""
    rng = random.Random(seed)
    for number in range(count):
        name, make = rng.choice(_KINDS)
        # The number keeps equal draws apart, so that each row is a request of its own.
        yield ChatRequest(custom_id=f"{name}-{number:04}", messages=make(rng, number), max_tokens=400)


def _classify(rng: random.Random, number: int) -> list[Message]:
    ticket = f"Order {10_000 + number}: the {rng.choice(_PRODUCTS)} {rng.choice(_TROUBLES)}. {rng.choice(_WISHES)}"
    return [
        SystemMessage("Classify the ticket as complaint, question or praise, and say why in one sentence."),
        UserMessage(ticket),
    ]


def _explain(rng: random.Random, number: int) -> list[Message]:
    return [UserMessage(f"Explain {rng.choice(_SUBJECTS)} to a class of {20 + number} pupils.")]


def _translate(rng: random.Random, number: int) -> list[Message]:
    return [UserMessage(f"Translate note {number + 1} into {rng.choice(_LANGUAGES)}: {rng.choice(_SENTENCES)}")]


def _calculate(rng: random.Random, number: int) -> list[Message]:
    have, got, each = rng.randrange(10, 90), rng.randrange(2, 30), number + 2
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    question = (
        f"{name} has {have} {things}, buys {got} more, and then gets {each} from a friend. How many {things} now?"
    )
    return [UserMessage(question)]


def _plan(rng: random.Random, number: int) -> list[Message]:
    return [UserMessage(f"Plan day {number % 7 + 1} of a trip to {rng.choice(_PLACES)} for a group of {number + 2}.")]


_KINDS: tuple[tuple[str, Callable[[random.Random, int], list[Message]]], ...] = (
    ("classify", _classify),
    ("explain", _explain),
    ("translate", _translate),
    ("calculate", _calculate),
    ("plan", _plan),
)
