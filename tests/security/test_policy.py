"""Decisions against a second implementation of the rules, written from their description."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reference import (
    Reference,
    build_config,
    build_principal,
    build_rules,
    draw_call,
    draw_tools,
    draw_who,
    draw_world,
)

from gorouter_trio.security import Allow, Decision, Deny, SecurityManager, ToolCheck

CALLS_A_WORLD = 25


def said(decision: Decision) -> str:
    return decision.reason if isinstance(decision, Deny) else "allow"


def play(rng: random.Random, tally: Counter[str]) -> None:
    """One configuration and a run of calls, a quarter of a second or more apart; every decision has to agree."""
    world = draw_world(rng)
    manager, reference = SecurityManager(build_config(world)), Reference(world)
    callers, tools = [draw_who(rng) for _ in range(4)], draw_tools(rng)
    at = 0.0
    for _ in range(CALLS_A_WORLD):
        at += rng.choice([0.0, 0.25, 0.5, 2.0])
        who, call = rng.choice(callers), draw_call(rng, tools)
        check = ToolCheck(tool=call["tool"], arguments=call["arguments"], rules=build_rules(call["rules"]))
        decided = said(manager.check(build_principal(who), check, now=at, wall=1000.0))
        expected = reference.decide(who, call, at)
        assert decided == expected, (world, who, call, at)
        tally[decided] += 1


def test_decisions_equal_the_reference(record_property) -> None:
    """20,000 calls under 800 chance configurations get the reference's decision, reason included."""
    tally: Counter[str] = Counter()

    @settings(max_examples=800)
    @given(st.integers(min_value=0, max_value=2**64))
    def differ(seed: int) -> None:
        play(random.Random(seed), tally)

    differ()
    assert sum(tally.values()) >= 20_000
    assert min(tally[reason] for reason in ("allow", "access", "authentication", "rate_limit")) > 200
    assert tally["dangerous_argument"] > 100
    record_property("figure", f"{sum(tally.values()):,} decisions equal the reference: {dict(tally)}")


@pytest.mark.long
def test_a_million_decisions(rng: random.Random, record_property) -> None:
    """10^6 seeded cases: no call is allowed that the reference denies, nor the other way round."""
    tally: Counter[str] = Counter()
    while sum(tally.values()) < 1_000_000:
        play(rng, tally)
    record_property("figure", f"{sum(tally.values()):,} decisions equal the reference: {dict(tally)}")


def test_the_reference_can_tell(rng: random.Random) -> None:
    """The comparison is no formality: a reference that forgets one rule differs within a few hundred worlds."""

    class Forgetful(Reference):
        def access(self, who, call):
            if call["tool"] in self.config["tools"]:
                return super().access(who, call)
            return super().access(who, {**call, "rules": {}})

    found = 0
    for _ in range(300):
        world = draw_world(rng)
        honest, forgetful = Reference(world), Forgetful(world)
        for _ in range(20):
            who, call = draw_who(rng), draw_call(rng, draw_tools(rng))
            found += honest.decide(who, call, 0.0) != forgetful.decide(who, call, 0.0)
    assert found > 0


def test_allow_is_one_value() -> None:
    """An allowance says nothing that could be looked into."""
    assert Allow() == Allow()
    assert Allow.__struct_fields__ == ()
