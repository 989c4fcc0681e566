"""The wire forms, byte for byte against files of our own, and in shape against captured replies where there are any.

A form that changes on purpose is written anew with `GOROUTER_UPDATE_GOLDEN=1`; the difference is then for review.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gorouter_trio.simulator import forms
from gorouter_trio.simulator._extras import Extras, add_to_ending, add_to_events, add_to_whole
from gorouter_trio.simulator._jobs import JOBS
from gorouter_trio.simulator._listing import Listing, read_listing
from gorouter_trio.simulator._reshape import reshape_text
from gorouter_trio.simulator.catalog import EMBEDDING_MODELS, MODELS, SimulatedModel
from gorouter_trio.simulator.faults import FAULTS, ErrorReply, FaultContext, bad_request, plain
from gorouter_trio.simulator.forms import Event, Face, Generation, StreamForm
from gorouter_trio.simulator.ledger import Charge, generation_body
from gorouter_trio.simulator.model import Answer, CalledTool

if TYPE_CHECKING:
    from gorouter_trio.simulator.model import FinishReason

GOLDEN = Path(__file__).parent / "golden"
CATALOG = {model.id: model for model in MODELS}

CALLS = (
    CalledTool("call_Vw1kQm82ZpLs", "tide_at", '{"port":"Aber","day":"2026-11-23"}'),
    CalledTool("call_Xx2kQm82ZpLs", "weather", "{}"),
)


def make_generation(
    model: str,
    *,
    text: str = "",
    thoughts: str = "",
    hidden: bool = False,
    calls: tuple[CalledTool, ...] = (),
    finish: FinishReason = "stop",
) -> Generation:
    """A generation with fixed ids and counts."""
    answer = Answer(
        text=text,
        thoughts=thoughts,
        is_thinking_hidden=hidden,
        calls=calls,
        finish_reason=finish,
        completion_tokens=20,
        reasoning_tokens=4 if thoughts else 0,
    )
    spec = CATALOG[model]
    return Generation(
        id="gen-1795300001-Kq3VtR8mZx1LwPd7NyB2",
        created=1_795_300_001,
        model=spec,
        face=Face(spec),
        answer=answer,
        prompt_tokens=14,
    )


def whole_stream(generation: Generation) -> bytes:
    """A stream from its first delta to its end mark."""
    form = StreamForm(generation)
    return b"".join(event.data for event in form.events()) + form.ending()


TEXT = 'The harbour opens at 06:00 – bring the "blue" permit.\n'
MINI, SONNET = "openai/gpt-4o-mini", "anthropic/claude-sonnet-4.5"
GENERATIONS = {
    "openai-text": make_generation(MINI, text=TEXT),
    "openai-calls": make_generation(MINI, calls=CALLS, finish="tool_calls"),
    "openai-reasoning": make_generation("openai/o3", text=TEXT, thoughts="Two ports."),
    "anthropic-text": make_generation(SONNET, text=TEXT),
    "anthropic-reasoning-calls": make_generation(
        SONNET, thoughts="Two ports, two calls.", calls=CALLS, finish="tool_calls"
    ),
    "anthropic-length": make_generation(SONNET, text="The harb", finish="length"),
    "google-reasoning": make_generation("google/gemini-2.5-pro", text=TEXT, thoughts="Two ports."),
    "xai-reasoning-hidden": make_generation("x-ai/grok-4", text=TEXT, thoughts="Two ports.", hidden=True),
    "open-reasoning": make_generation("deepseek/deepseek-r1-0528", text=TEXT, thoughts="Two ports."),
    "free-empty": make_generation("qwen/qwen3-coder:free"),
}

CHARGE = Charge(
    generation_id="gen-1795300001-Kq3VtR8mZx1LwPd7NyB2",
    model=CATALOG[SONNET],
    created=1_795_300_001,
    streamed=True,
    cancelled=True,
    finish_reason=None,
    native_finish_reason=None,
    prompt_tokens=14,
    completion_tokens=20,
    reasoning_tokens=4,
    nanousd=342_000,
    latency_s=0.25,
    duration_s=1.5,
    ended_at_s=3.0,
    key="sk-or-v1-0",
)

EXTRAS = Extras(top_logprobs=2, cites=True, images=True, refusal="No.", has_metadata=True)


def extended_stream(generation: Generation, extras: Extras) -> bytes:
    """The same with what an answer may have besides its text."""
    form = StreamForm(generation)
    events = add_to_events(form.events(), generation, extras=extras)
    return b"".join(event.data for event in events) + add_to_ending(form.ending(), generation, extras=extras)


def text_stream(generation: Generation) -> bytes:
    """A stream of /completions."""
    form = StreamForm(generation)
    return b"".join(event.data for event in reshape_text([*form.events(), Event(form.ending(), 0)]))


def embedded(**fields: object) -> bytes:
    """A reply of /embeddings."""
    model = EMBEDDING_MODELS[0]
    body = json.dumps({"model": model.id, "input": ["high tide", "low"], "dimensions": 5, **fields})
    job = JOBS["embeddings"](body.encode())
    assert not isinstance(job, ErrorReply)
    answer = Answer(
        text="", thoughts="", is_thinking_hidden=True, calls=(), finish_reason="stop", completion_tokens=0,
        reasoning_tokens=0,
    )  # fmt: skip
    generation = Generation(
        id="gen-1795300001-Kq3VtR8mZx1LwPd7NyB2", created=1_795_300_001, model=model, face=Face(model), answer=answer,
        prompt_tokens=11,
    )  # fmt: skip
    return job.write(generation)


def listed(query: str, catalog: tuple[SimulatedModel, ...] = MODELS) -> Listing:
    """What a query lists."""
    listing = read_listing([tuple(pair.split("=")) for pair in query.split("&")], catalog, now_s=1_795_300_001)  # type: ignore[misc]  # pairs
    assert isinstance(listing, Listing)
    return listing


def refused(query: str) -> bytes:
    """What the API says to a query that is wrong."""
    error = read_listing([tuple(query.split("="))], MODELS, now_s=0)  # type: ignore[list-item]  # a pair
    assert isinstance(error, ErrorReply)
    return error.body


FORMS: dict[str, bytes] = {
    **{f"whole-{name}.json": forms.completion(generation) for name, generation in GENERATIONS.items()},
    **{f"stream-{name}.sse": whole_stream(generation) for name, generation in GENERATIONS.items()},
    "whole-failed.json": forms.failed_completion(GENERATIONS["openai-text"]),
    "stream-failed.sse": StreamForm(GENERATIONS["openai-text"]).error(),
    "models.json": forms.models(
        [CATALOG[MINI], CATALOG["deepseek/deepseek-r1-0528:free"], CATALOG["perplexity/sonar"]],
        total=79,
        next_url="/api/v1/models?offset=3&limit=3",
    ),
    "whole-extras.json": add_to_whole(
        forms.completion(GENERATIONS["openai-text"]), GENERATIONS["openai-text"], extras=EXTRAS
    ),
    "stream-extras.sse": extended_stream(GENERATIONS["openai-text"], EXTRAS),
    "stream-speech.sse": extended_stream(make_generation(MINI, text="Low tide"), Extras(speaks=True)),
    "text-whole.json": forms.text_completion(GENERATIONS["open-reasoning"]),
    "text-stream.sse": text_stream(GENERATIONS["open-reasoning"]),
    "embeddings.json": embedded(),
    "embeddings-base64.json": embedded(encoding_format="base64"),
    "models-embeddings.json": forms.models(EMBEDDING_MODELS, total=2, next_url=None),
    "models-refused.json": refused("sort=by-colour"),
    "endpoints.json": forms.endpoints(CATALOG[SONNET], is_known=True),
    "endpoints-unknown.json": forms.endpoints(CATALOG["deepseek/deepseek-r1-0528:free"], is_known=False),
    "providers.json": forms.providers(["Amazon Bedrock", "Z.AI"]),
    "key.json": forms.key("sk-or-v1-0a1...f9e", 41_500_000_000),
    "credits.json": forms.credit_balance(50_000_000_000, 41_500_000_000),
    "generation.json": generation_body(CHARGE, created_at="2026-11-22T12:00:00.000+00:00"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_have_these_bytes(name: str) -> None:
    """Key order, number format, escapes, line ends: nothing may move unnoticed."""
    check_golden(name, FORMS[name])


def test_errors_have_these_bytes() -> None:
    """Every fault that is a status of its own: status, headers and body."""
    context = FaultContext(
        model=SONNET,
        provider="Anthropic",
        prompt="How do I " + "sail " * 40 + "home?",
        prompt_tokens=120_000,
        max_tokens=8_192,
        affordable_tokens=2_033,
        context_length=128_000,
        now_s=1_795_300_010.5,
    )
    lines = []
    for kind, fault in FAULTS.items():
        if fault.reply is not None:
            error = fault.reply(context)
            told = "".join(f"{name}: {value}\n" for name, value in error.headers)
            lines.append(f"== {kind}\n{error.status} {error.content_type}\n{told}{error.body.decode()}\n")
    bad = bad_request("x/y is not a valid model ID")
    lines.append(f"== bad model\n{bad.status}\n{bad.body.decode()}\n")
    lost = plain(404, "Not Found")
    lines.append(f"== unknown path\n{lost.status}\n{lost.body.decode()}\n")
    check_golden("errors.txt", "".join(lines).encode())


def check_golden(name: str, data: bytes) -> None:
    """Compare with the file of this name, or write it when asked to."""
    path = GOLDEN / name
    if os.environ.get("GOROUTER_UPDATE_GOLDEN") == "1":
        GOLDEN.mkdir(exist_ok=True)
        path.write_bytes(data)
    assert data == path.read_bytes()


@pytest.mark.parametrize("name", GENERATIONS)
def test_streams_carry_what_whole_replies_hold(name: str) -> None:
    """Put together, the deltas are the message; the usage is the same and comes once, just before the end mark."""
    generation = GENERATIONS[name]
    whole = json.loads(forms.completion(generation))
    lines = whole_stream(generation).decode().removesuffix("\n\n").split("\n\n")
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [("usage" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["usage"] == whole["usage"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    message = whole["choices"][0]["message"]
    assert "".join(delta["content"] or "" for delta in deltas) == (message["content"] or "")
    assert ("".join(delta.get("reasoning", "") for delta in deltas) or None) == message["reasoning"]
    assert _merged_calls(deltas) == message.get("tool_calls", [])
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert finishes == [whole["choices"][0]["finish_reason"]] * 2


def _merged_calls(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for piece in delta.get("tool_calls", ()):
            call = calls.setdefault(piece["index"], {"type": "function", "index": piece["index"]})
            function = call.setdefault("function", {"arguments": ""})
            call |= {key: piece[key] for key in ("id",) if key in piece}
            function |= {"name": piece["function"]["name"]} if "name" in piece["function"] else {}
            function["arguments"] += piece["function"]["arguments"]
    return [calls[index] for index in sorted(calls)]


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_quick_way_to_write_a_stream_gives_the_same_bytes(name: str) -> None:
    """`content` is `events` in one."""
    form = StreamForm(GENERATIONS[name])
    assert form.content() == b"".join(event.data for event in form.events())


def test_parallel_calls_interleave() -> None:
    """Fragments of several calls come in turns, as some providers send them."""
    calls = tuple(CalledTool(f"call_{n}", "f", '{"text":"' + "x" * 40 + '"}') for n in range(3))
    form = StreamForm(make_generation(MINI, calls=calls, finish="tool_calls"))
    indices = [
        json.loads(event.data[6:])["choices"][0]["delta"].get("tool_calls", [{}])[0].get("index")
        for event in form.events()
    ]
    assert indices[1:10] == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert form.events()[-1].tokens == 20


# Shape against captured replies.


def shape(value: object) -> object:
    """Key order and types, all the way down; numbers are one type, and lists tell their distinct elements."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return "number" if type(value) in (int, float) else type(value).__name__


def captured(directory: Path, name: str) -> bytes:
    """A captured body."""
    return (directory / "openrouter" / "examples" / f"{name}.body").read_bytes()


def events_of(data: bytes) -> list[Any]:
    """The JSON events of a stream."""
    lines = [line[6:] for line in data.decode().split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_whole_replies_have_the_captured_shape(reference_dir: Path) -> None:
    """A plain reply and a tool call, with the usage to its last detail."""
    for name, ours in (
        ("01-plain", forms.completion(GENERATIONS["anthropic-text"])),
        ("02-tool-call-padded", forms.completion(make_generation(MINI, calls=CALLS[:1], finish="tool_calls"))),
    ):
        assert shape(json.loads(ours)) == shape(json.loads(captured(reference_dir, name))), name


def test_streams_have_the_captured_shape(reference_dir: Path) -> None:
    """Every kind of chunk that the captured streams hold, we send in the same shape, and no other kind."""
    reasoning = make_generation(SONNET, thoughts="Two ports.", calls=CALLS, finish="tool_calls")
    for name, ours in (
        ("03-stream-text", whole_stream(GENERATIONS["openai-text"])),
        ("04-stream-parallel-tools", whole_stream(reasoning)),
    ):
        theirs = [shape(event) for event in events_of(captured(reference_dir, name))]
        # A captured chunk with two fragments in one delta is a form that we do not send.
        theirs = [s for s in theirs if str(s).count("'arguments'") <= 1]
        mine = [shape(event) for event in events_of(ours)]
        assert {str(s) for s in mine} == {str(s) for s in theirs}, name
        assert [str(s) for s in mine[-2:]] == [str(s) for s in theirs[-2:]], name


def test_errors_have_the_captured_shape(reference_dir: Path) -> None:
    """Errors in the middle of a stream, in a 200, and with a status."""
    failed = events_of(StreamForm(make_generation("deepseek/deepseek-chat-v3.1", text="x")).error())
    assert shape(failed[-1]) == shape(events_of(captured(reference_dir, "05-stream-error-mid"))[-1])
    assert captured(reference_dir, "06-error-in-200") == forms.PADDING * 3 + forms.TIMED_OUT
    context = FaultContext(
        model="m",
        provider="Together",
        prompt="p",
        prompt_tokens=1,
        max_tokens=8_192,
        affordable_tokens=2_033,
        context_length=1,
        now_s=1_795_300_010,
    )
    index = json.loads((reference_dir / "openrouter" / "examples" / "index.json").read_text())
    for name, kind in {
        "07-402-credits": "402_credits",
        "08-402-in-flight": "402_in_flight",
        "09-429-upstream": "429_upstream",
        "10-429-free-daily": "429_free_daily",
        "11-403-moderation": "403_moderation",
        "12-502-provider": "502",
        "13-401": "401",
    }.items():
        maker = FAULTS[kind].reply  # type: ignore[index]
        assert maker is not None
        error = maker(context)
        assert shape(json.loads(error.body)) == shape(json.loads(captured(reference_dir, name))), name
        assert error.status == index[name]["status"], name
        wanted = {key for key, _ in index[name]["headers"]} - {"Content-Type", "X-Generation-Id"}
        assert {key for key, _ in error.headers} == wanted, name
        if kind.startswith("402"):
            assert error.body == captured(reference_dir, name)


def test_the_services_have_the_captured_shape(reference_dir: Path) -> None:
    """Models, key and credits; where the captured key has a limit, ours has none."""
    ours = json.loads(forms.models([CATALOG[MINI]], total=1, next_url=None))
    theirs = json.loads(captured(reference_dir, "14-models"))
    ours["data"][0]["knowledge_cutoff"] = theirs["data"][0]["knowledge_cutoff"]
    assert shape(ours) == shape(theirs)
    key, captured_key = json.loads(FORMS["key.json"]), json.loads(captured(reference_dir, "15-key"))
    for field in ("limit", "limit_reset", "limit_remaining"):
        captured_key["data"][field] = None
    # What the newest schema requires, and the capture is too old to have.
    assert (key["data"].pop("budgets"), key["data"].pop("effective_budget")) == ([], None)
    assert shape(key) == shape(captured_key)
    assert FORMS["credits.json"] == captured(reference_dir, "16-credits")


def test_pages_keep_the_query() -> None:
    """The link to the next page has the filters and the order of this one."""
    listing = listed("q=gpt&sort=newest&limit=2")
    assert (len(listing.page), listing.total > 2) == (2, True)
    assert listing.next_query == "q=gpt&sort=newest&limit=2&offset=2"
    assert listed("q=gpt&sort=newest&limit=2&offset=900").page == []
    assert listed("q=gpt&unknown=x").next_query is None


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limit=0", "Number must be 1 to 1000"),
        ("limit=1001", "Number must be 1 to 1000"),
        ("offset=-1", "Expected a whole number"),
        ("context=x", "Expected a whole number"),
        ("max_price=NaN", "Expected a number"),
        ("min_age_days=x", "Expected a number"),
        ("zdr=1", "Invalid enum value"),
        ("region=mars", "Invalid enum value"),
    ],
)
def test_wrong_queries(query: str, says: str) -> None:
    """Each is refused in the form of the API's validator, with its name."""
    error = json.loads(refused(query))
    assert (error["success"], error["error"]["name"]) == (False, "ZodError")
    (issue,) = json.loads(error["error"]["message"])
    assert issue["path"] == [query.split("=")[0]]
    assert says in issue["message"]


def test_every_order_is_one() -> None:
    """Each way to sort keeps all models, and the ends of a price are those of the other way."""
    orders = [
        "most-popular", "newest", "top-weekly", "pricing-low-to-high", "pricing-high-to-low", "context-high-to-low",
        "throughput-high-to-low", "latency-low-to-high", "intelligence-high-to-low", "coding-high-to-low",
        "agentic-high-to-low", "design-arena-elo-high-to-low",
    ]  # fmt: skip
    for order in orders:
        assert {model.id for model in listed(f"sort={order}").page} == set(CATALOG), order
    cheap, dear = (listed(f"sort=pricing-{order}").page for order in ("low-to-high", "high-to-low"))
    assert cheap[0].prompt_nanousd == 0
    assert dear[-1].prompt_nanousd == 0
    for end in ("min", "max"):
        for name in ("intelligence_index", "coding_index", "agentic_index"):
            assert 0 < listed(f"{end}_{name}=40").total < len(MODELS)
        assert 0 < listed(f"{end}_age_days=800").total < len(MODELS)
    assert 0 < listed("min_tool_success_rate=0.95").total < len(MODELS)
    for query in ("category=programming", "region=eu", "zdr=true", "providers=amazon-bedrock"):
        assert 0 < listed(query).total < len(MODELS), query
