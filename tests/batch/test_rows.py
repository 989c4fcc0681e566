"""Lines of a batch's input: every form that is taken, every reason for one that is not, and never an exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gorouter_trio.batch.ids import IdTable
from gorouter_trio.batch.rows import BatchRow, RowProblem, RowReader, parse_row

POST = {"method": "POST", "url": "/v1/chat/completions"}
HELLO = [{"role": "user", "content": "hello"}]


def line(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def parse(data: bytes) -> BatchRow | RowProblem:
    return parse_row(data, line_number=7)


def body_of(data: bytes) -> dict[str, Any]:
    row = parse(data)
    assert isinstance(row, BatchRow)
    return dict(row.body)


def reason_of(row: BatchRow | RowProblem | None) -> str:
    assert isinstance(row, RowProblem)
    return row.reason


def read_all(*lines: bytes) -> list[BatchRow | RowProblem | None]:
    reader = RowReader()
    return [reader.read(data) for data in lines]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (line(prompt="hello"), BatchRow(7, "row-7", {"messages": HELLO})),
        (line(question="hello", answer="world"), BatchRow(7, "row-7", {"messages": HELLO})),
        (line(messages=HELLO, id="a"), BatchRow(7, "a", {"messages": HELLO})),
        (line(prompt="hello", custom_id="a", id="b"), BatchRow(7, "a", {"messages": HELLO})),
        (line(prompt="hello", custom_id=None, id=12), BatchRow(7, "12", {"messages": HELLO})),
        (line(custom_id="a", **POST, body={"messages": HELLO}), BatchRow(7, "a", {"messages": HELLO})),
        (
            line(custom_id="a", method="POST", url="https://host/api/v1/chat/completions", body={"messages": HELLO}),
            BatchRow(7, "a", {"messages": HELLO}),
        ),
    ],
    ids=["prompt", "question", "messages", "custom_id first", "whole number", "batch form", "whole url"],
)
def test_forms(data: bytes, expected: BatchRow) -> None:
    """Each form gives the request that it stands for."""
    assert parse(data) == expected


def test_request_fields_are_kept() -> None:
    """Columns that are request fields go along, unless null; others stay behind."""
    row = parse(line(prompt="hello", model="a/b", temperature=0.5, max_tokens=9, seed=None, answer="no", label=1))
    assert isinstance(row, BatchRow)
    assert row.body == {"messages": HELLO, "model": "a/b", "temperature": 0.5, "max_tokens": 9}


def test_batch_form_is_sent_as_it_is() -> None:
    """A body in the batch form keeps what nobody here knows."""
    body = {"messages": HELLO, "safe_prompt": True, "temperature": "hot", "seed": None}
    row = parse(line(custom_id="a", **POST, body=body))
    assert isinstance(row, BatchRow)
    assert row.body == body


def test_which_prompt_counts() -> None:
    """Messages before prompt before question; a null one is not there."""
    assert body_of(line(messages=HELLO, prompt="x")) == {"messages": HELLO}
    assert body_of(line(messages=None, prompt="hello", question="x")) == {"messages": HELLO}


def test_data_set_columns_are_no_batch_form() -> None:
    """A data set may have a column `url` or a text `body`."""
    for row in (line(question="hello", url="https://example.org"), line(prompt="hello", body="a mail")):
        assert parse(row) == BatchRow(7, "row-7", {"messages": HELLO})


def test_text_is_kept() -> None:
    """Any Unicode text arrives as it was."""
    text = "žluťoučký 🐎 \u2028 \x7f ﷽"
    for data in (line(prompt=text), json.dumps({"prompt": text}).encode()):
        assert body_of(data)["messages"][0]["content"] == text


BROKEN: list[tuple[bytes, str | None, str]] = [
    (b"hello", None, "not JSON: invalid character (byte 0)"),
    (b'{"prompt": "x"', None, "not JSON: Input data was truncated"),
    (b'{"prompt": "x"} {"prompt": "y"}', None, "not JSON: trailing characters (byte 17)"),
    (b'{"prompt": "a\nb"}', None, "not JSON: invalid character (byte 13)"),
    (b'{"prompt": "x", "top_p": NaN}', None, "not JSON: NaN is no JSON number"),
    (b'{"prompt": "x", "top_p": -Infinity}', None, "not JSON: Infinity is no JSON number"),
    (b'{"prompt": "x", "top_p": 1e999}', None, "not JSON: Number out of range"),
    (b'{"prompt": "\\ud83d x"}', None, r"not JSON: \u escape of half a surrogate pair at column 13"),
    (b'{"prompt": "x \\udc0e"}', None, r"not JSON: \u escape of half a surrogate pair at column 15"),
    (b'{"prompt": "caf\xe9"}', None, "not UTF-8: byte 0xe9 at column 16"),
    (b'{"prompt": "\xed\xa0\xbd"}', None, "not UTF-8: byte 0xed at column 13"),
    ('{"prompt": "x"}'.encode("utf-16"), None, "not UTF-8 but UTF-16; save the file as UTF-8"),
    (b"[" * 200_000 + b"]" * 200_000, None, "nested too deeply"),
    (b"[1]", None, "not a JSON object but an array"),
    (b"[]", None, "not a JSON object but an empty array"),
    (b"null", None, "not a JSON object but null"),
    (b"true", None, "not a JSON object but true"),
    (b'"x"', None, "not a JSON object but 'x'"),
    (b"17", None, "not a JSON object but the number 17"),
    (b"{}", "row-7", "no messages, prompt or question"),
    (line(text="x", id="a"), "a", "no messages, prompt or question"),
    (line(prompt=""), "row-7", "prompt is blank"),
    (line(prompt=" \n"), "row-7", "prompt is blank"),
    (line(prompt=5), "row-7", "prompt is the number 5, and must be a string"),
    (line(question=["x"]), "row-7", "question is an array, and must be a string"),
    (line(messages=[]), "row-7", "messages must be a list of messages, not an empty array"),
    (line(messages="hi"), "row-7", "messages must be a list of messages, not 'hi'"),
    (line(messages=[{"role": "user"}, "x"]), "row-7", "messages: number 2 is 'x', not a message"),
    (line(prompt="x", id=""), None, "id is empty"),
    (line(prompt="x", id=1.5), None, "id is the number 1.5, and must be a string or a whole number"),
    (line(prompt="x", id=True), None, "id is true, and must be a string or a whole number"),
    (line(prompt="x", custom_id={}), None, "custom_id is an object, and must be a string or a whole number"),
    (line(prompt="x", temperature="hot"), "row-7", "temperature: Expected `float | null`, got `str`"),
    (line(prompt="x", model=["a"]), "row-7", "model: Expected `str`, got `array`"),
    (line(custom_id="a", url=POST["url"], body={}), "a", 'method must be "POST" and is missing'),
    (line(custom_id="a", **{**POST, "method": "GET"}, body={}), "a", "method must be \"POST\", not 'GET'"),
    (line(custom_id="a", method="POST", body={}), "a", "url must end in /chat/completions and is missing"),
    (
        line(custom_id="a", method="POST", url="/v1/embeddings", body={}),
        "a",
        "url must end in /chat/completions, not '/v1/embeddings'",
    ),
    (line(custom_id="a", **POST), "a", "body must be an object and is missing"),
    (line(custom_id="a", **POST, body=[1]), "a", "body must be an object, not an array"),
    (line(custom_id="a", **POST, body={}), "a", "body.messages must be a list of messages, not null"),
]


@pytest.mark.parametrize(("data", "custom_id", "reason"), BROKEN, ids=[reason[:50] for _, _, reason in BROKEN])
def test_reasons(data: bytes, custom_id: str | None, reason: str) -> None:
    """Each broken line says what is wrong with it, and which line it is."""
    problem = parse(data)
    assert isinstance(problem, RowProblem)
    assert (problem.custom_id, problem.reason) == (custom_id, reason)
    assert problem.message == f"line 7: {reason}"
    assert problem.is_json == (not reason.startswith(("not ", "nested")))


def test_long_values_are_shortened() -> None:
    """A reason stays one readable line whatever the row holds."""
    for data in (line(prompt=int("9" * 4_000)), line(messages="x" * 100_000)):
        assert len(reason_of(parse(data))) < 150


def test_lines_are_counted() -> None:
    """Blank lines are skipped and counted; line ends and a byte order mark at the start do not matter."""
    rows = read_all(b"\xef\xbb\xbf" + line(prompt="a") + b"\r\n", b"", b" \t\r\n", line(prompt="b") + b"\n")
    assert [row and row.custom_id for row in rows] == ["row-1", None, None, "row-4"]


def test_byte_order_mark_elsewhere() -> None:
    """It belongs at the start of the file."""
    first, second = read_all(line(prompt="a"), b"\xef\xbb\xbf" + line(prompt="b"))
    assert isinstance(first, BatchRow)
    assert second == RowProblem(2, None, "not JSON: invalid character (byte 0)", is_json=False)
    assert read_all(b"\xef\xbb\xbf\r\n") == [None]


def test_duplicate_ids() -> None:
    """The later row is refused and names the first, whether it could have been used or not."""
    rows = read_all(line(prompt="x", id="a"), line(id="b"), line(prompt="y", id="a"), line(prompt="z", id="b"))
    assert isinstance(rows[0], BatchRow)
    assert rows[2] == RowProblem(3, None, "the id 'a' stands on line 1 already")
    assert rows[3] == RowProblem(4, None, "the id 'b' stands on line 2 already")


def test_many_rows_of_one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets the next suffix, past one that a row has given itself, and without trying all those before again."""
    tries = 0
    claim = IdTable.claim

    def counted(self: IdTable, name: str, number: int) -> int:
        nonlocal tries
        tries += 1
        return claim(self, name, number)

    monkeypatch.setattr(IdTable, "claim", counted)
    reader = RowReader(duplicates="suffix")
    ids = ["a-3", *["a"] * 300, *[f"b{n % 1500}" for n in range(3000)], "a"]
    rows = [reader.read(line(prompt="hello", id=each)) for each in ids]
    found = [row.custom_id for row in rows if isinstance(row, BatchRow)]
    assert found[:4] == ["a-3", "a", "a-2", "a-4"]
    assert (found[300], found[-1]) == ("a-301", "a-302")
    assert len(set(found)) == len(ids)
    assert tries < 3 * len(ids)


def test_own_ids_that_look_like_default_ones() -> None:
    """A default id and the same one given by another row are duplicates in either order."""
    rows = read_all(
        line(prompt="a"),
        line(prompt="b", id="row-1"),
        line(prompt="c", id="row-5"),
        line(prompt="d", id="row-4"),
        line(prompt="e"),
        line(prompt="f", id="row-0001"),
        line(prompt="g", id="row-" + "9" * 30),
    )
    assert [row.custom_id for row in rows if row] == [
        "row-1",
        None,
        "row-5",
        "row-4",
        None,
        "row-0001",
        "row-" + "9" * 30,
    ]
    assert reason_of(rows[1]) == "the id 'row-1' stands on line 1 already"
    assert reason_of(rows[4]) == "the id 'row-5' stands on line 3 already"


def test_last_of_equal_keys_counts() -> None:
    """As in most readers of JSON."""
    assert parse(b'{"prompt": "x", "prompt": "hello"}') == BatchRow(7, "row-7", {"messages": HELLO})


def test_skipped_line() -> None:
    """A line that could not be read is a problem with a number of its own."""
    reader = RowReader()
    assert reader.skip("longer than 10 bytes") == RowProblem(1, None, "longer than 10 bytes", is_json=False)
    assert reader.read(line(prompt="hello")) == BatchRow(2, "row-2", {"messages": HELLO})


# --- anything ---------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("id", "custom_id", "method", "url", "body", "messages", "prompt", "question", "model", "stop", "metadata")
ROWS = st.dictionaries(st.sampled_from(NAMES) | st.text(), JSON | st.just(HELLO) | st.just({"messages": HELLO}))


def check(row: BatchRow | RowProblem | None, data: bytes) -> None:
    """A row has messages and an id, a problem a reason in one line; only blank lines give nothing."""
    if row is None:
        assert not data.removeprefix(b"\xef\xbb\xbf").strip()
    elif isinstance(row, BatchRow):
        assert row.custom_id
        assert row.body["messages"]
    else:
        assert row.reason
        assert row.custom_id != ""


@given(data=st.binary(max_size=60))
@example(b"\xff\xfe")
@example(b"\xef\xbb\xbf\xef\xbb\xbf")
@example(b'{"id": ' + b"9" * 5_000 + b"}")
def test_any_bytes(data: bytes) -> None:
    """Any bytes give a row, a problem or nothing, never an exception."""
    check(RowReader().read(data), data)


@given(record=ROWS)
def test_any_object(record: dict[str, object]) -> None:
    """Any JSON object in any mix of the forms gives a row or a problem."""
    data = json.dumps(record).encode()
    row = RowReader().read(data)
    assert row is not None
    check(row, data)


@given(ids=st.lists(st.none() | st.sampled_from(["a", "b", "row-1", "row-2", "row-3", "row-4"]), max_size=6))
def test_ids_are_unique(ids: list[str | None]) -> None:
    """Whatever ids the rows have, each stands in the output at most once, with the first row that has it."""
    rows = read_all(*(line(prompt="x", **({} if i is None else {"id": i})) for i in ids))
    given_ids = [i or f"row-{n}" for n, i in enumerate(ids, 1)]
    expected = [i if i not in given_ids[:n] else None for n, i in enumerate(given_ids)]
    assert [row and row.custom_id for row in rows] == expected
