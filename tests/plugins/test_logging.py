"""The logging plugin: a line a chat, which stays a line."""

from __future__ import annotations

import io
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


async def test_an_answer_of_another_form(autojump_clock, caplog):
    """What is wrong with an answer quotes it, and is not logged."""
    caplog.set_level(logging.INFO, "gorouter_trio.chats")
    schema = {"type": "object", "properties": {"illness": {"type": "integer"}}, "required": ["illness"]}
    output = gr.OutputPolicy(reasks=0, strict_schema=False)
    async with open_world(answer=replies(completion('{"illness":"secret"}')), plugins=[LoggingPlugin()]) as world:
        with pytest.raises(gr.InvalidOutputError, match="secret"):
            await world.client.chat("Well?", response_schema=schema, output=output)
    (record,) = caplog.records
    assert "error=InvalidOutputError" in record.getMessage()
    assert "secret" not in record.getMessage() + str(vars(record)["chat"])


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
        try:
            # What else has been imported may have one of its own.
            for made_by in (logging.LogRecord, Theirs):
                logging.setLogRecordFactory(made_by)
                await world.client.chat("Well?")
                world.client.flush_observers()
        finally:
            logging.setLogRecordFactory(factory)
    ours, theirs = records
    assert type(theirs) is Theirs
    assert vars(ours).keys() == vars(theirs).keys()
    assert (ours.levelname, ours.getMessage()[:6], theirs.getMessage()[:6]) == ("INFO", "chat=1", "chat=2")


async def test_lines_of_many_chats_are_one_write(autojump_clock):
    """One stream handler writes the lines of many chats at once, each in its format, in order, at its level."""
    writes: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    handler = logging.StreamHandler(Stream())
    handler.setFormatter(logging.Formatter("%(levelname)s %(message).6s"))
    logger = logging.Logger("tests.written", logging.INFO)
    logger.addHandler(handler)
    async with open_world(answer=replies(completion("Yes."), (400, b"{}")), plugins=[LoggingPlugin(logger)]) as world:
        await world.client.chat("Well?")
        with pytest.raises(gr.BadRequestError):
            await world.client.chat("Well?")
        world.client.flush_observers()
        assert writes == ["INFO chat=1\nWARNING chat=2\n"]
        handler.setLevel(logging.ERROR)
        with pytest.raises(gr.BadRequestError):
            await world.client.chat("Well?")
    assert len(writes) == 1


class Odd(logging.Formatter):
    """Fails on one line."""

    def format(self, record: logging.LogRecord) -> str:
        if "chat=2" in record.getMessage():
            raise ValueError("no")
        return record.getMessage()[:6]


class Full(io.StringIO):
    """Has no room."""

    def write(self, text: str) -> int:
        raise OSError(28, "no room")


@pytest.mark.parametrize(("stream", "written"), [(io.StringIO, "chat=1\nchat=3\n"), (Full, "")])
async def test_a_handler_that_fails(stream, written, autojump_clock, capsys):
    """One line that cannot be formatted, or a stream that cannot be written to, is told as handlers do, once."""
    target = stream()
    handler = logging.StreamHandler(target)
    handler.setFormatter(Odd() if written else None)
    logger = logging.Logger("tests.failing", logging.INFO)
    logger.addHandler(handler)
    async with open_world(answer=replies(completion("Yes.")), plugins=[LoggingPlugin(logger)]) as world:
        for _ in range(3):
            await world.client.chat("Well?")
    assert target.getvalue() == written
    assert capsys.readouterr().err.count("--- Logging error ---") == 1


async def test_a_line_that_the_stream_cannot_hold(autojump_clock, capsys):
    """It is lost alone, and told, as with a handler that writes line by line; the others are there, each once."""
    written = io.BytesIO()
    handler = logging.StreamHandler(io.TextIOWrapper(written, encoding="ascii"))
    handler.setFormatter(logging.Formatter("%(message).18s"))
    logger = logging.Logger("tests.ascii", logging.INFO)
    logger.addHandler(handler)
    async with open_world(answer=replies(completion("Yes.")), plugins=[LoggingPlugin(logger)]) as world:
        for model in ("a/b", "a/ü", "a/c"):
            await world.client.chat("Well?", model=model)
        world.client.flush_observers()
        assert written.getvalue() == b"chat=1 model=a/b m\nchat=3 model=a/c m\n"
    assert capsys.readouterr().err.count("--- Logging error ---") == 1


@pytest.mark.parametrize("change", ["filter of the logger", "filter of the handler", "second handler", "own emit"])
async def test_what_has_a_say_is_asked(change, autojump_clock, monkeypatch):
    """Filters, further handlers and a changed `emit` see each record, as they do when `Logger.handle` is called."""
    seen: list[str] = []

    def see(record: logging.LogRecord) -> bool:
        seen.append(record.getMessage()[:6])
        return True

    class Seeing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            see(record)

    handler = logging.StreamHandler(target := io.StringIO())
    handler.setFormatter(logging.Formatter("%(message).6s"))
    logger = logging.Logger("tests.asked", logging.INFO)
    logger.addHandler(handler)
    if change == "second handler":
        logger.addHandler(Seeing())
    elif change == "own emit":
        monkeypatch.setattr(handler, "emit", see)
    else:
        (logger if "logger" in change else handler).addFilter(see)
    async with open_world(answer=replies(completion("Yes.")), plugins=[LoggingPlugin(logger)]) as world:
        await world.client.chat("Well?")
        await world.client.chat("Well?")
    assert seen == ["chat=1", "chat=2"]
    assert target.getvalue() == ("" if change == "own emit" else "chat=1\nchat=2\n")
