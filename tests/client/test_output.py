"""Structured output: types and schemas out, values back, asked again when an answer has another form."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from typing import Any, TypedDict

import msgspec
import pydantic
import pytest
from worlds import completion, open_world, replies

import gorouter_trio as gr


class Person(msgspec.Struct):
    """Somebody."""

    name: str
    age: int


@dataclasses.dataclass
class Place:
    name: str
    people: list[Person]


class Pair(TypedDict):
    left: int
    right: int


class Model(pydantic.BaseModel):
    name: str
    age: int = pydantic.Field(ge=0)


class Plain:
    """No type that msgspec knows."""


ADA = '{"name":"Ada","age":36}'
KINDS = [
    (Person, ADA, Person("Ada", 36)),
    (Place, f'{{"name":"Paris","people":[{ADA}]}}', Place("Paris", [Person("Ada", 36)])),
    (Pair, '{"left":1,"right":2}', {"left": 1, "right": 2}),
    (Model, ADA, Model(name="Ada", age=36)),
    (list[int], '{"value":[1,2]}', [1, 2]),
    (dict, '{"anything":[1]}', {"anything": [1]}),
]


@pytest.mark.parametrize(("kind", "answer", "value"), KINDS)
async def test_a_type(kind, answer, value, autojump_clock):
    """Every kind of type gives a schema to the request and a value from the answer."""
    async with open_world(answer=replies(completion(answer))) as world:
        result = await world.client.chat("Who?", response_type=kind)
        (sent,) = world.sent
    assert result.value == value
    assert result.text == answer
    form = sent.body["response_format"]
    if kind is dict:
        assert form == {"type": "json_object"}
    else:
        assert form["type"] == "json_schema"
        assert form["json_schema"]["strict"] is True
        assert form["json_schema"]["schema"]["additionalProperties"] is False


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}, "required": ["n"]}


@pytest.mark.parametrize("schema", [SCHEMA, {"name": "count", "schema": SCHEMA}])
async def test_a_schema(schema, autojump_clock):
    """A raw schema is sent in its strict form, and answers are checked against it as it was given."""
    async with open_world(answer=replies(completion('{"n":1}'), completion('{"n":3}'))) as world:
        result = await world.client.chat("How many?", response_schema=schema)
        sent = world.sent
    assert result.value == {"n": 3}
    assert "minimum" in sent[1].messages[-1]["content"] or "less than" in sent[1].messages[-1]["content"]
    form = sent[0].body["response_format"]["json_schema"]
    assert form["name"] == schema.get("name", "answer")
    assert form["schema"]["additionalProperties"] is False


async def test_asked_again_with_what_is_wrong(autojump_clock):
    """A wrong answer goes back with the reason, and what it cost counts; fences are not held against an answer."""
    wrong, fenced = completion('{"name":"Ada"}'), completion(f"```json\n{ADA}\n```")
    async with open_world(answer=replies(wrong, fenced)) as world:
        result = await world.client.chat("Who?", response_type=Person)
        sent = world.sent
    assert result.value == Person("Ada", 36)
    assert [message["role"] for message in sent[1].messages] == ["user", "assistant", "user"]
    assert sent[1].contents[1] == '{"name":"Ada"}'
    assert "age" in str(sent[1].contents[2])
    assert len(result.rounds) == 1
    assert result.call.cost is not None
    assert result.cost == result.call.cost * 2
    assert result.attempts == 2


@pytest.mark.parametrize(
    ("answer", "asked", "problem"),
    [
        (completion("no JSON"), 3, "JSON"),
        (completion(""), 3, "empty"),
        (completion('{"name":"A', finish="length"), 1, "token limit"),
        (completion(None, refusal="I will not."), 1, "refused"),
    ],
)
async def test_an_answer_that_never_fits(answer, asked, problem, autojump_clock):
    """After the last time the answer is in the error; what asking again would not change is not asked again."""
    async with open_world(answer=replies(*[answer] * 9)) as world:
        policy = gr.OutputPolicy(reasks=2)
        with pytest.raises(gr.InvalidOutputError, match=problem) as caught:
            await world.client.chat("Who?", response_type=Person, output=policy)
        assert len(world.sent) == asked
        partial = caught.value.partial
        assert partial is not None
        assert len(partial.rounds) == asked - 1
        assert caught.value.attempts == asked
        lenient = msgspec.structs.replace(policy, on_invalid="none")
        result = await world.client.chat("Who?", response_type=Person, output=lenient)
    assert result.value is None
    assert problem in (result.invalid or "")


async def test_an_error_after_a_paid_round(autojump_clock):
    """When asking again fails, the first answer is in the error."""
    error = b'{"error":{"message":"no","code":400}}'
    async with open_world(answer=replies(completion("x"), (400, error))) as world:
        with pytest.raises(gr.BadRequestError) as caught:
            await world.client.chat("Who?", response_type=Person)
    assert caught.value.partial is not None
    assert caught.value.partial.text == "x"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"response_type": Person, "response_schema": SCHEMA}, "response_schema"),
        ({"response_type": Plain}, "Plain"),
        ({"response_schema": {"type": "nope"}}, "response_schema"),
        ({"response_schema": [1]}, "response_schema"),
        ({"response_schema": {"$ref": "http://127.0.0.1:9/x"}}, "response_schema"),
        ({"response_type": Person, "output": "strict"}, "output"),
        ({"response_type": Person, "response_format": {"type": "text"}}, "response_format"),
        ({"fallbacks": "a/b"}, "fallbacks"),
    ],
)
async def test_bad_forms(fields, named, autojump_clock):
    """What cannot be asked for is refused by name, before anything is sent."""
    async with open_world() as world:
        with pytest.raises((gr.ConfigError, gr.BadRequestError), match=named):
            await world.client.chat("Who?", **fields)
        assert not world.sent


async def test_fallbacks(autojump_clock):
    """A model that fails for reasons of its own gives way to the next; the account's troubles end it at once."""
    gone = b'{"error":{"message":"No endpoints found for a/b.","code":404}}'
    key = b'{"error":{"message":"User not found.","code":401}}'
    answers: list[bytes | tuple[int, bytes]] = [(404, gone), completion("Yes."), (401, key)]
    async with open_world(answer=replies(*answers), model="a/b") as world:
        result = await world.client.chat("Well?", fallbacks=["c/d", "e/f"], temperature=0)
        with pytest.raises(gr.AuthenticationError):
            await world.client.chat("Well?", fallbacks=["c/d"])
        models = [sent.body["model"] for sent in world.sent]
    assert result.text == "Yes."
    assert models == ["a/b", "c/d", "a/b"]
    assert all(sent.body.get("temperature", 0) == 0 for sent in world.sent)


async def test_middlewares_see_the_value(autojump_clock):
    """Structured output happens inside the chain: extensions see the final answer, once."""
    seen: list[object] = []

    async def look(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        await proceed()
        assert state.result is not None
        seen.append(state.result.value)

    async with open_world(answer=replies(completion("x"), completion(ADA))) as world:
        world.client.use(look)
        result = await world.client.chat("Who?", response_type=Person)
    assert seen == [Person("Ada", 36)]
    assert isinstance(result.cost, Decimal)


DEEP = '{"a":' + "[" * 300 + "]" * 300 + "}"
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


async def test_an_answer_that_is_nested_too_deeply(autojump_clock):
    """It is an answer of another form, for chats and sessions, and one row of a batch."""
    options: Any = {"response_schema": NUMBER, "output": gr.OutputPolicy(reasks=0)}
    async with open_world(answer=replies(completion(DEEP))) as world:
        session = world.client.session("s")
        for ask in (world.client.chat, session.ask):
            with pytest.raises(gr.InvalidOutputError, match="cannot be checked"):
                await ask("Well?", **options)
        rows = [{"messages": [{"role": "user", "content": "Well?"}]}] * 3
        async with world.client.batch(rows, **options) as results:
            errors = [type(row.error) async for row in results]
        assert errors == [gr.InvalidOutputError] * 3
        world.api.answer = replies(completion('{"a":1}'))
        assert (await session.ask("Well?", **options)).value == {"a": 1}


@pytest.mark.parametrize("own", [{"type": "text"}, {"type": "json_object"}, None], ids=str)
@pytest.mark.parametrize("how", ["ask", "stream"])
async def test_a_format_in_the_place_of_the_form_of_the_session(how, own, autojump_clock):
    """What a turn asks for in the words of the API holds for it: its answer is no value of the session's form."""
    async with open_world(answer=replies(completion("Hello."))) as world:
        session = world.client.session("s", response_schema=SCHEMA)
        if how == "ask":
            result = await session.ask("Well?", response_format=own)
        else:
            async with session.stream("Well?", response_format=own) as stream:
                result = await stream.collect()
    assert (result.text, result.value) == ("Hello.", None)
    assert [sent.body["response_format"] for sent in world.sent] == [own]


@pytest.mark.parametrize("form", [{"response_type": Person}, {"response_schema": NUMBER}, {"response_type": dict}])
async def test_a_policy_for_the_form_of_the_session(form, autojump_clock):
    """The policy of a turn holds for the form that the session was opened with, for that turn alone."""
    async with open_world(answer=replies(completion("[]"))) as world:
        session = world.client.session("s", **form)
        result = await session.ask("Well?", output=gr.OutputPolicy(reasks=0, strict_schema=False, on_invalid="none"))
        assert (result.value, len(world.sent)) == (None, 1)
        assert result.invalid
        loose = world.sent[0].body["response_format"]
        with pytest.raises(gr.InvalidOutputError):
            await session.ask("Well?")
        assert len(world.sent) == 3
        strict = world.sent[2].body["response_format"]
        if form != {"response_type": dict}:
            assert (loose["json_schema"]["strict"], strict["json_schema"]["strict"]) == (False, True)


@pytest.mark.parametrize("form", [{}, {"response_type": Person}, {"response_schema": NUMBER}])
async def test_no_policy(form, autojump_clock):
    """What is no policy is a setting that is wrong, whatever it is given with."""
    no_policy: Any = {"output": {"reasks": 2}}
    settings: Any = {"response_type": Person}
    async with open_world() as world:
        session = world.client.session("s", **settings)
        for ask in (world.client.chat, session.ask):
            with pytest.raises(gr.ConfigError, match="OutputPolicy"):
                await ask("Well?", **no_policy, **form)
