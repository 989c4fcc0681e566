"""What the simulated models write: English prose about the words of the prompt, and sums with its numbers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

from . import _tokens
from ._draws import Draws

if TYPE_CHECKING:
    from collections.abc import Sequence

_WORD: Final = re.compile(r"[A-Za-z][a-z]{3,15}")
_NUMBER: Final = re.compile(r"\d[\d,]*(?:\.\d+)?")
_EXPRESSION: Final = re.compile(r"(-?\d{1,12})\s*([+\-−–*×x/÷])\s*(\d{1,12})\s*(?:=|\?|$)")
_ASKS_NUMBER: Final = (
    "how many",
    "how much",
    "how old",
    "how long",
    "how far",
    "what",
    "calculate",
    "compute",
    "total",
)
_BRIEF_NOUNS: Final = ("sentence", "answer", "line", "word")
_ASKS_BRIEFLY: Final = re.compile(r"\b(?:one|a|short|single|brief)\b[^.?!]{0,20}\b(?:sentence|answer|line|word)")
_NUMBER_WORD: Final = re.compile(r"\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|half|twice|dozen)\b")
_NUMBER_WORDS: Final = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12,
    "twenty": 20, "half": 2, "twice": 2, "dozen": 12,
}  # fmt: skip
_MAX_NUMBERS: Final = 7
_LONGEST_EXPRESSION: Final = 100
_COMMON_WORDS: Final = (
    "about above after again also although among another answer around because been before being below between both "
    "could does doing done down during each either else even ever every from give gives given have having here into "
    "just know like made make many more most much must need only other over please reply said same sentence shall "
    "short should since some still such take tell than that their them then there these they this those through "
    "together under until upon very want were what when where whether which while whom whose will with within "
    "without would write your"
)
_STOPWORDS: Final = frozenset(_COMMON_WORDS.split())
_DEFAULT_TOPICS: Final = ("question", "answer", "plan")
_READ_BACK: Final = 300
_MAX_TOPICS: Final = 16
_SENTENCES_A_PARAGRAPH: Final = 4

_NOUNS: Final = (
    "approach", "balance", "boundary", "budget", "cause", "constraint", "detail", "difference", "effect", "estimate",
    "example", "figure", "first step", "limit", "measure", "order", "outcome", "pattern", "reason", "relation",
    "remainder", "result", "schedule", "side effect", "starting point", "trade-off", "unit", "whole",
)  # fmt: skip
_ADJECTIVES: Final = (
    "careful", "clear", "common", "direct", "naïve", "plain", "practical", "precise", "robust", "simple", "steady",
    "subtle", "sufficient", "useful", "usual",
)  # fmt: skip
_VERBS: Final = (
    "changes", "decides", "explains", "follows from", "hides", "limits", "matters more than", "rests on", "reveals",
    "shapes", "stands apart from", "supports",
)  # fmt: skip
_PARTICIPLES: Final = (
    "compared", "counted", "divided", "drawn up", "estimated", "measured", "ordered", "planned", "shared", "tested",
    "understood", "written down",
)  # fmt: skip
_ADVERBS: Final = (
    "in practice",
    "as a rule",
    "on the whole",
    "at first",
    "in the end",
    "strictly speaking",
    "most days",
)

# A template and what fills it: a pool of words, or None for a word of the prompt.
_Template: TypeAlias = "tuple[str, tuple[Sequence[str] | None, ...]]"
_OPENINGS_TEMPLATES: Final[tuple[_Template, ...]] = (
    ("Let us begin with %s and the %s behind it.", (None, _NOUNS)),
    ("The short version: %s %s the %s.", (None, _VERBS, _NOUNS)),
    ("There is a %s way to look at %s.", (_ADJECTIVES, None)),
    ("Good question – the %s of %s is easy to miss.", (_NOUNS, None)),
    ("It helps to separate %s from %s before anything is %s.", (None, None, _PARTICIPLES)),
)
_SENTENCES_TEMPLATES: Final[tuple[_Template, ...]] = (
    ("The %s of %s %s the %s, so it is worth a second look.", (_NOUNS, None, _VERBS, _NOUNS)),
    ("When %s is %s, the %s becomes %s.", (None, _PARTICIPLES, _NOUNS, _ADJECTIVES)),
    ("A %s %s is enough here, provided that %s is %s first.", (_ADJECTIVES, _NOUNS, None, _PARTICIPLES)),
    ("%s and %s belong together, yet the %s of each is %s on its own.", (None, None, _NOUNS, _PARTICIPLES)),
    ("What looks like a %s %s is often a matter of %s.", (_ADJECTIVES, _NOUNS, None)),
    ("Nothing about %s forces the %s to be %s.", (None, _NOUNS, _PARTICIPLES)),
    ("One %s %s is to ask how %s would look without the %s.", (_ADJECTIVES, _NOUNS, None, _NOUNS)),
    ("If the %s is off by a third, %s still holds, and the %s stays %s.", (_NOUNS, None, _NOUNS, _ADJECTIVES)),
    ("For %s the %s is ≈ 3 × larger than people expect.", (None, _NOUNS)),
    ("Compare that with %s: the %s %s the %s.", (None, _NOUNS, _VERBS, _NOUNS)),
    ("Once %s is %s, what is left is a %s %s.", (None, _PARTICIPLES, _ADJECTIVES, _NOUNS)),
    ("Keep the %s and the %s apart; %s depends on both.", (_NOUNS, _NOUNS, None)),
    ("%s, the %s of %s is more %s than its %s.", (_ADVERBS, _NOUNS, None, _ADJECTIVES, _NOUNS)),
    ("Two things follow: the %s is %s, and %s needs no further %s.", (_NOUNS, _PARTICIPLES, None, _NOUNS)),
    ("The word “%s” is doing a lot of work in that sentence.", (None,)),
    ("Whoever has %s %s knows why the %s → %s step comes late.", (_PARTICIPLES, None, _NOUNS, _NOUNS)),
)
_CLOSINGS_TEMPLATES: Final[tuple[_Template, ...]] = (
    ("In short, %s comes down to a %s %s.", (None, _ADJECTIVES, _NOUNS)),
    ("So the %s is %s, and %s can wait.", (_NOUNS, _PARTICIPLES, None)),
    ("That is why %s deserves a %s %s. 🧭", (None, _ADJECTIVES, _NOUNS)),
)
_THOUGHTS_TEMPLATES: Final[tuple[_Template, ...]] = (
    ("The user asks about %s.", (None,)),
    ("First I should find the %s of %s.", (_NOUNS, None)),
    ("That leaves %s, which is %s already.", (None, _PARTICIPLES)),
    ("Is the %s %s? Probably, as long as %s is.", (_NOUNS, _ADJECTIVES, None)),
    ("I will check the %s once more.", (_NOUNS,)),
    ("A %s answer will do.", (_ADJECTIVES,)),
)
_WAYS: Final = (
    ("Taking %d away from %d leaves %d.", "-"),
    ("Adding %d to %d gives %d.", "+"),
    ("That is %d × %d = %d in all.", "*"),
    ("Next comes %d more than %d, which is %d.", "+"),
    ("%d off %d leaves %d.", "-"),
)


def _expanded(templates: Sequence[_Template], variants: int) -> tuple[str, ...]:
    """Each template several times with its pools filled in, a `%s` for each word of the prompt left.

    Done once, it leaves two draws a sentence to be made while a client waits.
    """
    draws = Draws(b"templates")
    return tuple(
        form % tuple([draws.choice(pool) if pool else "%s" for pool in pools])
        for form, pools in templates
        for _ in range(variants)
    )


_OPENINGS: Final = _expanded(_OPENINGS_TEMPLATES, 12)
_SENTENCES: Final = _expanded(_SENTENCES_TEMPLATES, 24)
_CLOSINGS: Final = _expanded(_CLOSINGS_TEMPLATES, 12)
_THOUGHTS: Final = _expanded(_THOUGHTS_TEMPLATES, 8)


def find_topics(text: str) -> list[str]:
    """The words of *text* that a reply can take up: its last distinct content words."""
    seen = dict.fromkeys(_WORD.findall(text, max(0, len(text) - _READ_BACK)))
    words = [word for word in seen if word.lower() not in _STOPWORDS]
    return words[-_MAX_TOPICS:] or list(_DEFAULT_TOPICS)


def asks_briefly(text: str) -> bool:
    """Whether the user wants one sentence only."""
    lower = text.lower()
    return any(noun in lower for noun in _BRIEF_NOUNS) and _ASKS_BRIEFLY.search(lower) is not None


def write_prose(draws: Draws, topics: Sequence[str], *, tokens: int) -> str:
    """Prose of about *tokens* tokens, at least one sentence."""
    sentences = [_sentence(draws, _OPENINGS, topics)]
    characters = 4 * tokens - len(sentences[0])
    while characters > 0:
        sentence = _sentence(draws, _SENTENCES if characters > 80 else _CLOSINGS, topics)
        sentences.append(sentence)
        characters -= len(sentence) + 1
    if len(sentences) <= _SENTENCES_A_PARAGRAPH + 1:
        return " ".join(sentences)
    size = _SENTENCES_A_PARAGRAPH
    return "\n\n".join([" ".join(sentences[at : at + size]) for at in range(0, len(sentences), size)])


def write_thoughts(draws: Draws, topics: Sequence[str], *, tokens: int) -> str:
    """What a reasoning model thinks, about *tokens* tokens."""
    sentences: list[str] = []
    characters = 4 * tokens
    while characters > 0 or not sentences:
        sentence = _sentence(draws, _THOUGHTS, topics)
        sentences.append(sentence)
        characters -= len(sentence) + 1
    return " ".join(sentences)


def write_exactly(draws: Draws, topics: Sequence[str], *, tokens: int) -> str:
    """Prose of exactly *tokens* tokens, which may end in the middle of a sentence."""
    text = write_prose(draws, topics, tokens=tokens)
    while _tokens.count(text) < tokens:
        text += " " + write_prose(draws, topics, tokens=tokens)
    return "".join(_tokens.split(text)[:tokens])


def _sentence(draws: Draws, forms: Sequence[str], topics: Sequence[str]) -> str:
    form = draws.choice(forms)
    slots = form.count("%s")
    count = len(topics)
    sentence = form % tuple([topics[byte * count >> 8] for byte in draws.take(slots)])
    return sentence[0].upper() + sentence[1:]


def write_sum(draws: Draws, text: str) -> str | None:
    """Steps with the numbers of a word problem, ending in `#### <number>`; None when *text* is no such problem.

    A plain `17 * 23` is worked out right. A word problem is not understood: its numbers are combined at random.
    """
    plain = _EXPRESSION.search(text) if len(text) < _LONGEST_EXPRESSION else None
    if plain is not None:
        return _work_out(*plain.groups())
    lower = text.lower()
    if not any(asking in lower for asking in _ASKS_NUMBER):
        return None
    numbers = _find_numbers(lower)
    return "\n".join(_steps(draws, numbers)) if len(numbers) > 1 else None


def _find_numbers(text: str) -> list[int]:
    found = [int(number.partition(".")[0].replace(",", "")[:15]) for number in _NUMBER.findall(text)]
    if len(found) < 2:
        found += [_NUMBER_WORDS[word] for word in _NUMBER_WORD.findall(text)]
    return found[:_MAX_NUMBERS]


def _steps(draws: Draws, numbers: Sequence[int]) -> list[str]:
    value = numbers[0]
    steps = [f"We start from {value}."]
    for number in numbers[1:]:
        form, sign = draws.choice(_WAYS)
        if sign == "-" and number > value:
            form, sign = _WAYS[1]
        if sign == "*" and value * number > 10_000_000:
            form, sign = _WAYS[3]
        result = value + number if sign == "+" else value - number if sign == "-" else value * number
        steps.append(form % (number, value, result))
        value = result
    steps.append(f"#### {value}")
    return steps


def _work_out(left: str, sign: str, right: str) -> str | None:
    a, b = int(left), int(right)
    if sign in "/÷":
        if b == 0:
            return "Dividing by zero has no answer."
        value = f"{a // b}" if a % b == 0 else f"{a / b:.6g}"
    elif sign in "*×x":
        value = str(a * b)
    else:
        value = str(a + b if sign == "+" else a - b)
    return f"{a} {sign} {b} = {value}\n#### {value}"
