"""What the fuzzers and the tests in tests/fuzz hold every parser to.

A target has a *subject*, the parser alone, which is timed and whose memory is measured, and a *check*, which holds
what the parser made of the input against what must be true of it: only declared errors, the same result however the
bytes are cut, and nothing that could not be sent or stored again. Run by itself, `python fuzz/targets.py FILE...` tries
inputs from files, such as those that a fuzzer saved: the target is the part of the name before the first dash.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import time
import tracemalloc
import zlib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import trio

from gorouter_trio.batch.rows import BatchRow, RowProblem, RowReader
from gorouter_trio.errors import ApiError, BadRequestError, ConnectError, DecodeError, GorouterError, StreamBrokenError
from gorouter_trio.network import Proxy
from gorouter_trio.secret import Secret
from gorouter_trio.tools.arguments import ArgumentsError, canonical_json, parse_arguments
from gorouter_trio.transport.compression import make_decoder
from gorouter_trio.transport.connection import HttpConnection
from gorouter_trio.transport.http import ConnectionLimits, Origin, RequestHead
from gorouter_trio.transport.proxy import open_tunnel
from gorouter_trio.wire.codec import (
    decode_chunks,
    decode_completion,
    decode_error,
    decode_json,
    decode_message,
    encode_message,
    encode_request,
    to_message,
)
from gorouter_trio.wire.faults import parse_retry_after
from gorouter_trio.wire.merge import ChunkMerge
from gorouter_trio.wire.requests import ChatRequest
from gorouter_trio.wire.responses import (
    ChatCompletion,
    Choice,
    ErrorBody,
    ReplyFunction,
    ReplyMessage,
    ReplyToolCall,
    Usage,
)
from gorouter_trio.wire.sse import SseParser
from gorouter_trio.wire.stream import ChatChunk, ChunkChoice, Delta

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence

    from msgspec import Struct

T = TypeVar("T")
R = TypeVar("R")

NOW_S = 1_795_300_000.0
UNIT_BYTES = 65_536
LIMIT_S = 0.010
FIXED_BYTES = 131_072


@dataclass(frozen=True, slots=True)
class Target:
    """`subject` may raise `GorouterError` and nothing else; `check` raises `AssertionError`.

    `words` are for a fuzzer's dictionary. `memory_factor` is how many times the size of its input a subject may hold at
    its peak. Ten is not enough where many short values are allowed: `{}` in a list of choices and `a:` among headers
    take three or four bytes on the wire and a hundred or more in memory, an empty line one byte and sixteen.
    `time_factor` widens the time limit: rows of a batch have a cost of their own however short they are, and so have
    chunks of a stream whose fields are not of the promised types (15 µs each, from 22 bytes on). `fixed_bytes` may be
    held whatever the input is.
    """

    name: str
    subject: Callable[[bytes], object]
    check: Callable[[bytes], None]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()
    memory_factor: int = 10
    time_factor: float = 1.0
    fixed_bytes: int = FIXED_BYTES


class BrokenPromiseError(AssertionError):
    """Something that must be true of every input is not."""


def must(condition: object, what: str = "broken promise") -> None:
    if not condition:
        raise BrokenPromiseError(what)


def run(target: Target, data: bytes, *, slack: float = 1.0, measure_memory: bool = True) -> None:
    """Hold one input to everything; `slack` widens the time limit for instrumented code and busy machines."""
    check_time(target, data, slack=slack)
    if measure_memory:
        check_memory(target, data)
    target.check(data)


def check_time(target: Target, data: bytes, *, slack: float = 1.0) -> None:
    """At most 10 ms of CPU, and 10 ms per 64 KiB beyond that; the best of up to five tries."""
    limit_s = LIMIT_S * max(1.0, len(data) / UNIT_BYTES) * target.time_factor * slack
    took_s = min_time(target, data, limit_s)
    must(took_s <= limit_s, f"{target.name}: {took_s * 1e3:.1f} ms for {len(data)} bytes, limit {limit_s * 1e3:.1f}")


def min_time(target: Target, data: bytes, good_enough_s: float) -> float:
    best_s = float("inf")
    for _ in range(5):
        # CPU of this thread: what else the machine does does not count.
        began = time.thread_time()
        call(target, data)
        best_s = min(best_s, time.thread_time() - began)
        if best_s <= good_enough_s:
            break
    return best_s


def check_memory(target: Target, data: bytes) -> None:
    """At the peak at most the target's multiple of the input, and a fixed part for errors and their texts."""
    tracemalloc.start()
    try:
        call(target, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    limit = target.memory_factor * len(data) + target.fixed_bytes
    must(peak <= limit, f"{target.name}: {peak} bytes of memory for {len(data)} bytes, limit {limit}")


def call(target: Target, data: bytes) -> object:
    try:
        return target.subject(data)
    except GorouterError as exc:
        check_error(exc)
        return exc


def check_error(exc: GorouterError) -> None:
    """An error's text is one printable line of bounded length, its numbers are numbers, and it can be shown."""
    must(not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", exc.message), f"control characters in {exc.message!r}")
    must(len(exc.message) <= 2_000, f"a message of {len(exc.message)} characters")
    must(str(exc))
    must(repr(exc))
    if isinstance(exc, ApiError):
        must(exc.retry_after_s is None or 0 <= exc.retry_after_s < float("inf"), f"{exc.retry_after_s}")


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """The input whole, cut at places that depend on nothing but itself, and byte by byte unless it is long."""
    yield [data]
    if len(data) <= 64:
        yield [data[at : at + 1] for at in range(len(data))]
    rng = Random(len(data) + sum(data[:64]))
    for mean in (3, 40) if len(data) <= 1_024 else (200, 2_000):
        pieces, rest = [], data
        while rest:
            size = rng.randint(1, 2 * mean)
            pieces.append(rest[:size])
            rest = rest[size:]
        yield pieces


# --- server-sent events -----------------------------------------------------------------------------------------------


def parse_events(pieces: Sequence[bytes], *, max_event_bytes: int = 1 << 20) -> list[bytes]:
    parser = SseParser(max_event_bytes=max_event_bytes)
    events: list[bytes] = []
    for piece in pieces:
        events += parser.feed(piece)
    return events


def reference_events(data: bytes) -> list[bytes]:
    """The standard's algorithm, line by line, without regard for speed."""
    *lines, _unfinished = re.split(rb"\r\n|\r|\n", data.removeprefix(b"\xef\xbb\xbf"))
    events: list[bytes] = []
    buffer: list[bytes] = []
    for line in lines:
        if line == b"":
            if buffer:
                events.append(b"\n".join(buffer))
            buffer = []
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            buffer.append(value[1:] if value[:1] == b" " else value)
    return events


def sse_subject(data: bytes) -> object:
    return parse_events([data])


def sse_check(data: bytes) -> None:
    expected = reference_events(data)
    ways = list(cuts(data))
    for pieces in ways:
        must(parse_events(pieces) == expected, f"cut into {len(pieces)}")
    try:
        capped = parse_events(ways[-1], max_event_bytes=64)
    except DecodeError:
        return
    must(capped == expected, "other events under a limit that is kept")


SSE_SEEDS = (
    b'data: {"id":"a"}\n\ndata: [DONE]\n\n',
    b": OPENROUTER PROCESSING\n\ndata: {}\n\n",
    b"\xef\xbb\xbfdata: a\r\ndata:b\r\n\r\n",
    b"data\rdata: \r\r\ndata:  c\n\n",
    b"event: x\nid: 1\nretry: 5\ndata: y\n\nda",
    b"data: a\n\n\n\ndata: b\n\n: c\n",
)

# --- replies ----------------------------------------------------------------------------------------------------------


def completion_subject(data: bytes) -> object:
    return decode_completion(data)


def completion_check(data: bytes) -> None:
    try:
        reply = decode_completion(data)
    except GorouterError:
        return
    message = reply.choices[0].message if reply.choices else None
    if message is None:
        raise BrokenPromiseError("a reply without a message")
    encoded = encode_message(to_message(message))
    must(encode_message(decode_message(encoded)) == encoded, "a message that changes when it is stored")
    json.loads(encoded)


def error_subject(data: bytes) -> object:
    status, headers, body = split_error(data)
    return decode_error(status, headers, body=body, now_s=NOW_S)


def split_error(data: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """A status, a Retry-After and an X-RateLimit-Reset from the first lines, where there are such."""
    *head, body = data.split(b"\n", 3)
    values = [*head, b"", b"", b""][:3]
    status = 300 + sum(values[0]) % 300
    names = (b"Retry-After", b"x-ratelimit-reset")
    return status, [pair for pair in zip(names, values[1:], strict=True) if pair[1]], body


def error_check(data: bytes) -> None:
    status, headers, body = split_error(data)
    error = decode_error(status, headers, body=body, now_s=NOW_S)
    must(error.status == status)
    check_error(error)


REPLY = (
    b'{"id":"gen-1","model":"m","provider":"P","choices":[{"finish_reason":"stop","message":{"role":"assistant",'
    b'"content":"Hello","reasoning":null}}],"usage":{"prompt_tokens":1,"completion_tokens":2,"cost":0.000273}}'
)
COMPLETION_SEEDS = (
    REPLY,
    b"\n         \n\n         \n" + REPLY,
    b"   \n",
    b'{"error":{"message":"The operation was aborted","code":504}}',
    b'{"error":{"message":"x","code":"server_error","metadata":{"raw":"y","retry_after_seconds":1.5}}}',
    b'{"choices":[{"message":{"content":null,"tool_calls":[{"index":0,"id":"call_1","type":"function","function":'
    b'{"name":"f","arguments":"{\\"a\\":1}"}}]},"finish_reason":"tool_calls"}]}',
    b'{"choices":[{"message":{"content":[{"type":"text","text":"x"}],"reasoning_details":[{"type":"reasoning.text",'
    b'"text":"hm","index":0}],"annotations":[],"images":[{}],"audio":{}}}]}',
    b'{"choices":[{"error":{"code":502,"message":"bad"},"message":{"content":"half"},"finish_reason":"error"}]}',
    b'{"choices":null}',
)
ERROR_SEEDS = (
    b"a\n1.5\n1795300001000\n" + COMPLETION_SEEDS[3],
    b"b\nWed, 21 Oct 2015 07:28:00 GMT\n\n" + COMPLETION_SEEDS[4],
    b"c\n\n\n<html><title>502: Bad gateway</title></html>",
    b'd\n\n\n{"error":"text"}',
    b'\n\n\n{"error":{"code":429,"message":"m","metadata":{"headers":{"Retry-After":"3"},"reasons":[]}}}',
)

# --- streams ----------------------------------------------------------------------------------------------------------


def merge(events: Sequence[bytes]) -> tuple[ChunkMerge, DecodeError | None]:
    merged = ChunkMerge()
    chunks, error = decode_chunks(list(events))
    merged.add(chunks)
    return merged, error


def split_stream(data: bytes) -> list[bytes]:
    """The events of a stream as the reader hands them on: up to the end mark."""
    events = parse_events([data])
    return events[: events.index(b"[DONE]")] if b"[DONE]" in events else events


def stream_subject(data: bytes) -> object:
    merged, error = merge(split_stream(data))
    if error is not None:
        raise error
    return merged.message()


def stream_check(data: bytes) -> None:
    events = split_stream(data)
    merged, error = merge(events)
    encoded = encode_message(merged.message())
    must(encode_message(decode_message(encoded)) == encoded, "a message that changes when it is stored")
    json.loads(encoded)
    # However the socket cut the stream, the answer is the same.
    single = ChunkMerge()
    for event in events:
        chunks, one_error = decode_chunks([event])
        single.add(chunks)
        if one_error is not None:
            must(error is not None, "an event is refused alone and taken with others")
            break
    else:
        must(error is None, "an event is taken alone and refused with others")
    must(encode_message(single.message()) == encoded)
    must((single.finish_reason, single.generation_id) == (merged.finish_reason, merged.generation_id))


STREAM_SEEDS = (
    b'data: {"id":"g","choices":[{"delta":{"content":"He","role":"assistant"},"finish_reason":null}]}\n\n'
    b'data: {"id":"g","choices":[{"delta":{"content":"llo"},"finish_reason":"stop"}],"usage":{"cost":0.1}}\n\n'
    b"data: [DONE]\n\n",
    b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"a","type":"function","function":{"name":"f",'
    b'"arguments":""}}]}}]}\n\ndata: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{}"}},'
    b'{"index":1,"id":"b","function":{"name":"g","arguments":"{\\"x\\":"}}]}}]}\n\n',
    b'data: {"choices":[{"delta":{"reasoning":"hm","reasoning_details":[{"type":"reasoning.text","text":"hm",'
    b'"index":0},{"type":"reasoning.encrypted","data":"xx","index":1}]}}]}\n\n',
    b'data: {"choices":[{"delta":{"refusal":"no","annotations":[{}],"images":[{}],"audio":{"data":"a","id":1}}}]}\n\n',
    b'data: {"error":{"code":502,"message":"x"},"choices":[{"delta":{"content":""},"finish_reason":"error"}]}\n\n',
    b'data: {"choices":[{"delta":{"content":[{"type":"text"}]}}]}\n\ndata: {"choices":[]}\n\ndata: \n\n',
)

# --- batch input ------------------------------------------------------------------------------------------------------


def read_rows(data: bytes) -> Iterator[BatchRow | RowProblem]:
    reader = RowReader()
    for line in data.split(b"\n"):
        row = reader.read(line)
        if row is not None:
            yield row


def batch_subject(data: bytes) -> object:
    """Rows are gone before the next one is read, as in a batch."""
    return sum(isinstance(row, BatchRow) for row in read_rows(data))


def batch_check(data: bytes) -> None:
    ids = []
    for row in read_rows(data):
        if isinstance(row, RowProblem):
            must(row.reason.isprintable(), f"a reason of more than one line: {row.reason!r}")
            must(len(row.message) < 1_000)
            continue
        ids.append(row.custom_id)
        try:
            body, _settings = encode_request(row.body)
        except BadRequestError as exc:
            check_error(exc)
            continue
        sent = json.loads(body)
        must(isinstance(sent, dict) and isinstance(sent["messages"], list) and sent["messages"], "no request")
    must(len(set(ids)) == len(ids), "an id twice")


BATCH_SEEDS = (
    b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"messages":[{"role":"user","content":"x"}]}}\n',
    b'\xef\xbb\xbf{"id":7,"question":"What?","answer":"That."}\r\n\n{"prompt":"x","temperature":0,"model":null}\n',
    b'{"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}],"id":"row-2"}\n{"prompt":"y"}\n',
    b'{"prompt":" "}\n[1]\n"x"\n{"id":{},"prompt":"x"}\n{"body":{}}\nNaN\n{"a":NaN}\n',
)

# --- Retry-After ------------------------------------------------------------------------------------------------------


def retry_after_subject(data: bytes) -> object:
    return parse_retry_after(data.decode("latin-1"), now_s=NOW_S)


def retry_after_check(data: bytes) -> None:
    wait_s = parse_retry_after(data.decode("latin-1"), now_s=NOW_S)
    must(wait_s is None or 0 <= wait_s < float("inf"), f"{wait_s}")
    if re.fullmatch(rb"[0-9]{1,15}", data):
        must(wait_s == int(data))


RETRY_AFTER_SEEDS = (
    b"0",
    b"120",
    b" 1.5 ",
    b"-10",
    b"+3.",
    b"1e9",
    b"nan",
    b"Wed, 21 Oct 2015 07:28:00 GMT",
    b"Sunday, 06-Nov-94 08:49:37 GMT",
    b"Sun Nov  6 08:49:37 1994",
    b"Sun, 06 Nov 9999999 08:49:37 -9999",
)

# --- arguments of tools -----------------------------------------------------------------------------------------------


def arguments_subject(data: bytes) -> object:
    try:
        value = parse_arguments(data.decode("utf-8", "surrogateescape"), max_bytes=UNIT_BYTES)
    except ArgumentsError as exc:
        return exc
    return canonical_json(value)


def arguments_check(data: bytes) -> None:
    found = arguments_subject(data)
    if isinstance(found, ArgumentsError):
        must(len(str(found)) <= 300, "a long message")
        must(str(found).isprintable(), f"control characters in {str(found)!r}")
        return
    must(isinstance(found, bytes))
    # Whoever reads it again, with whatever parser, reads the same.
    value = decode_json(cast("bytes", found))
    must(isinstance(value, dict))
    must(value == parse_arguments(cast("bytes", found).decode(), max_bytes=8 * UNIT_BYTES))
    if data.strip(b" \t\r\n") not in {b"", b"null"}:
        must(json.loads(data) == value)


ARGUMENTS_SEEDS = (
    b"",
    b"\x1c",
    b"null",
    b'{"city":"Paris","days":3,"more":[1,-2.5e3,true,null,{"a":"\\u00e9\\ud83d\\ude00"}]}',
    b'{"a":1,"a":2}',
    b'{"a":NaN}',
    b'{"a":1e400,"b":18446744073709551616}',
    b'{"a":"\\ud800"}',
    b'{"a":' * 70,
)
ARGUMENTS_WORDS = (b'"', b"\\", b"\\u", b"\\ud800", b"Infinity", b"NaN", b"[", b"{", b"}", b"]", b":", b",", b"1e309")

# --- HTTP replies -----------------------------------------------------------------------------------------------------

HTTP_LIMITS = ConnectionLimits(max_header_bytes=2_048, max_body_bytes=8_192)
HEAD = RequestHead(Origin("http", "h", 80), method="GET", target="/", headers=[])


class ScriptedStream(trio.abc.Stream):
    """Gives out pieces, and never waits."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self._at = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        pass

    async def wait_send_all_might_not_block(self) -> None:
        pass

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._at == len(self._pieces):
            return b""
        piece = self._pieces[self._at]
        if max_bytes is not None and len(piece) > max_bytes:
            self._pieces[self._at] = piece[max_bytes:]
            return piece[:max_bytes]
        self._at += 1
        return piece

    def close(self) -> None:
        self._at = len(self._pieces)

    async def aclose(self) -> None:
        self.close()


Reply: TypeAlias = tuple[int, list[tuple[bytes, bytes]], bytes]


async def fetch(pieces: Sequence[bytes]) -> Reply:
    connection = HttpConnection(ScriptedStream(pieces), HTTP_LIMITS)
    await connection.start(HEAD, b"")
    body = await connection.receive_all()
    return connection.status, connection.headers, body


def run_unwaiting(function: Callable[[T], Coroutine[object, object, R]], argument: T) -> R:
    """`trio.run` for what never waits; inside trio, where a fuzzer may run for speed, by hand."""
    if not trio.lowlevel.in_trio_run():
        return trio.run(function, argument)
    coroutine = function(argument)
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # the type of the end does not tell
    coroutine.close()
    raise BrokenPromiseError("the connection waits for something else than its stream")


def http_subject(data: bytes) -> object:
    return run_unwaiting(fetch, chop(data))


def chop(data: bytes) -> list[bytes]:
    """As a socket would give it out."""
    return [data[at : at + UNIT_BYTES] for at in range(0, len(data), UNIT_BYTES)]


async def http_outcomes(data: bytes) -> list[Reply | type[GorouterError]]:
    """What each way of cutting the bytes leads to."""
    outcomes: list[Reply | type[GorouterError]] = []
    for pieces in cuts(data):
        try:
            outcomes.append(await fetch(pieces))
        except (StreamBrokenError, DecodeError) as exc:
            outcomes.append(type(exc))
    return outcomes


def http_check(data: bytes) -> None:
    outcomes = run_unwaiting(http_outcomes, data)
    for outcome in outcomes:
        if isinstance(outcome, tuple):
            status, _headers, body = outcome
            must(status >= 200 or status == 101, f"status {status}")
            must(len(body) <= HTTP_LIMITS.max_body_bytes, f"a body of {len(body)} bytes")
    # A limit strikes after a read, so which error comes first may depend on the cuts; a reply may not.
    if len(data) <= HTTP_LIMITS.max_header_bytes:
        must(all(outcome == outcomes[0] for outcome in outcomes), f"depends on the cuts: {outcomes}")


HTTP_SEEDS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end",
    b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.0 502 Bad Gateway\r\nContent-Type: text/html\r\n\r\n<html>",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxHTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n0\r\nTrailer: z\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
)

# --- all of them ------------------------------------------------------------------------------------------------------


def field_names(*kinds: type[Struct]) -> tuple[bytes, ...]:
    names = {f'"{field}":' for kind in kinds for field in kind.__struct_fields__}
    return tuple(sorted(name.encode() for name in names))


REPLY_WORDS = field_names(
    ChatCompletion, Choice, ReplyMessage, ReplyToolCall, ReplyFunction, Usage, ErrorBody, ChatChunk, ChunkChoice, Delta
)
SSE_WORDS = (b"data:", b"\r\n", b"\n\n", b"\xef\xbb\xbf")
ERROR_WORDS = (b'"error":{', b'"metadata":{', b'"retry_after_seconds":', b'"error_type":', b'"headers":{"Retry-After":')
BATCH_WORDS = (
    *field_names(ChatRequest),
    b'"id":',
    b'"prompt":',
    b'"question":',
    b'"body":{',
    b'"method":"POST"',
    b'"url":',
)
HTTP_WORDS = (
    b"HTTP/1.1 ",
    b"\r\n",
    b"Content-Length: ",
    b"Transfer-Encoding: chunked",
    b"Connection: close",
    b"0\r\n\r\n",
)
DATE_WORDS = (b"GMT", b"Sun", b"Nov", b"-0000", b"+9999")

# --- compressed bodies ------------------------------------------------------------------------------------------------

CODINGS = ("gzip", "deflate", "br", "zstd")
# No ratio: when that strikes depends on how much has arrived.
BODY_LIMITS = ConnectionLimits(max_body_bytes=65_536, max_compression_ratio=10**9)


def decompress(coding: str, pieces: Iterable[bytes]) -> bytes:
    decoder = make_decoder(coding, BODY_LIMITS)
    if decoder is None:
        raise BrokenPromiseError(f"no decoder for {coding}")
    decoded = bytearray()
    for piece in pieces:
        decoded += decoder.decode(piece)
        while not decoder.needs_input:
            decoded += decoder.decode()
    decoder.finish()
    return bytes(decoded)


def compressed_subject(data: bytes) -> object:
    """The first byte says which coding the others are in."""
    return decompress(CODINGS[data[0] % len(CODINGS)], chop(data[1:])) if data else b""


def compressed_check(data: bytes) -> None:
    if not data:
        return
    outcomes: list[bytes | type[GorouterError]] = []
    for pieces in cuts(data[1:]):
        try:
            outcomes.append(decompress(CODINGS[data[0] % len(CODINGS)], pieces))
        except DecodeError as exc:
            outcomes.append(type(exc))
    # libzstd notices a wrong length of an empty frame only when all of it comes at once.
    bodies = {outcome for outcome in outcomes if isinstance(outcome, bytes)}
    is_zstd = CODINGS[data[0] % len(CODINGS)] == "zstd"
    must(len(bodies) <= 1 if is_zstd else len(set(outcomes)) == 1, "depends on the cuts")
    must(all(len(body) <= BODY_LIMITS.max_body_bytes for body in bodies), "over the limit")


COMPRESSED_SEEDS = (
    b"\x00" + gzip.compress(b"one event and another"),
    b"\x00" + gzip.compress(b"") + gzip.compress(bytes(100_000)),
    b"\x01" + zlib.compress(b"one event and another"),
    b"\x01" + zlib.compress(b"one event and another")[2:-4],
    bytes.fromhex("020b058068656c6c6f20746964657303"),
    bytes.fromhex("0328b52ffd200d690000687920746964657379206e6f77"),
)

# --- what proxies answer ----------------------------------------------------------------------------------------------

PROXIES = (
    Proxy(scheme="http", host="p", port=1),
    Proxy(scheme="socks5", host="p", port=1),
    Proxy(scheme="socks5", host="p", port=1, user=Secret("u"), password=Secret("p")),
)
TARGET = Origin("https", "h", 443)


async def tunnel(data: bytes) -> None:
    """The first byte says which proxy answers with the others."""
    if data:
        await open_tunnel(ScriptedStream(chop(data[1:])), PROXIES[data[0] % len(PROXIES)], origin=TARGET)


def tunnel_subject(data: bytes) -> object:
    return run_unwaiting(tunnel, data)


async def tunnel_outcomes(data: bytes) -> list[str]:
    outcomes = []
    for pieces in cuts(data[1:]):
        try:
            await open_tunnel(ScriptedStream(pieces), PROXIES[data[0] % len(PROXIES)], origin=TARGET)
        except ConnectError as exc:
            outcomes.append("poisoned" if "before anything was asked" in exc.message else exc.message)
        else:
            outcomes.append("open")
    return outcomes


def tunnel_check(data: bytes) -> None:
    """A tunnel stands or not whatever the cuts are; what came with its answer shows when it came with it."""
    if data:
        outcomes = set(run_unwaiting(tunnel_outcomes, data))
        must(len(outcomes) == 1 or outcomes <= {"open", "poisoned"}, f"depends on the cuts: {outcomes}")


TUNNEL_SEEDS = (
    b"\x00HTTP/1.1 200 Connection established\r\nA: b\r\n\r\n",
    b"\x00HTTP/1.1 100 C\r\n\r\nHTTP/1.0 407 Proxy Authentication Required\r\n\r\nwho?",
    b"\x01\x05\x00\x05\x00\x00\x03\x04name\x00\x50",
    b"\x02\x05\x02\x01\x00\x05\x00\x00\x01\x01\x02\x03\x04\x00\x50",
    b"\x01\x05\x00\x05\x05\x00\x01",
)


TARGETS = {
    target.name: target
    for target in (
        Target("sse", sse_subject, sse_check, SSE_SEEDS, SSE_WORDS, memory_factor=20),
        Target("completion", completion_subject, completion_check, COMPLETION_SEEDS, REPLY_WORDS, memory_factor=40),
        Target("error", error_subject, error_check, ERROR_SEEDS, ERROR_WORDS + DATE_WORDS, memory_factor=40),
        Target(
            "stream",
            stream_subject,
            stream_check,
            STREAM_SEEDS,
            (*REPLY_WORDS, b"data: "),
            memory_factor=60,
            time_factor=3.0,
        ),
        Target("batch", batch_subject, batch_check, BATCH_SEEDS, BATCH_WORDS, memory_factor=40, time_factor=20.0),
        Target("retry_after", retry_after_subject, retry_after_check, RETRY_AFTER_SEEDS, DATE_WORDS),
        Target("arguments", arguments_subject, arguments_check, ARGUMENTS_SEEDS, ARGUMENTS_WORDS, memory_factor=60),
        Target("http", http_subject, http_check, HTTP_SEEDS, HTTP_WORDS, memory_factor=50),
        Target(
            "compressed",
            compressed_subject,
            compressed_check,
            COMPRESSED_SEEDS,
            (b"\x1f\x8b", b"\x28\xb5\x2f\xfd"),
            time_factor=2.0,
            fixed_bytes=2_000_000,
        ),
        Target("tunnel", tunnel_subject, tunnel_check, TUNNEL_SEEDS, (b"HTTP/1.1 ", b"\r\n\r\n")),
    )
}


def main(paths: Sequence[str]) -> None:
    for name in paths:
        path = Path(name)
        target = TARGETS[path.name.partition("-")[0]]
        run(target, path.read_bytes())
        sys.stdout.write(f"{name}: passes\n")


if __name__ == "__main__":
    main(sys.argv[1:])
