"""The simulator's foundations: numbers, draws, tokens, schemas, prose, memory and directives."""

from __future__ import annotations

import json
import re
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.errors import ConfigError
from gorouter_trio.simulator import SimulatorConfig, _json, _tokens
from gorouter_trio.simulator import _prose as prose
from gorouter_trio.simulator._draws import Draws
from gorouter_trio.simulator._recall import acknowledge, answer_from_memory
from gorouter_trio.simulator._schemas import make_value
from gorouter_trio.simulator.catalog import MODELS
from gorouter_trio.simulator.directives import CallDirective, Directives, read_directives, without_directives
from gorouter_trio.simulator.requests import Message

# Numbers as JavaScript writes them.


@pytest.mark.parametrize(
    ("nanousd", "written"),
    [
        (0, "0"),
        (1, "1e-9"),
        (10, "1e-8"),
        (570, "5.7e-7"),
        (123, "1.23e-7"),
        (999, "9.99e-7"),
        (1_000, "0.000001"),
        (5_700, "0.0000057"),
        (273_000, "0.000273"),
        (1_000_000_000, "1"),
        (19_750_000_000, "19.75"),
        (41_500_000_000, "41.5"),
        (123_456_789_012, "123.456789012"),
        (-1_500_000_000, "-1.5"),
    ],
)
def test_dollars_are_written_as_ecmascript_does(nanousd: int, written: str) -> None:
    """Shortest form, no trailing zeros, exponents only below a millionth and without padding."""
    assert _json.dollars(nanousd) == written


@given(st.integers(0, 10**15))
def test_dollars_are_exact(nanousd: int) -> None:
    """Reading an amount back as a decimal gives the same nano-dollars; it is a JSON number."""
    written = _json.dollars(nanousd)
    assert json.loads(written, parse_float=lambda t: t, parse_int=lambda t: t) == written
    assert Decimal(written) * 10**9 == nanousd
    assert float(written) == nanousd / 10**9


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"), (-0.0, "0"), (1.0, "1"), (-2.5, "-2.5"), (0.1, "0.1"), (1e-06, "0.000001"), (1e-07, "1e-7"),
        (1.5e-09, "1.5e-9"), (123456789.125, "123456789.125"), (1e20, "100000000000000000000"), (1e21, "1e+21"),
        (1.25e22, "1.25e+22"), (5e-324, "5e-324"), (99.98, "99.98"), (100.0, "100"), (0.00001234, "0.00001234"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_ecmascript_does(value: float, written: str) -> None:
    """Known answers of Number::toString."""
    assert _json.number(value) == written


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_back_the_same(value: float) -> None:
    """Whatever the number, reading gives it again, and there is no `.0` and no padded exponent."""
    written = _json.number(value)
    assert float(written) == value
    assert not re.search(r"\.0?$|\.\d*0(e|$)|e[+-]0|^\+", written)


def test_prices_are_plain_decimals_in_strings() -> None:
    """The model list never has exponents."""
    assert [_json.decimal_string(n) for n in (0, 5, 75, 150, 15_000)] == [
        "0",
        "0.000000005",
        "0.000000075",
        "0.00000015",
        "0.000015",
    ]


def test_strings_are_escaped_as_json_stringify_does() -> None:
    """Raw UTF-8, short escapes where there are any, \\u00xx for other control characters, slashes bare."""
    assert _json.quote('a"b\\c/\b\f\n\r\t\x00\x1fé – 🧭\x7f\u2028') == (
        '"a\\"b\\\\c/\\b\\f\\n\\r\\t\\u0000\\u001fé – 🧭\x7f\u2028"'
    )


# Draws.


def test_draws_are_the_same_everywhere() -> None:
    """Pinned values: a change would change every simulation that anybody has recorded."""
    draws = Draws(b"pinned")
    assert [draws.integer() for _ in range(4)] == [35567, 38517, 53718, 982]
    assert draws.alnum(20) == "iUE4lxnLZY5TdhVbsGzd"
    assert draws.unit() == pytest.approx(0.20086190709844232)
    assert draws.log_normal(median=100, spread=0.5) == pytest.approx(72.23105356909059)


@given(st.binary(max_size=8), st.integers(1, 1_000))
def test_draws_stay_in_their_ranges(key: bytes, limit: int) -> None:
    """Bounds hold over many blocks of the stream, and two streams of one key agree."""
    one, other = Draws(key), Draws(key)
    for _ in range(200):
        assert 0 <= one.below(limit) < limit
        assert 5 <= one.between(5, 5 + limit) <= 5 + limit
        assert 0 <= one.unit() < 1
        assert one.log_normal(median=50, spread=0.7) > 0
    for _ in range(200):
        other.below(limit)
        other.between(5, 5 + limit)
        other.unit()
        other.log_normal(median=50, spread=0.7)
    name = one.alnum(20)
    assert name == other.alnum(20)
    assert re.fullmatch("[A-Za-z0-9]{20}", name)


def test_lengths_are_log_normal() -> None:
    """Half of the drawn lengths are below the median, and about 68 % within one spread of it."""
    draws = Draws(b"lengths")
    drawn = [draws.log_normal(median=100, spread=0.5) for _ in range(4_000)]
    assert sum(length < 100 for length in drawn) / 4_000 == pytest.approx(0.5, abs=0.03)
    assert sum(60.65 < length < 164.87 for length in drawn) / 4_000 == pytest.approx(0.683, abs=0.03)
    assert Draws(b"x").log_normal(median=100, spread=0) == 100


# Tokens.


@given(st.text(alphabet=st.sampled_from("abcdefgé–🧭 \n\t.,7"), max_size=80))
def test_tokens_join_to_the_text_and_are_counted(text: str) -> None:
    """Splitting loses nothing, no token is empty, and counting agrees with splitting."""
    pieces = _tokens.split(text)
    assert "".join(pieces) == text
    assert _tokens.count(text) == len(pieces)
    assert all(pieces)


def test_prose_has_about_four_characters_a_token() -> None:
    """The stated rate of the tokenizer."""
    text = "".join(prose.write_prose(Draws(b"%d" % n), ["tide", "harbour"], tokens=100) for n in range(50))
    assert len(text) / _tokens.count(text) == pytest.approx(4.5, abs=0.4)


# Schemas.

SCHEMAS: list[dict[str, object]] = [
    {"type": "object", "properties": {"port": {"type": "string"}, "day": {"type": "string", "format": "date"}}},
    {"type": "object", "required": ["a", "b"], "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 9}}},
    {"type": "object", "properties": {"n": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}}},
    {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 30}}},
    {"type": "object", "properties": {"n": {"type": "number", "multipleOf": 0.25, "minimum": -1, "maximum": 1}}},
    {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 2, "maxItems": 5},
    {"type": "array", "items": {"type": "string"}, "minItems": 4, "uniqueItems": True},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 0},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "boolean"}], "items": False, "maxItems": 2},
    {"type": ["string", "null"], "minLength": 30, "maxLength": 40},
    {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"k": {"const": "v"}}, "required": ["k"]}]},
    {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 2}]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"properties": {"b": {"$ref": "#/$defs/name"}}, "required": ["b"]},
        ],
        "$defs": {"name": {"type": "string", "minLength": 1}},
    },
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
                    "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["value", "children", "left"],
                "additionalProperties": False,
            }
        },
    },
    {"type": "object", "properties": {"when": {"format": "date-time", "type": "string"}, "who": {"format": "email"}}},
    {},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_made_values_satisfy_their_schema(schema: dict[str, object]) -> None:
    """Judged by another implementation, over many draws."""
    jsonschema = pytest.importorskip("jsonschema")
    for number in range(60):
        value = make_value(schema, Draws(b"%d" % number), words=["tide", "harbour"])
        jsonschema.validate(json.loads(json.dumps(value)), schema)


def test_made_values_vary_and_repeat() -> None:
    """Other draws give other values, the same draws the same."""
    schema = SCHEMAS[1]
    made = [make_value(schema, Draws(b"%d" % n), words=["w"]) for n in range(40)]
    assert made == [make_value(schema, Draws(b"%d" % n), words=["w"]) for n in range(40)]
    assert len({json.dumps(value) for value in made}) > 3


@pytest.mark.parametrize(
    "schema", [{"$ref": "#/missing"}, {"$ref": "#"}, {"type": "nonsense"}, {"enum": []}, {"properties": 3}, 17, None]
)
def test_broken_schemas_are_survived(schema: object) -> None:
    """A schema that makes no sense gives some value, in finite time."""
    msgspec.json.encode(make_value(schema, Draws(b"x"), words=()))


# Prose.


def test_prose_takes_up_the_words_of_the_prompt() -> None:
    """A reply is about its prompt, and readable: sentences with capitals and full stops."""
    topics = prose.find_topics("Please explain how lighthouses guide the fishermen through the narrow strait")
    assert topics == ["explain", "lighthouses", "guide", "fishermen", "narrow", "strait"]
    text = prose.write_prose(Draws(b"p"), topics, tokens=120)
    assert sum(topic in text for topic in topics) >= 2
    for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", text):
        assert sentence[0].isupper() or sentence[0] in "“🧭"
    assert "%s" not in text


def test_prose_holds_characters_of_two_three_and_four_bytes() -> None:
    """So that streams exercise splits inside characters."""
    texts = "".join(prose.write_prose(Draws(b"%d" % n), ["tide"], tokens=200) for n in range(60))
    assert {len(character.encode()) for character in texts} == {1, 2, 3, 4}


@given(st.integers(1, 400))
def test_exact_prose_has_exactly_its_tokens(tokens: int) -> None:
    """What `[[tokens N]]` promises."""
    assert _tokens.count(prose.write_exactly(Draws(b"e"), ["tide"], tokens=tokens)) == tokens


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("What is 17 * 23?", "17 * 23 = 391\n#### 391"),
        ("12 + 30 =", "12 + 30 = 42\n#### 42"),
        ("compute 7 / 2?", "7 / 2 = 3.5\n#### 3.5"),
        ("what is 9 ÷ 3?", "9 ÷ 3 = 3\n#### 3"),
        ("What is 1 / 0?", "Dividing by zero has no answer."),
        ("What is 5 – 8?", "5 – 8 = -3\n#### -3"),
    ],
)
def test_plain_sums_are_right(prompt: str, answer: str) -> None:
    """An expression in a short prompt is worked out."""
    assert prose.write_sum(Draws(b"s"), prompt) == answer


def test_word_problems_are_worked_with_their_own_numbers() -> None:
    """Each step is right in itself, the numbers are those of the problem, and the last line is the answer."""
    problem = "A ship carries 1,250 crates and unloads 16 at each of 4 ports. How many crates are left?"
    for n in range(30):
        lines = (prose.write_sum(Draws(b"%d" % n), problem) or "").splitlines()
        numbers = [[int(number) for number in re.findall(r"-?\d+", line)] for line in lines]
        assert numbers[0] == [1250]
        value = 1250
        for used in numbers[1:-1]:
            assert value in used
            value = used[-1]
        assert lines[-1] == f"#### {value}"
    assert prose.write_sum(Draws(b"x"), "Nora has two boats and three oars. How many things is that?") is not None


@pytest.mark.parametrize("prompt", ["Tell me about 1984.", "The year 1984 was 40 years ago.", "", "How many?"])
def test_other_prompts_are_no_sums(prompt: str) -> None:
    """Numbers alone, or a question alone, make no problem."""
    assert prose.write_sum(Draws(b"x"), prompt) is None


@pytest.mark.parametrize(
    ("prompt", "brief"),
    [
        ("Reply in one short sentence.", True),
        ("Stream a short answer", True),
        ("Give me a single word", True),
        ("Write an essay.", False),
        ("What is the longest word?", False),
    ],
)
def test_briefness_is_heard(prompt: str, brief: bool) -> None:
    """Prompts that ask for a sentence get one."""
    assert prose.asks_briefly(prompt) is brief


# Memory.


def _said(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[n % 2], text) for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("conversation", "answer"),
    [
        (_said("My name is Ada.", "Hello", "What is my name?"), "Your name is Ada."),
        (_said("Call me Ishmael", "ok", "who am I?"), "Your name is Ishmael."),
        (
            _said("My name is Ada. My name is Grace", "ok", "what's my name again?"),
            "Your name is Grace.",
        ),
        (
            _said("my favourite colour is dark green, really", "ok", "What is my favourite colour?"),
            "Your favourite colour is dark green.",
        ),
        (_said("What is my name?"), "You have not told me your name yet."),
        (_said("Tides?", "ok", "What did I say?"), "You said: “Tides?”"),
        (_said("One", "ok", "Two", "ok", "What was my first question?"), "You said: “One”"),
        (_said("What did I just say?"), "This is the first thing you have said."),
        (_said("Hello!"), "Hello! How can I help?"),
        (_said("My name is Ada", "ok", "hi"), "Hello, Ada! How can I help?"),
        (_said("Tell me about tides."), None),
        (_said("My name is Ada."), None),
    ],
)
def test_the_conversation_is_remembered(conversation: list[Message], answer: str | None) -> None:
    """Questions about what the user said are answered from it; others are left to the prose."""
    assert answer_from_memory(conversation) == answer


def test_facts_are_acknowledged() -> None:
    """Telling something gets a reaction; asking does not."""
    assert acknowledge("My name is Ada.") == "Nice to meet you, Ada!"
    assert acknowledge("my cat is called Tom. My dog is old") == (
        "I will remember that your cat is called Tom; your dog is old."
    )
    assert acknowledge("Is my name Ada?") is None
    assert acknowledge("Tell me about tides") is None


# Directives.


def test_directives_are_read() -> None:
    """Every verb, with and without its options, among other text."""
    assert read_directives("a [[say hi [x] there]] b") == Directives(say="hi [x] there")
    assert read_directives("[[tokens 200]]") == Directives(tokens=200)
    assert read_directives('[[call f]] [[call g {"a": [1]}]]') == Directives(
        calls=(CallDirective("f", None), CallDirective("g", '{"a": [1]}'))
    )
    assert read_directives("[[fault 429_upstream x2]]") == Directives(fault="429_upstream", fault_times=2)
    assert read_directives("[[fault hang]]") == Directives(fault="hang")
    assert without_directives("about [[tokens 5]] tides") == "about   tides"


@pytest.mark.parametrize("text", ["[[tokens many]]", "[[fault 999]]", "[[dance now]]", "[[say]]", "[tokens 5]", "[["])
def test_what_is_no_directive_is_text(text: str) -> None:
    """Unknown or malformed brackets change nothing."""
    assert read_directives(text) == Directives()


# Settings.


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"latency_s": -1.0}, "latency_s"),
        ({"latency_s": float("inf")}, "latency_s"),
        ({"first_token_s": float("nan")}, "first_token_s"),
        ({"jitter": 1.5}, "jitter"),
        ({"reply_tokens": 0}, "reply_tokens"),
        ({"fault_rates": {"999": 0.1}}, "999"),
        ({"fault_rates": {"502": 1.5}}, "fault_rates"),
        ({"fault_rates": {"502": 0.6, "503": 0.6}}, "fault_rates"),
        ({"default_model": "no/such"}, "no/such"),
        ({"models": (MODELS[0], MODELS[0])}, "twice"),
    ],
)
def test_wrong_settings_are_refused_by_name(fields: dict[str, object], named: str) -> None:
    """A config that can not work says which field is to blame, when it is made."""
    with pytest.raises(ConfigError, match=named):
        SimulatorConfig(**fields)  # type: ignore[arg-type]


def test_settings_can_come_from_json_or_toml() -> None:
    """The config is plain data: msgspec converts it from what a scenario file holds."""
    made = msgspec.convert({"seed": 7, "fault_rates": {"502": 0.25}, "api_keys": ["sk-1"]}, SimulatorConfig)
    assert (made.seed, made.fault_rates, made.api_keys) == (7, {"502": 0.25}, ("sk-1",))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"fault_rates": {"nonsense": 0.25}}, SimulatorConfig)


# The catalog.


def test_the_catalog_is_plausible() -> None:
    """At least sixty models, each once, with free variants, prices that make sense and both kinds of reasoning."""
    assert len(MODELS) >= 60
    assert len({model.id for model in MODELS}) == len(MODELS)
    assert all("/" in model.id and model.provider and model.served_as.count("/") == 1 for model in MODELS)
    assert all(model.prompt_nanousd <= model.completion_nanousd for model in MODELS)
    assert all((model.completion_nanousd == 0) == model.is_free for model in MODELS)
    assert all(model.max_completion_tokens <= model.context_length for model in MODELS)
    assert 5 < sum(model.reasoning for model in MODELS) < len(MODELS)
    assert {model.style for model in MODELS} == {"openai", "anthropic", "google", "xai", "open"}
