"""One RESP connection: whose reply is whose, whatever is cancelled, cut or slow; without a server."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.errors import ConfigError, StoreError
from gorouter_trio.transport.resp import ErrorReply, RespConnection, RespReader, pack, store_error
from gorouter_trio.transport.resp_address import Place, parse_url
from gorouter_trio.transport.resp_link import RedisBackoff
from gorouter_trio.transport.streams import closable


def make_connection():
    """A connection, and the other side of its stream."""
    ours, theirs = trio.testing.memory_stream_pair()
    return RespConnection(closable(ours), name="the server"), theirs


async def echo(stream, *, latency_s=0.0, rng=None):
    """A server that answers each ECHO with its argument."""
    reader: Any = RespReader()
    while data := await stream.receive_some():
        replies = b"".join(b"$%d\r\n%b\r\n" % (len(command[1]), command[1]) for command in reader.feed(data))
        await trio.sleep(latency_s if rng is None else rng.uniform(0.0, latency_s))
        while replies:
            cut = len(replies) if rng is None else rng.randint(1, len(replies))
            await stream.send_all(replies[:cut])
            replies = replies[cut:]


# The reader


VALUES = {
    b"+OK\r\n": b"OK",
    b":-12\r\n": -12,
    b"$-1\r\n": None,
    b"*-1\r\n": None,
    b"$0\r\n\r\n": b"",
    b"$3\r\na\r\n\r\n": b"a\r\n",
    b"*2\r\n:1\r\n*1\r\n$1\r\na\r\n": [1, [b"a"]],
    b"_\r\n": None,
    b"#t\r\n": True,
    b"#f\r\n": False,
    b",1.5\r\n": 1.5,
    b"%1\r\n+a\r\n:1\r\n": {b"a": 1},
    b"=5\r\ntxt:a\r\n": b"a",
}


@given(st.lists(st.sampled_from(list(VALUES)), min_size=1), st.randoms(use_true_random=False))
def test_replies_in_pieces(wires, rng):
    """Whatever pieces the bytes come in, the replies are the same; a reply of false is one."""
    data, reader, found = b"".join(wires), RespReader(), []
    while data:
        cut = rng.randint(1, len(data))
        found += reader.feed(data[:cut])
        data = data[cut:]
    assert found == [VALUES[wire] for wire in wires]


def test_errors_and_pushed_messages():
    """Errors are values, inside of lists too; what the server pushes comes only to those who want it."""
    wire = b"*1\r\n-ERR inside\r\n>2\r\n+message\r\n+x\r\n-WRONGTYPE no\r\n"
    reader: Any = RespReader()
    inner, outer = reader.feed(wire)
    assert inner[0].text == "ERR inside"
    assert (outer.code, outer.text) == ("WRONGTYPE", "WRONGTYPE no")
    assert [b"message", b"x"] in RespReader().feed(wire, keeps_pushed=True)


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes(data):
    """Bytes that are no RESP raise one typed error, or are waited for."""
    kinds = []
    try:
        RespReader().feed(data)
    except StoreError as exc:
        kinds.append(exc.kind)
    assert kinds in ([], ["foreign"])


def test_packing():
    """A command is what it is made of, as bytes."""
    assert pack(("SET", b"\x00", 1, 1.5, "ü")) == (
        b"*5\r\n$3\r\nSET\r\n$1\r\n\x00\r\n$1\r\n1\r\n$3\r\n1.5\r\n$2\r\n\xc3\xbc\r\n"
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("LOADING Redis is loading the dataset in memory", "loading"),
        ("READONLY You can't write against a read only replica.", "read_only"),
        ("MISCONF Redis is configured to save RDB snapshots", "read_only"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "full"),
        ("NOAUTH Authentication required.", "denied"),
        ("WRONGPASS invalid username-password pair", "denied"),
        ("NOPERM this user has no permissions", "denied"),
        ("BUSY Redis is busy running a script.", "locked"),
        ("CLUSTERDOWN The cluster is down", "locked"),
        ("WRONGTYPE Operation against a key", "foreign"),
        ("ERR unknown command", "refused"),
        ("ERR Error running script (call to f_1): @user_script:3: WRONGTYPE Operation against a key", "foreign"),
        ("ERR Error running script (call to f_1): @user_script: 3: -OOM command not allowed", "full"),
    ],
)
def test_kinds_of_errors(text, kind):
    """What a server refuses says of which kind it is, and keeps the server's words."""
    error = store_error(ErrorReply(text), "SET")
    assert error.kind == kind
    assert text in error.message


# The line


async def test_each_gets_its_own(autojump_clock):
    """A thousand commands of a hundred tasks: each has its own reply, and they share sends."""
    connection, theirs = make_connection()

    async def ask(number):
        for turn in range(10):
            text = b"%d.%d" % (number, turn)
            assert await connection.call(pack(("ECHO", text)), deadline=trio.current_time() + 5) == text

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo, theirs)
        async with trio.open_nursery() as askers:
            for number in range(100):
                askers.start_soon(ask, number)
        nursery.cancel_scope.cancel()
    assert connection.commands == 1000
    assert connection.sends <= 50
    connection.close()


async def test_cancelled_at_any_time(autojump_clock, rng):
    """Whoever is cancelled leaves at once, and its reply is nobody's; the others have theirs."""
    connection, theirs = make_connection()
    counts = {"replies": 0, "cancels": 0}

    async def ask(number):
        for turn in range(40):
            text = b"%d.%d" % (number, turn)
            with trio.move_on_after(rng.choice([0, rng.uniform(0, 0.02)])):
                assert await connection.call(pack(("ECHO", text)), deadline=trio.current_time() + 5) == text
                counts["replies"] += 1
                continue
            counts["cancels"] += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: echo(theirs, latency_s=0.02, rng=rng))
        async with trio.open_nursery() as askers:
            for number in range(50):
                askers.start_soon(ask, number)
        assert await connection.call(pack(("ECHO", b"last")), deadline=trio.current_time() + 5) == b"last"
        nursery.cancel_scope.cancel()
    # How many depends on the order in which tasks run: some of either, or nothing was shown.
    assert min(counts.values()) > 10, counts
    assert connection.in_flight == 0
    assert connection.dropped > 0
    connection.close()


async def test_a_reply_that_came_is_taken(autojump_clock):
    """A cancel that comes with the reply loses: what was given is taken."""
    connection, theirs = make_connection()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def ask(text):
                with trio.CancelScope(shield=True) as shield:
                    reply = await connection.call(pack(("ECHO", text)), deadline=trio.current_time() + 5)
                    shield.shield = False
                    assert reply == text

            nursery.start_soon(ask, b"leads")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, b"parked")
            await trio.testing.wait_all_tasks_blocked()
            await theirs.send_all(b"$5\r\nleads\r\n$6\r\nparked\r\n")
            scope.cancel()
    assert connection.in_flight == 0
    connection.close()


@pytest.mark.parametrize("length", range(0, 40, 1))
async def test_cut_at_every_byte(autojump_clock, length):
    """However far the replies came, those that are whole are given, and the others fail as in doubt."""
    wire = b"$3\r\none\r\n:2\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n+four\r\n"
    expected = [b"one", 2, [b"a", b"b"], b"four"]
    ends = [9, 13, 31, 38]
    connection, theirs = make_connection()
    found: dict[int, object] = {}

    async def ask(number):
        try:
            found[number] = await connection.call(pack(("X", number)), deadline=trio.current_time() + 5)
        except StoreError as exc:
            found[number] = exc.kind

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
        await theirs.send_all(wire[:length])
        await theirs.send_eof()
    whole = sum(end <= length for end in ends)
    assert [found[number] for number in range(4)] == expected[:whole] + ["io"] * (4 - whole)
    assert connection.is_open == (whole == 4)
    connection.close()


async def test_deadline(autojump_clock):
    """A server that says nothing fails all that wait when the first is due, and says that nothing is known."""
    connection, _theirs = make_connection()
    kinds = []

    async def ask(delay_s):
        await trio.sleep(delay_s)
        with pytest.raises(StoreError) as caught:
            await connection.call(pack(("X",)), deadline=trio.current_time() + 5)
        kinds.append((caught.value.kind, trio.current_time()))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for delay_s in (0, 1, 2):
            nursery.start_soon(ask, delay_s)
    assert [kind for kind, _ in kinds] == ["timeout"] * 3
    assert {at - start for _, at in kinds} == {5}


async def test_a_hung_server_is_found_out_when_all_have_gone(autojump_clock):
    """Callers that never wait for their deadline leave a connection that is given up all the same."""
    connection, _theirs = make_connection()
    for _ in range(20):
        with trio.move_on_after(0.1):
            await connection.call(pack(("X",)), deadline=trio.current_time() + 1)
    await trio.sleep(1)
    # A stream without a look at what has arrived cannot be judged; the line is bounded all the same.
    assert connection.in_flight == 20
    with pytest.raises(StoreError) as caught:
        await connection.call(pack(("X",)), deadline=trio.current_time() + 1)
    assert caught.value.kind == "timeout"


async def test_a_reply_for_nobody(autojump_clock):
    """A server that says more than it was asked is not trusted any more."""
    connection, theirs = make_connection()
    async with trio.open_nursery() as nursery:
        await theirs.send_all(b"+first\r\n+second\r\n")
        assert await connection.call(pack(("X",)), deadline=trio.current_time() + 1) == b"first"
        nursery.cancel_scope.cancel()
    with pytest.raises(StoreError) as caught:
        await connection.call(pack(("X",)), deadline=trio.current_time() + 1)
    assert caught.value.kind == "foreign"


async def test_a_reply_that_no_value_stands_for(autojump_clock):
    """A map with a list for a key ends the connection: the replies behind it would reach others than asked for them."""
    connection, theirs = make_connection()
    await theirs.send_all(b"+mine\r\n%1\r\n*1\r\n+a\r\n:1\r\n+of another\r\n")
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            await connection.call(pack(("X",)), deadline=trio.current_time() + 1)
        assert caught.value.kind == "foreign"


async def test_half_a_command_is_never_left(autojump_clock):
    """A cancel in the midst of sending waits for the rest to be sent: the next command is whole."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    connection = RespConnection(closable(ours), name="the server")
    received = bytearray()
    async with trio.open_nursery() as nursery:

        async def ask(scope):
            with scope:
                await connection.call(pack(("X", b"a" * 1000)), deadline=trio.current_time() + 5)

        scope = trio.CancelScope()
        nursery.start_soon(ask, scope)
        await trio.testing.wait_all_tasks_blocked()
        received += await theirs.receive_some(10)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        while len(received) < len(pack(("X", b"a" * 1000))):
            received += await theirs.receive_some(100)
    assert received == pack(("X", b"a" * 1000))
    assert connection.is_open
    connection.close()


# Where it is


@pytest.mark.parametrize(
    ("url", "places", "fields"),
    [
        ("redis://localhost", [("localhost", 6379)], {}),
        ("redis://localhost:7000/3", [("localhost", 7000)], {"db": 3}),
        ("redis://[::1]:7000", [("::1", 7000)], {}),
        ("redis://[::1]", [("::1", 6379)], {}),
        ("rediss://h?db=2", [("h", 6379)], {"has_tls": True, "db": 2}),
        ("redis://ada:p%40ss@h", [("h", 6379)], {"username": "ada"}),
        ("redis://:secret@h", [("h", 6379)], {}),
        ("unix:///tmp/a@b.sock?db=1", [("/tmp/a@b.sock", 0)], {"db": 1}),
        ("unix://:pw@/tmp/s", [("/tmp/s", 0)], {}),
        ("redis+sentinel://a,b:1,[::1]/main/2", [("a", 26379), ("b", 1), ("::1", 26379)], {"master": "main", "db": 2}),
        ("rediss+sentinel://a/main", [("a", 26379)], {"master": "main", "has_tls": True}),
    ],
)
def test_urls(url, places, fields):
    """What a URL says, in all forms."""
    address = parse_url(url)
    assert list(address.places) == [Place(*place) for place in places]
    for name, value in fields.items():
        assert getattr(address, name) == value


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "localhost:6379",
        "redis://",
        "redis://h:x",
        "redis://h:0",
        "redis://h:70000",
        "redis://h/x",
        "redis://h/-1",
        "redis://ada@h",
        "redis://h?foo=1",
        "unix://relative",
        "redis+sentinel://a",
    ],
)
def test_urls_that_cannot_be(url):
    """One clear error, of the setting."""
    with pytest.raises(ConfigError, match="redis: the"):
        parse_url(url)


@pytest.mark.parametrize(
    "url", ["redis://:s3cret/x@h", "redis://:s3cret?x@h:6379", "redis://u:s3cret@h:x", "redis://u:s3cret@h"]
)
def test_passwords_show_nowhere(url):
    """Neither in what a URL is read as nor in what is wrong with it."""
    try:
        told = repr(parse_url(url))
    except ConfigError as exc:
        told = str(exc)
    assert "s3cret" not in told


def test_backoff(rng):
    """Attempts are at least 0.1 s apart, at most 0.9 s, and spread."""
    now, waits = 0.0, []
    backoff = RedisBackoff(random.Random(rng.random()))
    for _ in range(200):
        backoff.begin(now)
        backoff.fail(now)
        waits.append(backoff.next_at - now)
        now = backoff.next_at
    assert min(waits) >= 0.1
    assert max(waits) <= 0.9
    assert len(set(waits)) == 200
