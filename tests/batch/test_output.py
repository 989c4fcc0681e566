"""The output's rows, byte for byte, and how they get into files."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from gorouter_trio.batch.output import encode_row, error_code, open_output
from gorouter_trio.batch.runner import BatchResult
from gorouter_trio.errors import (
    AuthenticationError,
    BadRequestError,
    ConnectError,
    DeadlineExceededError,
    DecodeError,
    GorouterError,
    PoolClosedError,
    ProviderError,
    RateLimitError,
    StreamBrokenError,
)
from gorouter_trio.wire.messages import AssistantMessage
from gorouter_trio.wire.result import CallRecord, ChatResult

GOLDEN = Path(__file__).parent / "golden" / "rows.jsonl"
REPLY = b'{"id":"gen-1","choices":[{"message":{"content":"na\\u00efve \xf0\x9f\x90\x8e"}}],"usage":{"cost":0.00001}}'


def answered(body: bytes, **fields: Any) -> BatchResult:
    result = ChatResult(message=AssistantMessage(content="x"), call=CallRecord(generation_id="gen-1"))
    return BatchResult(**{"custom_id": "a", "index": 0, "result": result, "body": body, **fields})


def failed(error: GorouterError, *, attempts: int = 1, billed: bool = False, **fields: Any) -> BatchResult:
    error.attempts = attempts
    error.maybe_billed = billed
    return BatchResult(**{"custom_id": "a", "index": 3, "error": error, **fields})


def results() -> list[BatchResult]:
    """One of each kind."""
    limited = RateLimitError(
        "Provider returned error",
        status=429,
        metadata={"raw": "busy", "provider_name": "P"},
        retry_after_s=7.0,
        generation_id="gen-2",
    )
    broken = StreamBrokenError("the connection was closed in the middle of the reply")
    broken.generation_id = "gen-3"
    return [
        answered(REPLY),
        answered(b'{\n  "id": "gen-1",\r\n  "choices": []\n}', index=1, line_number=2, custom_id="ü 🐎 \u2028"),
        failed(BadRequestError("line 3: no messages, prompt or question", status=400), attempts=0, line_number=3),
        failed(BadRequestError("line 4: not JSON", status=400), attempts=0, line_number=4, custom_id=None),
        failed(limited, attempts=4),
        failed(BadRequestError("x is not a valid model ID", status=400)),
        failed(ProviderError("cut", status=200, code="server_error", generation_id="gen-4"), billed=True),
        failed(broken, billed=True),
        failed(ConnectError("cannot connect: refused"), attempts=4),
        failed(DeadlineExceededError("the request's deadline passed (headers)", phase="headers"), billed=True),
    ]


def test_golden_rows() -> None:
    """Every kind of row, as it stands in the golden file."""
    assert b"".join(map(encode_row, results())) == GOLDEN.read_bytes()


def test_rows_have_one_shape() -> None:
    """The same keys with the same types in each row, so that tools which want a schema find one."""
    rows = [json.loads(encode_row(result)) for result in results()]
    assert {tuple(row) for row in rows} == {("id", "custom_id", "response", "error", "maybe_billed", "cached")}
    assert len({tuple(row["response"]) for row in rows if row["response"]}) == 1
    assert len({tuple(row["error"]) for row in rows if row["error"]}) == 1
    assert {type(row["error"]["code"]) for row in rows if row["error"]} == {str}


def test_status_200_means_an_answer() -> None:
    """Only a row with an answer has a response with status 200, even where an error came in a 200."""
    for result in results():
        response = json.loads(encode_row(result))["response"]
        has_answer = response is not None and response["status_code"] == 200
        assert has_answer == (result.result is not None)


def test_reply_stands_as_it_came() -> None:
    """Not a byte of the reply is changed, unless it would end the line."""
    assert b'"body":' + REPLY + b"}" in encode_row(answered(REPLY))
    row = encode_row(answered(b'{"a":\n 1,\r\n"b": "\\n"}'))
    assert row.count(b"\n") == 1
    assert b"\r" not in row
    assert json.loads(row)["response"]["body"] == {"a": 1, "b": "\n"}


def test_reply_that_is_no_utf8() -> None:
    """A field that nobody decoded cannot make the output unreadable."""
    row = encode_row(answered(b'{"choices":[],"odd":"\xff"}'))
    assert json.loads(row.decode())["response"]["body"]["odd"] == "\ufffd"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AuthenticationError("no", status=401), "401"),
        (ProviderError("no", status=502, code="server"), "server"),
        (StreamBrokenError("no"), "stream_broken"),
        (DecodeError("no"), "decode"),
        (PoolClosedError("no"), "pool_closed"),
        (BadRequestError("no", status=400), "invalid_request"),
    ],
)
def test_error_codes(error: GorouterError, code: str) -> None:
    """A word for each kind of error."""
    assert error_code(error) == code


async def test_new_file(tmp_path: Path) -> None:
    """Lines are in the file as soon as they were written, not when it is closed."""
    path = tmp_path / "out.jsonl"
    async with open_output(str(path)) as output:
        await output.write(b"one\n")
        assert path.read_bytes() == b"one\n"
        await output.write(b"two\n")
        await output.sync()
    assert path.read_bytes() == b"one\ntwo\n"


async def test_existing_file(tmp_path: Path) -> None:
    """It is left alone, unless it may be replaced or there is nothing in it."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"precious and long\n")
    with pytest.raises(FileExistsError):
        async with open_output(str(path)):
            pass
    assert path.read_bytes() == b"precious and long\n"
    async with open_output(str(path), mode="overwrite") as output:
        await output.write(b"new\n")
    assert path.read_bytes() == b"new\n"
    path.write_bytes(b"")
    async with open_output(str(path)) as output:
        await output.write(b"newer\n")
    assert path.read_bytes() == b"newer\n"


async def test_unwritable(tmp_path: Path) -> None:
    """A directory that is not there, or a directory where a file should be."""
    with pytest.raises(FileNotFoundError):
        async with open_output(str(tmp_path / "no" / "out")):
            pass
    with pytest.raises(IsADirectoryError):
        async with open_output(str(tmp_path)):
            pass


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
async def test_device() -> None:
    """A device is written to as it is, and its errors arrive."""
    async with open_output("/dev/full") as output:
        with pytest.raises(OSError, match="No space left"):
            await output.write(b"row\n")


async def test_full_file_is_cut_to_whole_lines(tmp_path: Path) -> None:
    """When a row does not fit any more, nothing of it stays."""
    path = tmp_path / "out.jsonl"
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        async with open_output(str(path)) as output:
            await output.write(b"x" * 60 + b"\n")
            with pytest.raises(OSError, match="too large"):
                await output.write(b"y" * 60 + b"\n")
            await output.write(b"z" * 30 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == b"x" * 60 + b"\n" + b"z" * 30 + b"\n"


async def test_pipe_without_reader() -> None:
    """The error arrives, and the descriptor stays its owner's."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    async with open_output(write_end) as output:
        with pytest.raises(BrokenPipeError):
            await output.write(b"row\n")
        await output.sync()
    os.close(write_end)
