"""`open_client`: what is refused before anything opens, and how errors leave."""

from __future__ import annotations

import gc
import ssl
import sys
import traceback

import pytest
import trio
import trio.testing
from worlds import completion, open_quiet_client, open_world, replies

import gorouter_trio as gr


class NoNetwork:
    """A network that nothing may be opened on."""

    def __init__(self):
        self.connects = 0

    async def connect(self, host, port):
        self.connects += 1
        raise OSError(f"no way to {host}:{port}")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"modle": "x"}, "modle"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "sk-\x01"}, "api_key"),
        ({"model": " "}, "model"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"base_url": "http://example.com/api"}, "base_url"),
        ({"transport": 5}, "transport"),
        ({"tls": object()}, "tls"),
        ({"store": "redis://:pass@host"}, "store: a str is no history store: it has no method load$"),
    ],
)
async def test_wrong_settings_are_refused_before_anything_opens(monkeypatch, fields, names):
    """A wrong setting is a `ConfigError` that names it, before a task or a connection exists."""
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    before = trio.lowlevel.current_statistics().tasks_living
    with pytest.raises(gr.ConfigError, match=names):
        async with gr.open_client(**{"api_key": "sk-x", **fields}):
            pytest.fail("the body was entered")
    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_no_key_at_all(monkeypatch):
    """Without a key, the error says which variable to set."""
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(gr.ConfigError, match="OPENROUTER_API_KEY"):
        async with gr.open_client():
            pass


async def test_config_and_fields_together(autojump_clock):
    """Fields given by name win over the config's."""
    config = gr.ClientConfig(model="a/b", app_name="one")
    async with open_world(answer=replies(completion())) as world:
        settings = world.fields
        async with gr.open_client(config, **{**settings, "app_name": "two"}) as client:
            await client.chat("hi")
        assert world.sent[0].body["model"] == "a/b"
        assert world.sent[0].headers["x-title"] == "two"


async def test_opening_connects_to_nothing():
    """A client that is opened and closed again has not touched the network."""
    network = NoNetwork()
    async with open_quiet_client(api_key="sk-x", base_url="http://localhost:1", transport=network):
        await trio.testing.wait_all_tasks_blocked()
    assert network.connects == 0


async def test_no_connection(autojump_clock):
    """Where nothing can be reached, a chat is tried again and then a `ConnectError`, which nothing can have billed."""
    network = NoNetwork()
    async with open_quiet_client(api_key="sk-x", base_url="http://localhost:1", transport=network) as client:
        with pytest.raises(gr.ConnectError) as caught:
            await client.chat("hi")
    assert (network.connects, caught.value.attempts) == (4, 0)
    assert not caught.value.maybe_billed


class OwnError(Exception):
    """Somebody's error."""


@pytest.mark.parametrize("error", [ValueError("x"), OwnError(), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
async def test_body_error_leaves_as_itself(autojump_clock, error):
    """What the body raises is what the caller catches: the same object, in no group, whatever runs meanwhile."""
    with pytest.raises(type(error)) as caught:
        async with open_world(answer=replies(completion())) as world:
            await world.client.session("a").ask("hi")
            async with world.another_client() as client:
                await client.chat("hi")
                raise error
    assert caught.value is error


async def test_context_and_cause_stay(autojump_clock):
    """An error keeps the context and the cause that it had, and says no word about groups."""
    settings = {"api_key": "sk-x", "base_url": "http://localhost:1", "transport": NoNetwork()}
    with pytest.raises(ValueError) as caught:
        async with gr.open_client(**settings):
            try:
                raise KeyError("first")
            except KeyError:
                raise ValueError("second")  # noqa: B904 - the implicit context is what is tested
    assert isinstance(caught.value.__context__, KeyError)
    assert not caught.value.__suppress_context__
    assert "ExceptionGroup" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ValueError) as caught:
        async with gr.open_client(**settings):
            raise ValueError("second") from OwnError("cause")
    assert isinstance(caught.value.__cause__, OwnError)


async def test_users_own_group_stays_a_group(autojump_clock):
    """A group that the body's own nursery raised leaves as that very group, also when it holds one error only."""

    async def fail():
        raise OwnError

    for count in (1, 2):
        raised = None
        async with open_world(answer=replies(completion())) as world:
            with pytest.raises(ExceptionGroup) as caught:
                async with world.another_client() as client:
                    await client.chat("hi")
                    try:
                        async with trio.open_nursery() as nursery:
                            for _ in range(count):
                                nursery.start_soon(fail)
                    except ExceptionGroup as group:
                        raised = group
                        raise
        assert caught.value is raised
        assert [type(exc) for exc in caught.value.exceptions] == [OwnError] * count


async def test_error_of_a_chat_leaves_as_itself(autojump_clock):
    """The library's own errors do, too."""
    with pytest.raises(gr.BadRequestError):
        async with open_world() as world:
            await world.client.chat("[[fault 400_provider]]")


@pytest.mark.parametrize("what", ["chat", "stream", "ask", "nothing"])
async def test_outer_cancel_passes(autojump_clock, what):
    """A cancel from outside ends the client, whatever it does, and is caught by the scope that it came from."""

    async def work(world):
        if what == "chat":
            await world.client.chat("[[fault hang]]")
        elif what == "ask":
            await world.client.session("k").ask("[[fault hang]]")
        elif what == "stream":
            async with world.client.stream("[[tokens 50]]") as stream:
                await anext(stream)
                await trio.sleep_forever()
        else:
            await trio.sleep_forever()

    async with open_world() as world:
        with trio.move_on_after(5) as scope:
            async with world.another_client() as client:
                world.client, _ = client, world.client
                await work(world)
        assert scope.cancelled_caught
        assert trio.current_time() - scope.deadline < 1


async def test_cancel_with_a_nursery_in_the_body(autojump_clock):
    """A cancelled body with tasks of its own ends without an error."""
    async with open_world() as world:
        with trio.move_on_after(5) as scope:
            async with world.another_client() as client, trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(client.chat, "[[fault hang]]")
        assert scope.cancelled_caught


async def test_nested_clients_do_not_meet(autojump_clock):
    """Two clients in one process share nothing: not keys, models, sessions or stores."""
    async with open_world(model="a/b", answer=replies(completion())) as world:
        async with world.another_client(model="c/d", api_key="sk-other") as inner:
            await world.client.session("k", system="one").ask("outer")
            await inner.session("k", system="two").ask("inner")
            assert len(await inner.session("k", system="two").history()) == 2
        outer, inner_sent = world.sent
        assert (outer.body["model"], inner_sent.body["model"]) == ("a/b", "c/d")
        assert (outer.headers["authorization"], inner_sent.headers["authorization"]) == (
            "Bearer sk-test",
            "Bearer sk-other",
        )
        assert inner_sent.contents == ["two", "inner"]
        assert (await world.client.chat("the outer one lives")).text == "Yes."


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there contextlib's own frames keep a group that it hands on")
async def test_a_client_leaves_no_garbage_cycles(autojump_clock):
    """Errors that were unwrapped hold no cycle that only the collector could free."""

    class LocalError(Exception):
        pass

    async def fail_once():
        with pytest.raises(LocalError):
            async with open_quiet_client(api_key="sk-x", base_url="http://localhost:1", transport=NoNetwork()):
                raise LocalError

    await fail_once()
    gc.collect()
    await fail_once()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, LocalError)]


async def test_tls_context_is_taken():
    """An `ssl.SSLContext` is a setting; nothing else is."""
    async with gr.open_client(api_key="sk-x", tls=ssl.create_default_context()) as client:
        assert client.statistics().connections == 0


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
async def test_a_ledger_whose_name_no_file_can_have(autojump_clock, tmp_path, name):
    """It is refused as other settings are, and not by what opens files."""
    with pytest.raises(gr.ConfigError, match=r"ledger\.path: must be the name of a file"):
        async with open_quiet_client(api_key="k", ledger=gr.LedgerConfig(path=str(tmp_path / name))):
            pass
