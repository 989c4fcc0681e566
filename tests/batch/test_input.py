"""Reading the rows of files, pipes and descriptors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.batch.input import RowSource, open_rows
from gorouter_trio.batch.lines import LineSplitter
from gorouter_trio.batch.rows import BatchRow, RowProblem


async def read_rows(path: str | int, max_line_bytes: int = 2**20) -> list[BatchRow | RowProblem]:
    async with open_rows(path, max_line_bytes=max_line_bytes) as source:
        return [row async for row in source]


def write(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    return str(path)


async def test_file(tmp_path: Path) -> None:
    """Every line of a file comes, the last one without a line end too."""
    rows = await read_rows(write(tmp_path, b'{"prompt":"a"}\r\n\n{"prompt":"b"}\nx\n{"prompt":"c"}'))
    assert [(row.line_number, row.custom_id) for row in rows] == [(1, "row-1"), (3, "row-3"), (4, None), (5, "row-5")]


async def test_large_file(tmp_path: Path) -> None:
    """Lines are whole wherever the reads cut them."""
    texts = [f"{n} " + "é" * (n % 977) for n in range(3_000)]
    rows = await read_rows(write(tmp_path, "".join(f'{{"prompt":"{text}"}}\n' for text in texts).encode()))
    messages: list[Any] = [row.body["messages"] for row in rows if isinstance(row, BatchRow)]
    assert [content["content"] for (content,) in messages] == texts


async def test_too_long_lines(tmp_path: Path) -> None:
    """A line above the limit is a problem and the ones around it are rows."""
    long = b'{"prompt":"%b"}\n' % (b"x" * 2_000_000)
    data = b'{"prompt":"a"}\n' + long + b'{"prompt":"b"}\n' + long[:-1]
    rows = await read_rows(write(tmp_path, data), max_line_bytes=1000)
    assert [row.custom_id for row in rows] == ["row-1", None, "row-3", None]
    assert rows[1] == RowProblem(2, None, "longer than 1000 bytes", is_json=False)


async def test_empty_file(tmp_path: Path) -> None:
    """No rows, and no error."""
    assert await read_rows(write(tmp_path, b"")) == []
    assert await read_rows(write(tmp_path, b"\xef\xbb\xbf\n")) == []


async def test_missing_file_and_directory(tmp_path: Path) -> None:
    """Opening says what is wrong."""
    with pytest.raises(FileNotFoundError):
        await read_rows(str(tmp_path / "nothing"))
    with pytest.raises(IsADirectoryError):
        await read_rows(str(tmp_path))


async def test_peek(tmp_path: Path) -> None:
    """Looking ahead takes nothing."""
    async with open_rows(write(tmp_path, b'{"prompt":"a"}\n{"prompt":"b"}\n')) as source:
        ahead = [await source.peek(1), await source.peek(0), await source.peek(2)]
        assert [row and row.custom_id for row in ahead] == ["row-2", "row-1", None]
        assert [row.custom_id async for row in source] == ["row-1", "row-2"]
        assert await source.peek() is None


async def test_pipe_gives_rows_as_they_come() -> None:
    """A row is there as soon as its line has ended, and the descriptor stays open."""
    read_end, write_end = os.pipe()
    try:
        async with open_rows(read_end) as source:
            os.write(write_end, b'{"prompt":"a"}\n{"prom')
            assert (await source.__anext__()).custom_id == "row-1"
            os.write(write_end, b'pt":"b"}\n')
            assert (await source.__anext__()).custom_id == "row-2"
        os.fstat(read_end)
    finally:
        os.close(read_end)
        os.close(write_end)


async def test_waiting_for_a_pipe_can_be_cancelled() -> None:
    """A writer who never writes holds up nobody."""
    read_end, write_end = os.pipe()
    try:
        async with open_rows(read_end) as source:
            with trio.move_on_after(0.02) as scope:
                await source.__anext__()
            assert scope.cancelled_caught
    finally:
        os.close(write_end)  # ends the read in the thread that was left behind
        os.close(read_end)


async def test_repr(tmp_path: Path) -> None:
    """It tells how far it is."""
    async with open_rows(write(tmp_path, b'{"prompt":"a"}\n')) as source:
        await source.peek()
        assert repr(source) == "<RowSource at line 1>"
        assert isinstance(source, RowSource)


@given(data=st.binary(max_size=60).map(lambda b: b.replace(b"\x00", b"\n")), cuts=st.lists(st.integers(1, 8)))
def test_splitting_does_not_depend_on_the_pieces(data: bytes, cuts: list[int]) -> None:
    """However the bytes arrive, the lines are those of the whole."""
    splitter = LineSplitter(max_line_bytes=10)
    lines: list[bytes | None] = []
    rest = data
    for cut in [*cuts, len(data)]:
        lines += splitter.feed(rest[:cut])
        rest = rest[cut:]
    lines += splitter.finish()
    whole = data.split(b"\n")
    if not whole[-1]:
        whole.pop()
    assert lines == [line if len(line) <= 10 else None for line in whole]
