"""The logging plugin: a line a chat, which stays a line."""

from __future__ import annotations

import logging

import pytest
from worlds import completion, errors, open_world, replies

import gorouter_trio as gr
from gorouter_trio.plugins import LoggingPlugin


async def test_a_line_a_chat(autojump_clock, caplog):
    """An answer is logged with model, messages, duration and cost; the texts are not; the record has the facts."""
    caplog.set_level(logging.INFO, "gorouter_trio.chats")
    async with open_world(answer=replies(completion("My secret.")), plugins=[LoggingPlugin()], model="a/b") as world:
        await world.client.chat([{"role": "system", "content": "x"}, {"role": "user", "content": "Tell me."}])
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("chat=1 model=a/b messages=2 answered_by=test/model finish_reason=stop duration_s=0")
    assert "cost_usd=0.25" in line
    assert "secret" not in line
    assert "Tell me" not in line
    assert vars(record)["chat"]["messages"] == 2


async def test_an_error_is_one_line(autojump_clock, caplog):
    """An error is a warning, and what the other side says cannot forge a line."""
    caplog.set_level(logging.INFO, "gorouter_trio.chats")
    message = 'no\n2026-01-01 INFO chat=2 "all is well"\x1b[2J'
    async with open_world(answer=errors(400, message), plugins=[LoggingPlugin()]) as world:
        with pytest.raises(gr.BadRequestError):
            await world.client.chat("Well?", tenant="a\nb")
    (record,) = caplog.records
    line = record.getMessage()
    assert record.levelno == logging.WARNING
    assert line.isprintable()
    assert 'tenant="a\\nb"' in line
    assert "error=BadRequestError status=400" in line


async def test_nothing_is_made_for_nobody(autojump_clock, caplog):
    """At a level that is off, nothing is logged; a logger of one's own is taken."""
    quiet = logging.getLogger("tests.quiet")
    quiet.setLevel(logging.ERROR)
    async with open_world(answer=replies(completion("Yes.")), plugins=[LoggingPlugin(quiet)]) as world:
        await world.client.chat("Well?")
    assert not caplog.records
