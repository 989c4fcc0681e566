"""Dangerous arguments: found in every spelling, in little time, and never at the cost of a crash."""

from __future__ import annotations

import random
import re
import sys
import time
from typing import Any

import pytest
from attack_corpus import BLOCKED, MORE, NUMBERS, PATTERNS, attacks, harmless
from hypothesis import given
from hypothesis import strategies as st

import gorouter_trio as gr
from gorouter_trio.security import DangerousArguments, Deny, SecurityConfig, SecurityManager, ToolCheck
from gorouter_trio.security.arguments import ArgumentChecker, Finding
from gorouter_trio.security.text import escape_controls, folded, is_flood

CORPUS = list(attacks())


def checker(*patterns: str, blocked: tuple[str, ...] = (), tools: dict[str, Any] | None = None, most: int = 1 << 20):
    return ArgumentChecker(patterns, tools or {}, blocked_values=blocked, max_chars=most)


def test_nothing_is_missed(record_property) -> None:
    """Each of the 500 and more attacks is found (row 43)."""
    by = checker(*PATTERNS, blocked=BLOCKED)
    missed = [name for name, arguments in CORPUS if not by.check("any", arguments)]
    assert missed == []
    assert len(CORPUS) >= 500
    assert len({name for name, _ in CORPUS}) == len(CORPUS)
    record_property("figure", f"{len(CORPUS)} dangerous arguments, 0 missed")


def test_nothing_else_is_found() -> None:
    """What only looks alike passes."""
    by = checker(*PATTERNS, blocked=BLOCKED)
    assert [(value, by.check("any", value)) for value in harmless() if by.check("any", value)] == []


def test_the_corpus_is_no_walkover() -> None:
    """The seed's way, patterns on the JSON text, misses most of the spellings (A17, A18)."""
    import json

    patterns = [re.compile(p.replace("(?-i:", "(?:"), re.IGNORECASE) for p in PATTERNS]

    def seed_finds(arguments: object) -> bool:
        try:
            text = json.dumps(arguments)
        except (TypeError, ValueError, RecursionError):
            return False
        found = any(value.lower() in text.lower() for value in BLOCKED)
        return found or any(pattern.search(text) for pattern in patterns)

    missed = sum(not seed_finds(arguments) for _, arguments in CORPUS)
    assert missed > len(CORPUS) / 3
    assert len(NUMBERS) + len(MORE) < missed


SIZE = 64 * 1024


def _hostile(rng: random.Random) -> dict[str, object]:
    """64 KiB and more of what is slow to search, to fold or to walk."""
    words = ["rm", "curl", "sh", "-r", "ignore", "a", "instructions", "0", "union"]
    return {
        "one letter": "a" * SIZE,
        "almost": "a" * (SIZE - 1) + "b",
        "ones": [1] * (SIZE // 3),
        "small numbers": list(range(100, 13_000)),
        "short texts": [f"{n:x}" for n in range(12_000)],
        "short foreign texts": [f"ж{n}" for n in range(8_000)],
        "fullwidth": "\uff52" * (SIZE // 3),
        "ligatures": "\ufdfa" * 999 + "\ufb01" * ((SIZE - 2997) // 3),
        "marks": "a\u0301\u0302" * (SIZE // 5),
        "words": " ".join(rng.choice(words) for _ in range(SIZE // 5)),
        "dots": "." * SIZE,
        "brackets": [[]] * (SIZE // 4),
        "objects": [{"k": n} for n in range(SIZE // 12)],
    }


def test_it_takes_little_time(rng: random.Random, record_property) -> None:
    """64 KiB of whatever is slowest take at most 10 ms of CPU, the best of three (row 43)."""
    by = checker(*PATTERNS, r"(a+)+$", r"(x+x+)+y", blocked=BLOCKED)
    slowest = (0.0, "")
    for name, arguments in _hostile(rng).items():
        took = min(_timed(by, arguments) for _ in range(3))
        slowest = max(slowest, (took, name))
    record_property("figure", f"64 KiB checked in {slowest[0] * 1e3:.1f} ms at most ({slowest[1]}; goal 10)")
    assert slowest[0] < 0.030  # three times the goal: the machine may be shared


def _timed(by: ArgumentChecker, arguments: object) -> float:
    start = time.process_time()
    by.check("any", arguments)
    return time.process_time() - start


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, st.sampled_from(["rm -rf", "<script>", "hunter2", "ｒｍ  -ｒｆ"]), st.randoms(use_true_random=False))
def test_no_hiding_place(arguments: object, attack: str, rng: random.Random) -> None:
    """An attack put anywhere into chance arguments is found; without it the same is found as text by text."""
    by = checker(r"rm\s+-rf", "<script", blocked=("hunter2",))
    assert by.check("t", _planted(arguments, attack, rng))


def _planted(value: object, attack: str, rng: random.Random) -> object:
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _planted(value[at], attack, rng), *value[at + 1 :]]
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        if rng.random() < 0.3:
            return {**value, key + attack: 1}
        return {**value, key: _planted(value[key], attack, rng)}
    return f"{rng.choice(['', 'x ', chr(10)])}{attack}"


PROBED = (
    r"^a",
    r"a$",
    r"^$|^ab$",
    r"\bab\b",
    r"a.b",
    r"[^x]b\b",
    r"\Aab\z",
    r"(?-s)a.b",
    r"\Bb",
    r"(?m)^b",
    r"b\s",
    r"\sb",
    r"\s+$",
    r"^\s",
    r"[^b]+",
)


@given(st.lists(st.text(alphabet="ab x\n", max_size=4), max_size=6), st.sampled_from(PROBED))
def test_all_at_once_is_one_by_one(texts: list[str], pattern: str) -> None:
    """Searching all texts together never hides a hit that one of them has by itself, nor makes one up."""
    if pattern == r"^$|^ab$":
        pattern = r"^ab$"
    by = checker(pattern)
    alone = any(by.check("t", text) for text in texts)
    assert bool(by.check("t", texts)) == alone


def test_every_hit_is_told() -> None:
    """All rules that are broken are named, those of the tool as well, and those of other tools not (A22)."""
    by = checker("one", "two", blocked=("three",), tools={"t": ("four",), "u": ("five",)})
    text = "one two three four five"
    found = (Finding("blocked_value", "three"), *(Finding("pattern", p) for p in ("one", "two", "four")))
    assert by.check("t", {"a": text}) == found
    assert [f.rule for f in by.check("elsewhere", text)] == ["three", "one", "two"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("\ud800", "half of a surrogate pair"),
        ({"\udfff": 1}, "half of a surrogate pair"),
        (b"x", "a bytes, which is no JSON"),
        ({"a": object()}, "a object, which is no JSON"),
        ([10**5_000], "too many digits"),
        ("x" * 2_000, "more text than can be checked"),
        ([[]] * 2_000, "more text than can be checked"),
        ("a" + "\u0301" * 40, "cannot be normalised"),
        ("a" + "\u0301\u200b" * 40, "cannot be normalised"),
        ("\ufdfa" * 1_001, "cannot be normalised"),
    ],
)
def test_what_cannot_be_checked(arguments: object, said: str) -> None:
    """No crash and no way through: it counts as a hit that says why (A20)."""
    (found,) = checker("never there", most=1_500).check("t", arguments)
    assert found.kind == "unreadable"
    assert said in found.rule


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(?=a)", "is no pattern of RE2"),
        ("(?<!a)b", "is no pattern of RE2"),
        (r"(a)\1", "is no pattern of RE2"),
        ("(a", "is no pattern of RE2"),
        ("a)|(?:b", "is no pattern of RE2"),
        ("[z-a]", "is no pattern of RE2"),
        ("a*", "matches the empty text"),
        ("^", "matches the empty text"),
        ("a" * 5_000, "is 5000 bytes long"),
        (" ", "must not be blank"),
        (7, "must be a str"),
    ],
)
def test_patterns_that_cannot_be_right(pattern: str, said: str) -> None:
    """A pattern that would not work is an error when the rules are made, with its place (A19)."""
    with pytest.raises(gr.SecurityConfigError, match=re.escape(said)) as caught:
        DangerousArguments(patterns=("fine", pattern))
    assert "dangerous_arguments.patterns[1]" in str(caught.value)
    with pytest.raises(gr.SecurityConfigError, match=re.escape("tool_patterns['t'][0]")):
        DangerousArguments(tool_patterns={"t": (pattern,)})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"patterns": "rm"}, "must be several names"),
        ({"blocked_values": "rm"}, "must be several names"),
        ({"blocked_values": ("\u200b",)}, r"blocked_values\[0\]: holds nothing visible"),
        ({"tool_patterns": ["rm"]}, "must be a mapping"),
        ({"tool_patterns": {"t": "rm"}}, "must be several names"),
        ({"audit_only": 1}, "audit_only: must be a bool"),
        ({"max_chars": 0}, "max_chars: must be a whole number"),
    ],
)
def test_settings_that_cannot_be_right(fields: dict[str, Any], said: str) -> None:
    """So is any other mistake."""
    with pytest.raises(gr.SecurityConfigError, match=said):
        DangerousArguments(**fields)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without google-re2 patterns are refused, not run on `re`; blocked values need it not."""
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(gr.SecurityConfigError, match=r"pip install gorouter-trio\[security\]"):
        DangerousArguments(patterns=("rm",))
    assert DangerousArguments(blocked_values=("rm",)).blocked_values == ("rm",)
    assert checker(blocked=("rm",)).check("t", "ＲＭ")


def test_audit_only_goes_on() -> None:
    """Audited hits are events, the call is allowed, and the rules that follow are asked all the same (A22)."""
    rules = DangerousArguments(patterns=("one", "two"), blocked_values=("three",), audit_only=True)
    limit = gr.security.RateLimit(limit=1, period_s=60.0)
    tools = {"t": gr.security.ToolPolicy(allow=True, rate_limit=limit)}
    manager = SecurityManager(SecurityConfig(dangerous_arguments=rules, tools=tools))
    seen: list[object] = []
    manager.on(gr.security.ArgumentAudited, lambda event: seen.append((event.finding, event.rule)))
    call = ToolCheck(tool="t", arguments={"a": "one two three"})
    assert manager.check(None, call, now=0.0, wall=0.0) == gr.security.Allow()
    assert seen == [("blocked_value", "three"), ("pattern", "one"), ("pattern", "two")]
    decision = manager.check(None, call, now=0.0, wall=0.0)
    assert isinstance(decision, Deny)
    assert decision.reason == "rate_limit"


def test_too_many_patterns_for_one() -> None:
    """Patterns that are too large together are searched for by themselves."""
    many = tuple(rf"x{n}y\pL{{260}}z" for n in range(3))
    assert [f.rule for f in checker(*many).check("t", ["x1y" + "ж" * 260 + "z"])] == [many[1]]


def test_folding() -> None:
    """Spellings of the same letters fold to the same text; ASCII takes the short way to the same result."""
    assert {folded(t) for t in ("Straße", "STRASSE", "ｓｔｒａｓｓｅ", "st\u00adrasse", "ﬆrasse")} == {"strasse"}
    assert folded("ABC def") == "abc def"
    assert not is_flood("e\u0301" * 1_000)
    assert not is_flood("abc")


def test_escaping_for_logs() -> None:
    """No line ends, no terminal sequences, no direction marks, nothing that cannot be encoded; the rest stays."""
    hostile = "a\nFAKE line\r\x1b[31m\x00\x7f\x9b2J\u2028\u202e\ud800\u200f\ufeff\U000e0041é漢"
    shown = escape_controls(hostile)
    assert shown == r"a\nFAKE line\r\x1b[31m\x00\x7f\x9b2J\u2028\u202e\ud800\u200f\ufeff\U000e0041é漢"
    assert shown.encode()
