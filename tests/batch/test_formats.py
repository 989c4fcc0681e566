"""Rows from CSV, Parquet and compressed files, and what a template makes of them."""

from __future__ import annotations

import csv
import gzip
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.batch.ids import IdTable
from gorouter_trio.batch.input import RowSource, find_format, open_rows
from gorouter_trio.batch.lines import CsvError, RecordSplitter, _split, parse_record
from gorouter_trio.batch.parquet import ParquetRows
from gorouter_trio.batch.rows import BatchRow, RowProblem
from gorouter_trio.batch.template import MissingColumn, Template
from gorouter_trio.errors import ConfigError, DecodeError, StoreError


async def read(path: Path, **options: Any) -> list[BatchRow | RowProblem]:
    async with open_rows(str(path), **options) as source:
        return [row async for row in source]


def prompts(rows: list[BatchRow | RowProblem]) -> list[Any]:
    return [
        row.body["messages"][0]["content"] if isinstance(row, BatchRow) else row.reason  # type: ignore[index]  # a list
        for row in rows
    ]


def written(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


# --- CSV --------------------------------------------------------------------------------------------------------------


async def test_csv(tmp_path: Path) -> None:
    """Quotes, line ends in quotes, a byte order mark, Windows line ends, ids, fields of a request."""
    header = b"\xef\xbb\xbfid,prompt,temperature,model,answer\r\n"
    data = header + b'"a","say ""hi"",\r\nplease",0.5,x/y,no\r\n\r\n7,plain,,,\r\n'
    first, second = await read(written(tmp_path, "in.csv", data))
    assert isinstance(first, BatchRow)
    assert isinstance(second, BatchRow)
    assert first.custom_id == "a"
    assert first.body == {
        "messages": [{"role": "user", "content": 'say "hi",\r\nplease'}],
        "temperature": 0.5,
        "model": "x/y",
    }
    assert (second.custom_id, second.line_number) == ("7", 2)
    assert second.body == {"messages": [{"role": "user", "content": "plain"}]}


async def test_texts_of_csv(tmp_path: Path) -> None:
    """In messages they stand as written, whatever their columns are called; fields that are texts stay such."""
    data = b"id,temperature,seed,max_tokens\n1,20.50,12345678901234567890123,5\n2,1e3,007,6\n"
    path = written(tmp_path, "in.csv", data)
    assert prompts(await read(path, template=Template("{{seed}} says {{temperature}}"))) == [
        "12345678901234567890123 says 20.50",
        "007 says 1e3",
    ]
    form = '{"messages": [{"role": "user", "content": "{{seed}}"}], "max_tokens": "{{max_tokens}}", "stop": "{{id}}"}'
    assert prompts(await read(path, template=Template(form))) == ["12345678901234567890123", "007"]
    (first, _) = await read(path, template=Template(form))
    assert isinstance(first, BatchRow)
    assert (first.body["max_tokens"], first.body["stop"]) == (5, "1")
    data = b'prompt,stop,prompt_cache_key,route\na,5,12345,1\nb,"[""x"",""y""]",,\n'
    five, several = await read(written(tmp_path, "stop.csv", data))
    assert isinstance(five, BatchRow)
    assert isinstance(several, BatchRow)
    assert (five.body["stop"], five.body["prompt_cache_key"], five.body["route"]) == ("5", "12345", "1")
    assert several.body["stop"] == ["x", "y"]


async def test_long_cells(tmp_path: Path) -> None:
    """A cell may be as long as a line may, with and without quotes; what is broken is told as for short ones."""
    limit = csv.field_size_limit()
    long = "x" * 140_000
    data = f'id,prompt\n1,{long}\n2,"{long},""\n"\n3,"{long}"x\n4,{long},\n5,ok\n'.encode()
    rows = prompts(await read(written(tmp_path, "in.csv", data)))
    assert rows == [
        long,
        f'{long},"\n',
        "not CSV: ',' expected after '\"'",
        "has 3 fields, and the header names 2",
        "ok",
    ]
    assert csv.field_size_limit() == limit


@given(text=st.text(st.sampled_from('a,"'), max_size=12))
def test_long_records_as_short_ones(text: str) -> None:
    """Both ways of parsing find the same fields, or that there are none."""
    assert _fields(text) == _fields(text, is_long=True)


def _fields(text: str, *, is_long: bool = False) -> list[str] | None:
    try:
        return list(_split(text.removesuffix("\r"), ",")) if is_long else parse_record(text, delimiter=",") or [""]
    except CsvError:
        return None


async def test_other_delimiters(tmp_path: Path) -> None:
    """Semicolons are told by the header, tabs by the name."""
    assert prompts(await read(written(tmp_path, "a.csv", b"prompt;id\nx,y;1\n"))) == ["x,y"]
    assert prompts(await read(written(tmp_path, "a.tsv", b"prompt\tid\nx,y\t1\n"))) == ["x,y"]
    assert prompts(await read(written(tmp_path, "a.txt", b"prompt,id\nx,1\n"), input_format="csv")) == ["x"]


async def test_broken_records(tmp_path: Path) -> None:
    """Each is a problem that says why; the rows around it are read."""
    data = b'prompt,id\nfine,1\ntoo,many,fields\nfew\n\xff\xfe,4\n,5\n"open,6\n'
    rows = prompts(await read(written(tmp_path, "in.csv", data)))
    assert rows == [
        "fine",
        "has 3 fields, and the header names 2",
        "has 1 fields, and the header names 2",
        "not UTF-8: byte 0xff at column 1",
        "no messages, prompt or question",
        "not CSV: a quote is not closed",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,a\n1,2\n", "two columns 'a'"),
        (b"a,,b\n1,2,3\n", "a column without a name"),
        (b"\xff\xfea\x00", "UTF-16"),
        (b"a\xff,b\n", "not UTF-8"),
    ],
)
async def test_broken_header(data: bytes, message: str, tmp_path: Path) -> None:
    """A header that cannot be makes the file none."""
    with pytest.raises(ConfigError, match=message):
        await read(written(tmp_path, "in.csv", data))


@given(
    records=st.lists(st.lists(st.text(st.sampled_from('a,"\n\r '), max_size=6), min_size=2, max_size=2), max_size=5),
    cuts=st.integers(1, 7),
)
def test_splitting_records(records: list[list[str]], cuts: int) -> None:
    """What was quoted comes back, wherever the pieces were cut."""
    quoted = [",".join('"' + field.replace('"', '""') + '"' for field in record) for record in records]
    data = "".join(f"{line}\n" for line in quoted).encode()
    splitter = RecordSplitter(1_000)
    found = [text for at in range(0, len(data), cuts) for text in splitter.feed(data[at : at + cuts])]
    found += splitter.finish()
    assert [parse_record((text or b"").decode(), delimiter=",") for text in found] == records


def test_too_long_records() -> None:
    """A record above the limit is none, and the ones behind it are whole."""
    splitter = RecordSplitter(12)
    assert list(splitter.feed(b"a,1\n" + b"x" * 20 + b",2\nfine,3\n")) == [b"a,1", None, b"fine,3"]
    with pytest.raises(CsvError):
        parse_record('"a"b,c', delimiter=",")


# --- compressed -------------------------------------------------------------------------------------------------------


async def test_gzip(tmp_path: Path) -> None:
    """Told by its first bytes, of several members; a cut file is told, after the rows before the cut."""
    text = b"".join(b'{"prompt":"%d"}\n' % n for n in range(20_000))
    packed = gzip.compress(text[:200_000]) + gzip.compress(text[200_000:])
    assert len(prompts(await read(written(tmp_path, "in.jsonl.gz", packed)))) == 20_000
    path = written(tmp_path, "cut.gz", packed[:-100])
    seen = 0
    with pytest.raises(DecodeError, match="ends in the middle"):
        async with open_rows(str(path)) as source:
            async for _row in source:
                seen += 1
    assert seen > 10_000


async def test_zstd(tmp_path: Path) -> None:
    """As gzip."""
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    packed = zstd.compress(b"prompt\na\nb\n")
    assert prompts(await read(written(tmp_path, "in.csv.zst", packed))) == ["a", "b"]
    with pytest.raises(DecodeError, match=r"broken|middle"):
        await read(written(tmp_path, "bad.zst", packed[:6] + b"\x00" * 40))


async def test_fraction(tmp_path: Path) -> None:
    """How much of the file was read is known by what was given out."""
    async with open_rows(str(written(tmp_path, "in", b'{"prompt":"x"}\n' * 100))) as source:
        assert source.fraction == 0
        for _ in range(25):
            await anext(source)
        assert source.fraction == pytest.approx(0.25)
        assert len([row async for row in source]) == 75
        assert source.fraction == 1


def test_formats() -> None:
    """The name tells, behind what it was packed with."""
    names = {"a.csv.gz": "csv", "b.PARQUET": "parquet", "c": "jsonl", "d.tsv": "tsv", "e.json.zst": "jsonl"}
    assert {name: find_format(name) for name in names} == names
    assert find_format(0) == "jsonl"
    assert find_format("a.csv", "jsonl") == "jsonl"


# --- Parquet ----------------------------------------------------------------------------------------------------------


async def test_parquet(tmp_path: Path) -> None:
    """Columns with their types; what is no Parquet is told."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"id": [1, 2, 3], "question": ["a", None, "c"], "temperature": [0.5, None, float("nan")]})
    parquet.write_table(table, tmp_path / "in.parquet")
    first, second, third = await read(tmp_path / "in.parquet")
    assert isinstance(first, BatchRow)
    assert first.body == {"messages": [{"role": "user", "content": "a"}], "temperature": 0.5}
    assert second == RowProblem(2, "2", "no messages, prompt or question")
    assert isinstance(third, BatchRow)
    with pytest.raises(ConfigError, match="is no Parquet file"):
        await read(written(tmp_path, "bad.parquet", b"nothing"))


async def test_times_of_parquet(tmp_path: Path) -> None:
    """A time that Python has no form for, with nanoseconds or far away, is a text; the other columns are as ever."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    exact = arrow.array([1_700_000_000_000_000_001, None], arrow.timestamp("ns"))
    far = arrow.array([4 * 10**14, 0], arrow.timestamp("ms"))
    parquet.write_table(arrow.table({"id": [1, 2], "exact": exact, "far": far}), tmp_path / "in.parquet")
    rows = await read(tmp_path / "in.parquet", template=Template("{{id}} {{far}} {{exact}}"))
    assert isinstance(rows[0], BatchRow)
    said = "1 14645-06-30T15:06:40.000 2023-11-14T22:13:20.000000001"
    assert rows[0].body["messages"] == [{"role": "user", "content": said}]
    assert rows[1] == RowProblem(2, "2", "the template needs the column 'exact', which is null")


class _Column:
    """Like one of pyarrow: values that raise where Python has no form for one, and the same as texts."""

    def __init__(self, values: list[object], texts: list[object] | None = None) -> None:
        self._values = values
        self._texts = texts

    def to_pylist(self) -> list[object]:
        if self._texts is not None:
            raise ValueError("not safely convertible to microseconds")
        return self._values

    def cast(self, _to: str) -> _Column:
        return _Column(self._texts or [])


class _Batch:
    schema = SimpleNamespace(names=["id", "at"])

    def __init__(self, *columns: _Column) -> None:
        self.columns = list(columns)

    def to_pylist(self) -> list[dict[str, object]]:
        raise ValueError("not safely convertible to microseconds")


def test_columns_of_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the column with such a value becomes texts; without pyarrow, by what stands in for it."""
    batch = _Batch(_Column([1, 2]), _Column([], ["2023-11-14 22:13:20.000000001", None]))
    file = SimpleNamespace(iter_batches=lambda batch_size: iter([batch]), close=lambda: None)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(ArrowException=ArithmeticError))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(ParquetFile=lambda path: file))
    rows = ParquetRows("in.parquet")
    assert rows.read() == [{"id": 1, "at": "2023-11-14T22:13:20.000000001"}, {"id": 2, "at": None}]
    assert rows.read() == []


async def test_parquet_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said; a pipe is refused."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install gorouter-trio\[parquet\]"):
        await read(written(tmp_path, "in.parquet", b"PAR1"))
    with pytest.raises(ConfigError, match="cannot be read from a pipe"):
        async with open_rows(0, input_format="parquet"):
            pass


# --- templates --------------------------------------------------------------------------------------------------------


def test_template_of_text() -> None:
    """Columns become text, braces of anything else stay, and what is missing is named."""
    template = Template('Translate {{ text }} to {{lang}}. Answer {"x": 1} {{text}}')
    assert template.columns == ("text", "lang")
    filled = template.fill({"text": "a{{lang}}", "lang": 5})
    assert filled == {"messages": [{"role": "user", "content": 'Translate a{{lang}} to 5. Answer {"x": 1} a{{lang}}'}]}
    with pytest.raises(MissingColumn, match="'lang', which is missing"):
        template.fill({"text": "a"})
    with pytest.raises(MissingColumn, match="'text', which is null"):
        template.fill({"text": None, "lang": "x"})


def test_template_of_json() -> None:
    """A list of messages or a body; a string that is one column is that column's value."""
    messages = Template('[{"role": "system", "content": "Be {{tone}}."}, {"role": "user", "content": "{{parts}}"}]')
    filled = messages.fill({"tone": "kind", "parts": [{"type": "text", "text": "x"}]})
    assert filled["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    body = Template('{"messages": [{"role": "user", "content": "{{q}}"}], "max_tokens": "{{n}}"}')
    assert body.fill({"q": "x", "n": 7})["max_tokens"] == 7
    assert Template("{{a}}").fill({"a": "x"}) == {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize("text", ["", "no columns", '{"messages": [}', "[1] nothing"])
def test_wrong_templates(text: str) -> None:
    """What cannot be a template is refused before anything is read."""
    with pytest.raises(ConfigError, match="template"):
        Template(text)


async def test_rows_by_template(tmp_path: Path) -> None:
    """Only what the template names goes into the request; ids are the rows' own, doubles get a suffix on request."""
    path = written(tmp_path, "in.csv", b"id,text,model\na,x,bad\na,y,bad\na,,bad\n")
    rows = await read(path, template=Template("Say {{text}}"), duplicates="suffix")
    assert prompts(rows) == ["Say x", "Say y", "the template needs the column 'text', which is missing"]
    assert [row.custom_id for row in rows] == ["a", "a-2", "a-3"]
    assert isinstance(rows[0], BatchRow)
    assert "model" not in rows[0].body


@given(names=st.lists(st.text(max_size=3), max_size=60), in_memory=st.integers(0, 40))
def test_id_table(names: list[str], in_memory: int) -> None:
    """It knows of each id the first line, whether they are few or in a file."""
    first = dict[str, int]()
    with pytest.MonkeyPatch.context() as patch, closing(IdTable()) as table:
        patch.setattr("gorouter_trio.batch.ids._IN_MEMORY", in_memory)
        for line, name in enumerate(names, 1):
            assert table.claim(name, line) == first.get(name, 0)
            first.setdefault(name, line)
        assert [table.find(name) for name in names] == [first[name] for name in names]
        assert table.find("a name of nobody") == 0
        assert len(table) == len(first)


def test_id_table_is_flat(record_property) -> None:
    """A hundred thousand ids more take no memory of the process: they are in a file, and found there."""
    with closing(IdTable()) as table:
        for line in range(1, 150_001):  # more than what SQLite keeps of them in memory
            table.claim(f"a rather long id of a row, number {line}", line)
        before = _resident_kib()
        for line in range(150_001, 250_001):
            assert not table.claim(f"a rather long id of a row, number {line}", line)
        grown = _resident_kib() - before
        assert table.find("a rather long id of a row, number 40000") == 40_000
        assert table.claim("a rather long id of a row, number 17", 1) == 17
    record_property("figure", f"100,000 ids more take {grown:,} KiB; in a table of arrays, 2,400 at most")
    assert grown < 1_024


def _resident_kib() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])


async def test_no_room_for_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends the input with an error that names the file; rows before it are given out."""
    monkeypatch.setattr("gorouter_trio.batch.ids._IN_MEMORY", 10)
    path = written(tmp_path, "in.jsonl", b"".join(b'{"id": "a%d", "prompt": "x"}\n' % n for n in range(4_000)))
    seen = 0
    with pytest.raises(StoreError, match=r"a temporary file: the disk is full.*TMPDIR"):
        async with open_rows(str(path)) as rows:
            async for _row in rows:
                seen += 1
                if seen == 12:
                    _fill_up(rows)
    assert seen >= 12


def _fill_up(rows: RowSource) -> None:
    file = rows._reader._ids._file
    assert file is not None
    # As many pages as it has now, and no more.
    pages = file._connection.execute("PRAGMA page_count").fetchone()[0]
    file._connection.execute(f"PRAGMA max_page_count={pages}")
