"""Parts of the command line by themselves: progress, sums, forms, failures, prompts."""

from __future__ import annotations

import gzip
import random
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.batch.runner import BatchResult, open_batch
from gorouter_trio.batch.tally import Quantiles, Tally
from gorouter_trio.cli.failures import CliError, describe_error, find_failure, redact, report_failure
from gorouter_trio.cli.progress import BatchView, _count_lines, open_progress
from gorouter_trio.cli.prompts import make_requests
from gorouter_trio.cli.simulate import parse_address, parse_faults
from gorouter_trio.cli.terminal import facts_table, format_cost, format_seconds, printable, show
from gorouter_trio.errors import ConfigError, ConnectError, ProviderError, RateLimitError
from gorouter_trio.wire.codec import encode_json
from gorouter_trio.wire.mail import CallSettings
from gorouter_trio.wire.messages import AssistantMessage
from gorouter_trio.wire.responses import Usage
from gorouter_trio.wire.result import CallRecord, ChatResult

if TYPE_CHECKING:
    from trio.testing import MockClock


async def test_plain_progress(autojump_clock: MockClock, capfd: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal, a line every five seconds."""

    async def run(body: bytes, _settings: CallSettings) -> tuple[ChatResult, bytes]:
        await trio.sleep(2.1)
        usage = Usage(prompt_tokens=10, completion_tokens=20, cost=Decimal("0.001"))
        return ChatResult(message=AssistantMessage("x"), call=CallRecord(usage=usage, duration_s=2.0)), body

    rows = ({"messages": [{"role": "user", "content": "x"}]} for _ in range(16))
    tally = Tally()
    async with open_batch(rows, run=run, max_in_flight=2) as batch, open_progress(BatchView(tally, batch), total=16):
        async for result in batch:
            tally.add(result)
    assert capfd.readouterr().err.splitlines() == [
        "4/16 rows, 1 rows/s, 2 in flight, 0 failed, 120 tokens, $0.00400",
        "8/16 rows, 1 rows/s, 2 in flight, 0 failed, 240 tokens, $0.00800",
        "14/16 rows, 1 rows/s, 2 in flight, 0 failed, 420 tokens, $0.0140",
    ]


def test_tally() -> None:
    """Answers, errors by kind, tokens, costs that are known, and those that are not."""
    tally = Tally()
    costs = (Decimal("0.1"), Decimal("0.2"), None)
    for number, cost in enumerate(costs):
        call = CallRecord(usage=Usage(prompt_tokens=3, completion_tokens=5, cost=cost), attempts=2, duration_s=1.0)
        result = ChatResult(message=AssistantMessage("x"), call=call)
        tally.add(BatchResult(custom_id="a", index=number, result=result, body=b"{}"))
    for error in (RateLimitError("no", status=429), RateLimitError("no", status=429), ConnectError("no")):
        error.attempts = 4
        error.maybe_billed = isinstance(error, ConnectError)
        tally.add(BatchResult(custom_id="a", index=9, error=error))
    assert (tally.rows, tally.succeeded, tally.failed) == (6, 3, 3)
    assert dict(tally.errors) == {"429": 2, "connect": 1}
    assert (tally.prompt_tokens, tally.completion_tokens, tally.cost, tally.unpriced) == (9, 15, Decimal("0.3"), 1)
    assert (tally.retries, tally.maybe_billed) == (12, 1)


@given(
    values=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=200), share=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0])
)
def test_quantiles(values: list[float], share: float) -> None:
    """Within 1 % of the exact ones."""
    quantiles = Quantiles()
    for value in values:
        quantiles.add(value)
    exact = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    assert quantiles.quantile(share) == pytest.approx(exact, rel=0.0101)
    assert quantiles.count == len(values)


def test_no_quantiles() -> None:
    """Of nothing there is none."""
    assert Quantiles().quantile(0.5) is None


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (None, "unknown"),
        ("0", "$0.00"),
        ("1234.567", "$1,234.57"),
        ("0.5", "$0.50"),
        ("0.0123456", "$0.0123"),
        ("0.00000375", "$0.00000375"),
    ],
)
def test_costs(usd: str | None, text: str) -> None:
    """To the cent, or to three digits when there are few; unknown is not zero."""
    assert format_cost(None if usd is None else Decimal(usd)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0.0042, "4 ms"), (1.26, "1.3 s"), (59.9, "59.9 s"), (61, "1 min 01 s"), (7_265, "2 h 01 min")],
)
def test_durations(seconds: float | None, text: str) -> None:
    """As people say them."""
    assert format_seconds(seconds) == text


def test_printable() -> None:
    """Controls go, text and line ends stay."""
    assert printable("a\x00b\x1b[0m\r\n\tč\x9f🐎\x7f") == "ab[0m\n\tč🐎"


@pytest.mark.parametrize("text", ["user:key:1", "a[bold]b", "out[/x].jsonl"])
def test_shown_as_it_is(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Names with brackets and colons stand in tables as they are: they are no markup, and end no command."""
    show(facts_table(text, [("output", text)]))
    assert capfd.readouterr().out == f"{text}\noutput  {text}\n"


def test_table_of_controls(capfd: pytest.CaptureFixture[str]) -> None:
    """Codes and names of a server do not steer the terminal from a table either."""
    show(facts_table("Batch", [("failed", "1 (1 × \x1b[2Jbad)")]))
    assert capfd.readouterr().out == "Batch\nfailed  1 (1 × [2Jbad)\n"


def test_addresses() -> None:
    """A host, in brackets where it has colons, and a port."""
    assert parse_address("localhost:0") == ("localhost", 0)
    assert parse_address("[::1]:8080") == ("::1", 8080)
    for text in ("", ":80", "localhost", "localhost:", "localhost:x", "localhost:65536", "localhost:-1", "localhost:²"):
        with pytest.raises(CliError):
            parse_address(text)


def test_faults() -> None:
    """Names with shares."""
    assert parse_faults(["502=0.5", "hang=1e-3"]) == {"502": 0.5, "hang": 0.001}
    with pytest.raises(CliError):
        parse_faults(["502=often"])


def test_prompts_follow_from_the_seed() -> None:
    """The same seed makes the same requests, another one others, and no two are alike."""
    first, again, other = ([encode_json(r) for r in make_requests(400, seed)] for seed in (1, 1, 2))
    assert first == again != other
    messages = [encode_json(r.messages) for r in make_requests(400, 1)]
    assert len(set(messages)) == 400


def test_failures(capfd: pytest.CaptureFixture[str]) -> None:
    """Each kind has its exit code and one line; a bug has neither."""
    limited = RateLimitError("slow\ndown", status=429, retry_after_s=7)
    limited.attempts, limited.maybe_billed = 3, True
    cases = [
        (CliError("no", code=1), 1, "no"),
        (ConfigError("bad"), 2, "bad"),
        (limited, 1, "429: slow down (asked 3 times; the server asks to wait 7 s; it may have been billed)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ProviderError("cut", status=200, code="server_error"), 1, "server_error: cut"),
        # What a server writes does not steer the terminal.
        (ProviderError("\x1b[2J\x9b1mcut", status=502), 1, "502: [2J1mcut"),
    ]
    for error, code, line in cases:
        assert report_failure(error) == code
        assert capfd.readouterr().err == f"gorouter-trio: {line}\n"
    assert report_failure(ValueError("a bug")) is None
    assert describe_error(ConnectError("no route")) == "no route"


def test_failure_in_a_group() -> None:
    """The error counts, not the cancels around it, however deep it is."""
    error = CliError("no")
    group = BaseExceptionGroup("", [BaseExceptionGroup("", [_cancelled()]), BaseExceptionGroup("", [error])])
    assert find_failure(group) is error
    only_cancels = BaseExceptionGroup("", [_cancelled()])
    assert find_failure(only_cancels) is only_cancels


def _cancelled() -> BaseException:
    caught: list[BaseException] = []

    async def cancel() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as exc:
                caught.append(exc)
                raise

    trio.run(cancel)
    return caught[0]


def test_redaction(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """The key goes wherever it stands; without a key, nothing does."""
    key = f"sk-or-v1-{rng.getrandbits(64):x}"
    monkeypatch.setenv("OPENROUTER_API_KEY", f" {key}\n")
    assert redact(f"Bearer {key}, {key}") == "Bearer …, …"
    monkeypatch.setenv("OPENROUTER_API_KEY", "")
    assert redact("Bearer x") == "Bearer x"


def test_counting_rows(tmp_path: Path) -> None:
    """Lines that are not blank; of a packed file nobody knows without unpacking it."""
    plain, packed = tmp_path / "in.jsonl", tmp_path / "in.jsonl.gz"
    plain.write_bytes(b'{"a":1}\n\n{"a":2}\n{"a":3}')
    packed.write_bytes(gzip.compress(plain.read_bytes() * 1_000))
    assert _count_lines(str(plain)) == 3
    assert _count_lines(str(packed)) is None
