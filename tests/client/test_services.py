"""The service endpoints: what is asked, what comes back, and what becomes of every way to fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec
import pytest
import trio
from worlds import JSON, errors, open_world, replies, there

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.simulator.catalog import EMBEDDING_MODELS, MODELS


async def test_all_models_come_at_once(autojump_clock):
    """Without a limit the whole list is one request, and every price in it is a Decimal."""
    async with open_world() as world:
        models = await world.client.models()
        assert [model.id for model in models] == [model.id for model in MODELS]
        assert [sent.path for sent in world.sent] == ["/api/v1/models"]
    mini = next(model for model in models if model.id == "openai/gpt-4o-mini")
    assert there(mini.pricing).prompt == Decimal("0.00000015")
    assert (mini.is_free, mini.context_length) == (False, 128_000)
    assert there(there(mini.links).details).endswith("/openai/gpt-4o-mini/endpoints")


async def test_pages_are_followed(autojump_clock):
    """Links lead from page to page, with the filters, to the end or to the limit."""

    async def answer(request, reply):
        fields = dict(pair.split("=") for pair in request.query.split("&"))
        start = int(fields.get("offset", 0))
        rows = [{"id": f"a/{number}"} for number in range(start, min(start + 3, 8))]
        # A whole URL, of another host: its query counts, the host does not.
        following = f"https://elsewhere.example/api/v1/models?offset={start + 3}&limit=3" if start + 3 < 8 else None
        body = {"data": rows, "total_count": 8, "links": {"next": following}}
        await reply.send(200, JSON, body=msgspec.json.encode(body))

    async with open_world(answer=answer) as world:
        models = await world.client.models(q="x y")
        assert [model.id for model in models] == [f"a/{number}" for number in range(8)]
        paths = [sent.path for sent in world.sent]
        assert paths == ["/api/v1/models"] * 3
        assert len(await world.client.models(limit=4, q="x y")) == 4
        assert len(world.sent) == 5
        assert [model.id for model in await world.client.models(offset=6, q="x y")] == ["a/6", "a/7"]


async def test_a_list_that_leads_in_a_circle_ends(autojump_clock):
    """A link to a page that was read already is not followed."""
    body = msgspec.json.encode({"data": [{"id": "a/b"}], "links": {"next": "/api/v1/models?offset=1"}})
    async with open_world(answer=replies(body)) as world:
        assert len(await world.client.models()) == 2
        assert len(world.sent) == 2


FILTERS: list[tuple[dict[str, Any], Callable[[Any], object]]] = [
    ({"q": "gpt-4o"}, lambda m: "gpt-4o" in m.id),
    ({"model_authors": ["openai", "anthropic"]}, lambda m: m.id.split("/")[0] in {"openai", "anthropic"}),
    ({"context": 500_000}, lambda m: there(m.context_length) >= 500_000),
    ({"max_price": 0.5, "min_price": 0.01}, lambda m: Decimal("0.01") <= prompt_price(m) <= Decimal("0.5")),
    ({"min_output_price": 10}, lambda m: there(there(m.pricing).completion) * 10**6 >= 10),
    ({"input_modalities": "image,audio"}, lambda m: {"image", "audio"} & set(m.architecture.input_modalities)),
    ({"supported_parameters": ["reasoning", "tools"]}, lambda m: "reasoning" in m.supported_parameters),
    ({"arch": "Claude"}, lambda m: m.architecture.tokenizer == "Claude"),
    ({"distillable": True}, lambda m: m.hugging_face_id is not None),
]


def prompt_price(model):
    return there(there(model.pricing).prompt) * 10**6


@pytest.mark.parametrize(("filters", "holds"), FILTERS, ids=[min(filters) for filters, _ in FILTERS])
async def test_filters(autojump_clock, filters, holds):
    """A filter lets through what it says, and all of it."""
    async with open_world() as world:
        everything = await world.client.models()
        found = await world.client.models(**filters)
    assert 0 < len(found) < len(everything)
    assert found == [model for model in everything if holds(model)]


async def test_every_filter_is_sent(autojump_clock):
    """All filters that the API knows reach it in its words, with what is newer than this package."""
    body = msgspec.json.encode({"data": []})
    given: gr.ModelFilters = {
        "category": "programming", "supported_parameters": ["tools", "seed"], "output_modalities": "all",
        "input_modalities": ("text", "image"), "sort": "newest", "q": "a b&c", "context": 8000, "min_price": 0,
        "max_price": 1e-05, "min_output_price": 0.1, "max_output_price": 30.5, "arch": "GPT", "model_authors": "openai",
        "providers": ["Amazon Bedrock"], "distillable": False, "zdr": True, "region": "eu", "min_age_days": 0,
        "max_age_days": 90, "min_intelligence_index": 1, "max_intelligence_index": 2, "min_coding_index": 3,
        "max_coding_index": 4, "min_agentic_index": 5, "max_agentic_index": 6, "min_tool_success_rate": 0.9,
        "max_tool_success_rate": 1.0, "extra": {"newer": "yes"},
    }  # fmt: skip
    assert set(given) == set(gr.ModelFilters.__annotations__)
    queries = []

    async def answer(request, reply):
        queries.append(request.query)
        await reply.send(200, JSON, body=body)

    async with open_world(answer=answer) as world:
        assert await world.client.models(offset=5, limit=2000, **given) == []
    (query,) = queries
    assert query == (
        "category=programming&supported_parameters=tools%2Cseed&output_modalities=all&input_modalities=text%2Cimage"
        "&sort=newest&q=a%20b%26c&context=8000&min_price=0&max_price=1e-05&min_output_price=0.1&max_output_price=30.5"
        "&arch=GPT&model_authors=openai&providers=Amazon%20Bedrock&distillable=false&zdr=true&region=eu&min_age_days=0"
        "&max_age_days=90&min_intelligence_index=1&max_intelligence_index=2&min_coding_index=3&max_coding_index=4"
        "&min_agentic_index=5&max_agentic_index=6&min_tool_success_rate=0.9&max_tool_success_rate=1&newer=yes&offset=5"
        "&limit=1000"
    )


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"q": 5}, "q: must be a text"),
        ({"context": -1}, "context"),
        ({"max_price": float("nan")}, "max_price"),
        ({"max_price": 10**400}, "max_price"),
        ({"q": "\ud800"}, "q: must be a text"),
        ({"extra": {"x": "\udfff"}}, "extra: must be a text"),
        ({"zdr": "yes"}, "zdr: must be true or false"),
        ({"limit": 0}, "limit"),
        ({"offset": True}, "offset"),
        ({"providers": [1]}, "providers"),
        ({"extra": "x"}, "extra"),
    ],
)
async def test_wrong_filters_are_refused_before_sending(autojump_clock, wrong, named):
    """A filter of the wrong kind is one error that names it; an unknown one is a wrong call."""
    async with open_world() as world:
        with pytest.raises(gr.BadRequestError, match=named):
            await world.client.models(**wrong)
        with pytest.raises(TypeError, match="no filter 'colour'"):
            await world.client.models(colour="red")  # type: ignore[call-arg]  # what is tested
        assert not world.sent


async def test_half_a_surrogate_pair(autojump_clock):
    """No model and no generation is called so, and it has no UTF-8."""
    async with open_world() as world:
        with pytest.raises(gr.BadRequestError, match=r"^model: "):
            await world.client.model("a/\ud800")
        with pytest.raises(gr.BadRequestError, match=r"^generation_id: "):
            await world.client.generation("gen-\ud800")
        assert not world.sent


async def test_a_query_that_the_api_refuses(autojump_clock):
    """The API's own words for a wrong query, one clause a complaint, instead of JSON in a message."""
    async with open_world() as world:
        with pytest.raises(gr.BadRequestError, match=r"^sort: Invalid enum value. Expected most-popular \| ") as caught:
            await world.client.models(sort="by-colour")
        assert not caught.value.maybe_billed


async def test_models_sorted_and_paged_by_the_simulator(autojump_clock):
    """Pages of the simulator join to its whole list, in the order asked for."""
    async with open_world() as world:
        cheap = await world.client.models(sort="pricing-low-to-high", limit=1000)
        prices = [there(there(m.pricing).prompt) + there(there(m.pricing).completion) for m in cheap]
        assert prices == sorted(prices)
        order = "pricing-low-to-high"
        pages = [await world.client.models(sort=order, offset=at, limit=20) for at in range(0, 100, 20)]
        assert [model for page in pages for model in page] == cheap
        assert await world.client.model_count() == len(MODELS) == len(cheap)
        assert await world.client.model_count(output_modalities="all") == len(MODELS) + len(EMBEDDING_MODELS)
        assert {m.id for m in await world.client.embedding_models()} == {m.id for m in EMBEDDING_MODELS}
        assert await world.client.models_user() == await world.client.models()


async def test_one_model_and_who_offers_it(autojump_clock):
    """A model, its endpoints with prices and speeds, the endpoints that keep nothing, the providers."""
    async with open_world() as world:
        model = await world.client.model("deepseek/deepseek-r1-0528:free")
        assert model.is_free
        offers = await world.client.model_endpoints("anthropic/claude-sonnet-4.5")
        (endpoint,) = offers.endpoints
        assert (offers.id, endpoint.tag, endpoint.status) == ("anthropic/claude-sonnet-4.5", "anthropic", 0)
        assert there(endpoint.pricing).completion == Decimal("0.000015")
        assert there(endpoint.pricing).discount == 0
        assert there(endpoint.latency_last_30m).p50 == 420
        assert there(endpoint.supports_tool_choice).required
        assert 0 < len(await world.client.zdr_endpoints()) < len(MODELS)
        providers = await world.client.providers()
        assert "amazon-bedrock" in {provider.slug for provider in providers}
        with pytest.raises(gr.NotFoundError):
            await world.client.model("no/such")


@pytest.mark.parametrize("model", ["", "gpt", "a/b/c", "../models", "a/..", "a b/c", "a/b?x=1", None, 5])
async def test_what_is_no_model_is_refused_before_sending(autojump_clock, model):
    """An id that is not of the form author/slug never becomes a path."""
    async with open_world() as world:
        for ask in (world.client.model, world.client.model_endpoints):
            with pytest.raises(gr.BadRequestError, match="author/slug"):
                await ask(model)
        assert not world.sent


async def test_key_and_credits_as_they_are_on_the_wire(autojump_clock):
    """Null limits stay null, budgets and free requests are there, credits come out of their envelope."""
    budget = {
        "scope": "workspace",
        "limit_usd": 10.5,
        "spend_usd": 11,
        "remaining_usd": -0.5,
        "reset_interval": "daily",
    }
    key = {
        "label": "sk-or-v1-0a1...f9e", "limit": None, "limit_remaining": None, "usage": 41.5, "is_free_tier": False,
        "free_model_daily_requests": {"used": 2, "limit": 1000, "remaining": 998}, "budgets": [budget],
        "effective_budget": budget, "rate_limit": {"requests": -1}, "newer": {"x": 1},
    }  # fmt: skip
    async with open_world(answer=replies(msgspec.json.encode({"data": key}))) as world:
        info = await world.client.key()
    assert (info.limit, info.limit_remaining, info.usage) == (None, None, Decimal("41.5"))
    assert there(info.free_model_daily_requests).remaining == 998
    assert there(info.effective_budget).remaining_usd == Decimal("-0.5")
    assert info.budgets == [info.effective_budget]
    async with open_world(SimulatorConfig(credits_nanousd=2_500_000_000)) as world:
        account = await world.client.credits()
    assert (account.total_credits, account.remaining) == (Decimal("2.5"), Decimal("2.5"))


async def test_a_bad_key(autojump_clock):
    """The cheapest check of a key is a 401."""
    async with open_world(SimulatorConfig(api_keys=("sk-good",))) as world:
        for ask in (world.client.key, world.client.credits, world.client.models_user):
            with pytest.raises(gr.AuthenticationError, match="User not found"):
                await ask()


# --- generations ------------------------------------------------------------------------------------------------------


async def test_a_generation_is_waited_for(autojump_clock):
    """It is not found at first, and its cost is what the reply said."""
    async with open_world(SimulatorConfig(generation_lag_s=3)) as world:
        reply = await world.client.chat("hi")
        started = trio.current_time()
        found = await world.client.generation(there(reply.generation_id))
        assert 3 <= trio.current_time() - started < 6
    assert (found.id, found.total_cost, found.cancelled) == (reply.generation_id, reply.cost, False)
    assert (found.streamed, found.finish_reason) == (False, "stop")
    assert there(found.provider_responses)[0].status == 200
    assert found.native_tokens_completion == there(reply.usage).completion_tokens


async def test_a_stream_that_was_left_has_a_cost(autojump_clock):
    """The id is known from the start, so what a stream cost that was left early can be asked."""
    async with open_world(SimulatorConfig(tokens_per_s=10)) as world:
        async with world.client.stream("[[tokens 200]]") as stream:
            generation_id = there(stream.generation_id)
            await anext(stream)
        found = await world.client.generation(generation_id)
    assert found.cancelled
    assert 0 < there(found.native_tokens_completion) < 200
    assert there(found.total_cost) > 0


@pytest.mark.parametrize(("polls", "asked"), [(1, 1), (4, 4), (0, 1)])
async def test_a_generation_that_does_not_exist(autojump_clock, polls, asked):
    """The waiting has an end."""
    async with open_world() as world:
        with pytest.raises(gr.NotFoundError, match="not found") as caught:
            await world.client.generation("gen-no", polls=polls)
        assert len(world.sent) == asked
        assert not caught.value.maybe_billed
        with pytest.raises(gr.BadRequestError):
            await world.client.generation(" ")


async def test_waiting_for_a_generation_ends_with_the_total_deadline(autojump_clock):
    """No more polls than the total deadline has room for, however many are allowed."""
    async with open_world(deadlines=gr.Deadlines(total_s=20)) as world:
        started = trio.current_time()
        with pytest.raises(gr.NotFoundError):
            await world.client.generation("gen-no", polls=1000)
        assert trio.current_time() - started <= 20
        with trio.move_on_after(1) as scope:
            await world.client.generation("gen-no", polls=1000)
        assert scope.cancelled_caught


# --- embeddings, completions ------------------------------------------------------------------------------------------

EMBEDDER = "openai/text-embedding-3-small"


def nearness(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


async def test_embeddings(autojump_clock):
    """Vectors in the order of the inputs, the same as numbers and as base64, and charged as the reply says."""
    texts = ["the cat sat on the mat", "a cat sat on a mat", "prices of oil rose"]
    async with open_world() as world:
        result = await world.client.embeddings(texts, model=EMBEDDER)
        packed = await world.client.embeddings(texts, model=EMBEDDER, encoding_format="base64", dimensions=256)
        one = await world.client.embeddings(texts[2], model=EMBEDDER, user="u", routing_id="r", extra_body={"x": 1})
        body = world.sent[-1].body
        assert world.simulator.ledger.total_nanousd == round(
            sum(there(there(r.usage).cost) for r in (result, packed, one)) * 10**9
        )
        assert world.simulator.statistics().processed == 3
    assert [embedding.index for embedding in result.data] == [0, 1, 2]
    assert len(result.vectors[0]) == 256
    for plain, unpacked in zip(result.vectors, packed.vectors, strict=True):
        assert unpacked == pytest.approx(plain, abs=1e-6)
    assert one.vectors == [result.vectors[2]]
    near, far = (nearness(result.vectors[0], vector) for vector in result.vectors[1:])
    assert near > far + 0.3
    assert body == {"model": EMBEDDER, "input": texts[2], "user": "u", "session_id": "r", "x": 1}
    assert (result.model, there(result.generation_id)[:4]) == (EMBEDDER, "gen-")


async def test_embeddings_are_retried_as_chats_are(autojump_clock):
    """A refusal is tried again, and what is charged is one embedding."""
    async with open_world() as world:
        result = await world.client.embeddings("[[fault 503 x2]] sea", model=EMBEDDER)
        assert result.attempts == 3
        with pytest.raises(gr.BadRequestError, match="not a valid model ID"):
            await world.client.embeddings("sea", model="openai/gpt-4o")
        assert world.simulator.statistics().processed == 1


@pytest.mark.parametrize(
    ("inputs", "options", "named"),
    [
        ("", {}, "input"),
        ([], {}, "input"),
        (b"x", {}, "input"),
        (5, {}, "input"),
        ("x", {"dimensions": 0}, "dimensions"),
        ("x", {"encoding_format": "int8"}, "encoding_format"),
        ("x", {"encoding_format": ["float"]}, "encoding_format"),
        ("x", {"model": " "}, "model"),
        ("x", {"extra_headers": {"Host": "x"}}, "Host"),
    ],
)
async def test_wrong_embeddings_are_refused_before_sending(autojump_clock, inputs, options, named):
    """One clear error, and nothing is sent."""
    async with open_world() as world:
        with pytest.raises(gr.BadRequestError, match=named):
            await world.client.embeddings(inputs, **{"model": EMBEDDER, **options})
        with pytest.raises(TypeError, match="colour"):
            await world.client.embeddings("x", model=EMBEDDER, colour="red")  # type: ignore[call-arg]  # as above
        assert not world.sent


@pytest.mark.parametrize("text", ["not base64!", "AAA=", "AAAA"])
def test_an_embedding_that_is_no_vector(text):
    """Base64 that is broken is said to be."""
    with pytest.raises(ValueError, match="not base64 of 32-bit floats"):
        _ = gr.Embedding(embedding=text).vector


class Wrapping:
    """Changes the prompt and an option of a completion, and what comes back."""

    async def __call__(self, context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        assert context.is_completion
        assert state.messages == [{"role": "user", "content": "Once"}]
        state.messages[0]["content"] = "Once upon [[say a time]]"
        state.options["max_tokens"] = 7
        await proceed()
        assert state.result is not None
        message = gr.AssistantMessage(state.result.text.upper())
        state.result = msgspec.structs.replace(state.result, message=message)


class Adding:
    """Adds a message, as it would to a chat."""

    async def __call__(self, context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        state.messages.insert(0, {"role": "system", "content": "Be brief."})
        await proceed()


async def test_what_is_put_around_completions(autojump_clock):
    """Middlewares change a prompt and its answer; adding messages is refused by name; hooks and events see it too."""
    after: list[str] = []

    def note(_context: gr.ChatContext, state: gr.ChatState) -> None:
        assert state.result is not None
        after.append(state.result.text)

    async with open_world() as world:
        client = world.client
        client.use(wrapping := Wrapping())
        client.add_hook(gr.Hook(after=note))
        with client.events(gr.ChatFinished) as feed:
            result = await client.completions("Once")
            event = await anext(feed)
        assert (result.text, event.result.text, after) == ("A TIME", "A TIME", ["a time"])
        sent = world.sent[-1].body
        assert (sent["prompt"], sent["max_tokens"], "messages" in sent) == ("Once upon [[say a time]]", 7, False)
        client.unuse(wrapping)
        client.use(Adding())
        with pytest.raises(gr.BadRequestError, match="messages: a completion has one message"):
            await client.completions("Once")
        assert len(world.sent) == 1


async def test_observers_of_completions(autojump_clock):
    """They see a completion as a chat of one message, also one that failed; it keeps what only completions have."""
    seen: list[gr.EndedChat] = []
    async with open_world() as world:
        client = world.client
        client.observe(seen.extend)
        assert (await client.completions("Once [[say yes]]")).text == "yes"
        world.api.answer = errors(400)
        with pytest.raises(gr.BadRequestError):
            await client.completions("Once")
    answered, failed = seen
    assert answered.result is not None
    assert (answered.result.text, answered.message_count, answered.context.is_completion) == ("yes", 1, True)
    assert isinstance(failed.error, gr.BadRequestError)


async def test_completions(autojump_clock):
    """A prompt without a conversation, with the options of a chat."""
    async with open_world() as world:
        result = await world.client.completions("What is 17 * 23?", max_tokens=50, temperature=0)
        body = world.sent[0].body
        cut = await world.client.completions("Tell me everything.", max_tokens=3)
        assert world.sent[0].path == "/api/v1/completions"
        with pytest.raises(gr.BadRequestError, match="prompt"):
            await world.client.completions("")
    assert body == {"model": "openai/gpt-4o-mini", "max_tokens": 50, "temperature": 0, "prompt": "What is 17 * 23?"}
    assert (result.text, result.finish_reason) == ("17 * 23 = 391\n#### 391", "stop")
    assert (cut.finish_reason, there(cut.usage).completion_tokens) == ("length", 3)
    assert there(result.cost) > 0
    assert result.call.attempts == 1


# --- failures ---------------------------------------------------------------------------------------------------------


def asks(client):
    return {
        "models": client.models,
        "count": client.model_count,
        "model": lambda: client.model("a/b"),
        "endpoints": lambda: client.model_endpoints("a/b"),
        "zdr": client.zdr_endpoints,
        "providers": client.providers,
        "key": client.key,
        "credits": client.credits,
        "generation": lambda: client.generation("gen-1", polls=1),
        "embeddings": lambda: client.embeddings("x", model=EMBEDDER),
        "completions": lambda: client.completions("x"),
    }


ODD = [
    (200, b'{"error":{"message":"no","code":403}}', gr.PermissionDeniedError),
    (200, b'\n         \n{"error":{"message":"no","code":"rate_limit_exceeded"}}', gr.RateLimitError),
    (200, b" \n ", gr.ProviderError),
    (200, b"<html><title>x</title></html>", gr.DecodeError),
    (200, b"[]", gr.DecodeError),
    (200, b'{"data":5}', gr.DecodeError),
    (200, b"\xff", gr.DecodeError),
    (200, b"[" * 100_000, gr.DecodeError),
    (400, b'{"success":false,"error":{"name":"ZodError","message":"[]"}}', gr.BadRequestError),
    (502, b"<html><title>Bad gateway</title></html>", gr.ProviderError),
    (401, b"", gr.AuthenticationError),
]


NAMES = (
    "models", "count", "model", "endpoints", "zdr", "providers", "key", "credits", "generation", "embeddings",
    "completions",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
async def test_every_odd_reply_is_a_typed_error(autojump_clock, name):
    """Whatever a service answers, it is an error of the tree, with its class; what only reads was never billed."""
    no_retries = gr.RetryPolicy(max_retries=0)
    for status, body, kind in ODD:

        async def answer(_request, reply, *, status=status, body=body):
            await reply.send(status, JSON, body=body)

        async with open_world(answer=answer, retry=no_retries) as world:
            with pytest.raises(gr.GorouterError) as caught:
                await asks(world.client)[name]()
            assert type(caught.value) is kind, (status, body[:40])
            if name not in {"embeddings", "completions"}:
                assert not caught.value.maybe_billed


async def test_reading_is_tried_again_when_its_reply_is_lost(autojump_clock):
    """An ambiguous failure of something that changes nothing is retried like any other."""
    left = [1, 2, 3]

    async def lossy(_request, reply):
        if left:
            left.pop()
            reply.abort()
        else:
            await reply.send(200, JSON, body=b'{"data":{"total_credits":5,"total_usage":1}}')

    async with open_world(answer=lossy) as world:
        assert (await world.client.credits()).remaining == 4
        assert len(world.sent) == 4


async def test_paths_are_not_kept(autojump_clock):
    """A head is not cached for each of a million generations."""
    async with open_world() as world:
        for number in range(20):
            with pytest.raises(gr.NotFoundError):
                await world.client.generation(f"gen-{number}", polls=1)
        assert not any(key.heads for key in world.client._runtime.pool._admission.ring)


async def test_odd_fields_cost_themselves(autojump_clock):
    """A row or a field that is not what the API promises is left out, and the rest is there."""
    rows = {"data": {"id": "a/b", "endpoints": [{"name": 5, "uptime_last_5m": "x", "status": -1.0}, 7, {"tag": "t"}]}}
    async with open_world(answer=replies(json.dumps(rows).encode())) as world:
        offers = await world.client.model_endpoints("a/b")
    assert [(row.name, row.status, row.tag) for row in offers.endpoints] == [(None, -1, None), (None, None, "t")]
