"""The commands about money: models with their prices, key, credits, and what a ledger or a store cost."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
import trio
from attempts import answered, lost

from gorouter_trio.config import LedgerConfig
from gorouter_trio.pool.ledger import Ledger, Owner
from gorouter_trio.stores.sqlite import SqliteStore
from gorouter_trio.wire.codec import encode_json
from gorouter_trio.wire.journal import TurnAnswered, TurnStarted
from gorouter_trio.wire.ledger import LedgerRow
from gorouter_trio.wire.messages import AssistantMessage
from gorouter_trio.wire.responses import Usage
from gorouter_trio.wire.result import CallRecord

DAY = 1_795_564_800.0  # 2026-11-25, 00:00 UTC
KEY = "sk-or-v1-0123456789abcdef-secret"


@pytest.fixture
def ledger_file(tmp_path: Path) -> Path:
    """Three days with two models, a lost answer and one without a cost."""
    written: list[LedgerRow] = []

    class Sink:
        def write(self, row: LedgerRow) -> None:
            written.append(row)

    ledger = Ledger(LedgerConfig(), run="r", close_reservation=lambda _reservation, _usd: None, sink=Sink())
    for day in range(3):
        for number in range(4):
            owner = Owner(session=f"s{number % 2}", batch="night" if day else "")
            attempt = answered("0.125", model="a/dear" if number else "b/cheap", tenant="team", prompt=100)
            ledger.enter(attempt, at_s=DAY + day * 86_400 + number * 3_600, now=0, owner=owner)
    ledger.enter(answered(None, model="b/cheap"), at_s=DAY, now=0, estimate_usd=Decimal("0.5"))
    ledger.enter(answered(None, model="b/cheap"), at_s=DAY, now=0)
    ledger.enter(lost("gen-1-none", model="a/dear"), at_s=DAY, now=0)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(encode_json(row) + b"\n" for row in written) + b'{"torn')
    return path


def table(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_cost_by_model(inside, ledger_file: Path) -> None:
    """The dearest model first, the total last, estimates and unknowns apart; what is missing is said."""
    done = inside("cost", str(ledger_file))
    assert done.code == 0
    assert table(done.out) == {
        "model": ["calls", "tokens", "cost", "estimated", "unknown"],
        "a/dear": ["10", "945", "$1.12", "$0.00", "1"],
        "b/cheap": ["5", "345", "$0.38", "$0.50", "1"],
        "total": ["15", "1,290", "$1.50", "$0.50", "2"],
    }
    assert done.err.splitlines() == [
        "gorouter-trio: 1 attempts may have been charged and are in no sum; --reconcile asks the API about them",
        "gorouter-trio: 1 attempts have a cost that nobody said; it is in no sum",
        f"gorouter-trio: 1 lines of {ledger_file} cannot be read",
    ]


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("session", ["(none)", "s0", "s1"]),
        ("tenant", ["(none)", "team"]),
        ("batch", ["(none)", "night"]),
        ("purpose", ["chat"]),
        ("state", ["estimated", "reconciling", "settled", "unknown"]),
        ("day", ["2026-11-25", "2026-11-26", "2026-11-27"]),
        ("hour", [f"2026-11-2{day} 0{hour}:00" for day in (5, 6, 7) for hour in range(4)]),
    ],
)
def test_cost_by_anything(inside, ledger_file: Path, by: str, names: list[str]) -> None:
    """Rows add up to the total, exactly; time is in order."""
    done = inside("cost", str(ledger_file), "--by", by, "--json")
    report = json.loads(done.out, parse_float=Decimal)
    found = [row["name"] for row in report["rows"]]
    assert sorted(found) == names
    assert found == names or by not in {"day", "hour"}
    assert sum(row["cost_usd"] for row in report["rows"]) == report["total"]["cost_usd"] == Decimal("1.5")
    assert sum(row["attempts"] for row in report["rows"]) == report["total"]["attempts"] == 15
    assert (report["total"]["reconciling"], report["unreadable"]) == (1, 1)


def test_cost_within_bounds_and_drawn(inside, ledger_file: Path) -> None:
    """Only the days asked for, and a bar for each."""
    done = inside("cost", str(ledger_file), "--by", "day", "--since", "2026-11-26", "--plot")
    assert table(done.out)["2026-11-27"] == ["4", "420", "$0.50", "█" * 24]
    assert "2026-11-25" not in done.out
    done = inside("cost", str(ledger_file), "--until", "2026-11-25T02:00:00", "--json")
    assert json.loads(done.out)["total"]["attempts"] == 5
    done = inside("cost", "-", "--json", stdin=ledger_file.read_bytes())
    assert json.loads(done.out)["total"]["attempts"] == 15


def test_cost_of_a_pipe(inside, ledger_file: Path, tmp_path: Path) -> None:
    """A ledger that comes through a named pipe is summed from its first byte on, and is not one to add to."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as threads:
        threads.submit(pipe.write_bytes, ledger_file.read_bytes())
        done = inside("cost", str(pipe), "--json")
    total = json.loads(done.out, parse_float=Decimal)["total"]
    assert (total["attempts"], total["cost_usd"]) == (15, Decimal("1.5"))
    done = inside("cost", str(pipe), "--reconcile", "--simulate")
    assert (done.code, done.message) == (2, "--reconcile: needs a ledger file, to which it adds what it finds")


def test_cost_of_nothing(inside, ledger_file: Path) -> None:
    """A ledger that has nothing within the bounds is one, torn or not; to show no rows is a mistake."""
    done = inside("cost", str(ledger_file), "--since", "2031-01-01", "--json")
    assert (done.code, json.loads(done.out)["rows"], json.loads(done.out)["unreadable"]) == (0, [], 1)
    assert inside("cost", str(ledger_file), "--since", "2031-01-01").code == 0
    done = inside("cost", str(ledger_file), "--top", "0")
    assert (done.code, done.message) == (2, "--top must be at least 1, not 0")


def test_reconcile(inside, ledger_file: Path) -> None:
    """What the API knows is added to the ledger; what it does not know stays visible, and the exit code says so."""
    before = ledger_file.read_bytes()
    done = inside("cost", str(ledger_file), "--reconcile", "--simulate", "--json")
    assert done.code == 1
    assert "1 of 1 lost attempts could not be looked up" in done.err
    assert ledger_file.read_bytes() == before


def test_reconciled_later(inside, simulator, tmp_path: Path) -> None:
    """A lost attempt that the API knows by now gets its cost, in the file and in the sums, once."""
    running = simulator("--seed", "3")
    reply = json.loads(
        inside("chat", "-p", "hi", "--json", "--base-url", running.base_url, OPENROUTER_API_KEY=KEY).out,
        parse_float=Decimal,
    )
    row = LedgerRow(
        run="r", row=1, at_s=DAY, state="unreconciled", generation_id=reply["generation_id"], requested_model="a/dear"
    )
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(encode_json(row) + b"\n")
    for _ in range(2):
        done = inside(
            "cost", str(path), "--reconcile", "--json", "--base-url", running.base_url, OPENROUTER_API_KEY=KEY
        )
        report = json.loads(done.out, parse_float=Decimal)
        assert (done.code, done.err) == (0, "")
        assert (report["total"]["cost_usd"], report["total"]["attempts"]) == (reply["cost_usd"], 1)
        assert path.read_bytes().count(b"\n") == 2


def test_cost_of_a_store(inside, tmp_path: Path) -> None:
    """Stored conversations cost what their answers say; what they do not know is one line."""
    path = tmp_path / "bot.db"

    async def fill() -> None:
        async with SqliteStore(path) as store:
            for number in range(4):
                usage = Usage(prompt_tokens=10, completion_tokens=5, total_tokens=15, cost=Decimal("0.25"))
                call = CallRecord(model="a/dear", usage=usage if number else None, finished_at_s=DAY)
                entries: list[TurnStarted | TurnAnswered] = [
                    TurnStarted("t", encode_json([{"role": "user", "content": "x"}]), at_s=DAY),  # type: ignore[arg-type]  # raw JSON
                    TurnAnswered("t", encode_json(AssistantMessage("y")), call),  # type: ignore[arg-type]  # raw JSON
                ]
                await store.append(
                    f"u{number % 2}", [_encoded(entry) for entry in entries], expected_version=number // 2
                )

    trio.run(fill)
    done = inside("cost", str(path))
    assert table(done.out)["a/dear"] == ["4", "45", "$0.75", "1"]
    rows = json.loads(inside("cost", str(path), "--by", "session", "--json").out)["rows"]
    assert [(row["name"], row["cost_usd"], row["unknown"]) for row in rows] == [("u1", 0.5, 0), ("u0", 0.25, 1)]
    days = json.loads(inside("cost", str(path), "--by", "day", "--json").out)["rows"]
    assert [(row["name"], row["attempts"]) for row in days] == [("2026-11-25", 4)]
    done = inside("cost", str(path), "--by", "tenant")
    assert (done.code, done.message) == (2, "--by tenant: stored conversations do not know it; a ledger does")
    done = inside("cost", str(path), "--reconcile")
    assert (done.code, done.message) == (2, "--reconcile: needs a ledger file, to which it adds what it finds")


def test_cost_at_odd_times(inside, tmp_path: Path) -> None:
    """A call whose time nobody noted is of no day, and one in milliseconds of a far one; both are in the sums."""
    path = tmp_path / "bot.db"

    async def fill() -> None:
        async with SqliteStore(path) as store:
            for number, at_s in enumerate((0.0, DAY, DAY * 1000)):
                call = CallRecord(model="a/dear", usage=Usage(cost=Decimal("0.25")), finished_at_s=at_s)
                entries: list[TurnStarted | TurnAnswered] = [
                    TurnStarted("t", encode_json([{"role": "user", "content": "x"}]), at_s=DAY),  # type: ignore[arg-type]  # raw JSON
                    TurnAnswered("t", encode_json(AssistantMessage("y")), call),  # type: ignore[arg-type]  # raw JSON
                ]
                await store.append(f"u{number}", [_encoded(entry) for entry in entries], expected_version=0)

    trio.run(fill)
    done = inside("cost", str(path), "--by", "day", "--json")
    assert [row["name"] for row in json.loads(done.out)["rows"]] == ["(none)", "1.79556e+12", "2026-11-25"]
    assert json.loads(done.out)["total"]["cost_usd"] == 0.75
    assert inside("cost", str(path), "--by", "hour").code == 0


def _encoded(entry: TurnStarted | TurnAnswered) -> bytes:
    fields = {name: getattr(entry, name) for name in entry.__struct_fields__}
    raw = {name: msgspec.Raw(value) for name, value in fields.items() if isinstance(value, bytes)}
    return encode_json(type(entry)(**{**fields, **raw}))


def test_no_ledger(inside, tmp_path: Path) -> None:
    """A file that is not there, or is something else, is one line."""
    done = inside("cost", str(tmp_path / "none"))
    assert (done.code, done.message) == (2, f"{tmp_path / 'none'}: No such file or directory")
    (tmp_path / "text").write_text("hello\nworld\n")
    done = inside("cost", str(tmp_path / "text"))
    assert (done.code, done.message) == (2, f"{tmp_path / 'text'}: is no ledger: none of its 2 lines can be read")
    (tmp_path / "empty").touch()
    assert table(inside("cost", str(tmp_path / "empty")).out)["total"] == ["0", "0", "$0.00"]


# --- models -----------------------------------------------------------------------------------------------------------


def names(done) -> list[str]:
    assert done.code == 0, done.err
    return [model["id"] for model in json.loads(done.out)]


def test_model_filters(inside) -> None:
    """Each option narrows the list, and all of them hold together."""
    every = json.loads(inside("models", "--simulate", "--json").out)
    by_id = {model["id"]: model for model in every}

    def listed(*options: str) -> list[str]:
        return names(inside("models", "--simulate", "--json", *options))

    assert {by_id[name]["id"].endswith(":free") for name in listed("--free")} == {True}
    assert all("image" in by_id[name]["architecture"]["input_modalities"] for name in listed("--input", "image"))
    assert all("tools" in by_id[name]["supported_parameters"] for name in listed("--supports", "tools"))
    assert all(float(by_id[name]["pricing"]["prompt"]) <= 0.1e-6 for name in listed("--max-price", "0.1"))
    assert all(float(by_id[name]["pricing"]["completion"]) <= 0.5e-6 for name in listed("--max-output-price", "0.5"))
    assert all(by_id[name]["context_length"] >= 1_000_000 for name in listed("--min-context", "1000000"))
    few = listed("qwen", "--max-price", "0.1", "--min-context", "40000", "--sort", "price")
    assert few
    assert all(name.startswith("qwen/") for name in few)
    assert len(few) < len(listed("qwen")) < len(every)


def test_model_orders(inside) -> None:
    """By name, price, context or age; a limit takes the first ones."""

    def listed(*options: str):
        return json.loads(inside("models", "--simulate", "--json", *options).out)

    prices = [(float(m["pricing"]["prompt"]), float(m["pricing"]["completion"])) for m in listed("--sort", "price")]
    assert prices == sorted(prices)
    outputs = [float(m["pricing"]["completion"]) for m in listed("--sort", "output-price")]
    assert outputs == sorted(outputs)
    contexts = [m["context_length"] for m in listed("--sort", "context")]
    assert contexts == sorted(contexts, reverse=True)
    created = [m["created"] for m in listed("--sort", "newest", "--limit", "5")]
    assert created == sorted(created, reverse=True)
    assert len(created) == 5
    assert [m["id"] for m in listed()] == sorted(m["id"] for m in listed())


def test_prices_are_not_rounded(inside) -> None:
    """Every digit of a price is shown, and a price of zero is free only for a free model."""
    lines = {line.split()[0]: line.split()[1:] for line in inside("models", "--simulate").out.splitlines()}
    assert lines["qwen/qwen3-8b"] == ["128,000", "0.035", "0.138"]
    assert lines["openai/gpt-4-turbo"] == ["128,000", "10.00", "30.00"]
    assert lines["deepseek/deepseek-r1-0528:free"] == ["163,840", "free", "free"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--max-price", "cheap"), "--max-price: must be USD for a million tokens, not 'cheap'"),
        (("--max-output-price", "-1"), "--max-output-price: must be zero or more, not -1"),
        (("--max-price", "nan"), "--max-price: must be zero or more, not nan"),
        (("--limit", "0"), "--limit: must be at least 1, not 0"),
    ],
)
def test_bad_filters(inside, options: tuple[str, ...], says: str) -> None:
    """One line, exit code 2, and nothing is asked."""
    done = inside("models", *options)
    assert (done.code, done.message) == (2, says)


def test_no_such_model(inside) -> None:
    """Nothing found is exit code 1."""
    done = inside("models", "--simulate", "--max-price", "0", "claude")
    assert (done.code, done.out, done.message) == (1, "", "there is no such model")


# --- the account ------------------------------------------------------------------------------------------------------


def test_a_key_with_limits(reference_dir: Path) -> None:
    """The key of the API description, with its limit, what is left, and its free requests."""
    from gorouter_trio.cli.account import _key_facts
    from gorouter_trio.wire.codec import decode_key

    key = decode_key((reference_dir / "openrouter" / "examples" / "15-key.body").read_bytes())
    assert dict(_key_facts(key)) == {
        "label": "sk-or-v1-0a1...f9e",
        "limit": "$25.00, renewed monthly",
        "left of it": "$19.75",
        "used": "$41.50",
        "today": "$0.75",
        "this week": "$2.50",
        "this month": "$5.25",
        "free requests": "2 of 1,000 today",
        "free tier": "no",
        "expires": "",
    }
