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


async def test_what_only_some_chats_have(autojump_clock, caplog):
    """Session, turn, tenant and streaming stand between the model and the messages, in the line and in the facts."""
    caplog.set_level(logging.INFO, "gorouter_trio.chats")
    async with open_world(plugins=[LoggingPlugin()]) as world:
        await world.client.session("s 1").ask("Well? [[say Yes.]]", tenant="t", turn_id="one")
        async with world.client.stream("Well? [[say Yes.]]") as stream:
            await stream.collect()
    turn, streamed = caplog.records
    model = world.client.default_model
    assert turn.getMessage().startswith(f'chat=1 model={model} session="s 1" turn=one tenant=t messages=1 answered_by=')
    assert list(vars(turn)["chat"])[:6] == ["chat", "model", "session", "turn", "tenant", "messages"]
    assert streamed.getMessage().startswith(f"chat=2 model={model} streamed=True messages=1 answered_by=")
    for record in caplog.records:
        said = dict(pair.partition("=")[::2] for pair in record.getMessage().replace('"s 1"', "s_1").split(" "))
        facts = {name: str(value).replace(" ", "_") for name, value in vars(record)["chat"].items()}
        assert float(said.pop("duration_s")) == float(facts.pop("duration_s"))
        assert said == facts


async def test_a_record_is_as_the_logging_module_makes_it(autojump_clock):
    """The fields of a record are those of `Logger.makeRecord`; a record factory of others is asked."""
    records: list[logging.LogRecord] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    class Theirs(logging.LogRecord):
        pass

    logger = logging.Logger("tests.kept", logging.INFO)
    logger.addHandler(Keeping())
    factory = logging.getLogRecordFactory()
    async with open_world(answer=replies(completion("Yes.")), plugins=[LoggingPlugin(logger)]) as world:
        await world.client.chat("Well?")
        world.client.flush_observers()
        logging.setLogRecordFactory(Theirs)
        try:
            await world.client.chat("Well?")
            world.client.flush_observers()
        finally:
            logging.setLogRecordFactory(factory)
    ours, theirs = records
    assert type(theirs) is Theirs
    assert vars(ours).keys() == vars(theirs).keys()
    assert (ours.levelname, ours.getMessage()[:6], theirs.getMessage()[:6]) == ("INFO", "chat=1", "chat=2")
