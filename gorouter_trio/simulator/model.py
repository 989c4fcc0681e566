"""A simulated language model: from a request to an answer, decided by the request and the seed alone.

What is answered, in this order: a `[[say]]` directive; tool calls, when a directive or `tool_choice` asks for them;
JSON, when `response_format` does; a remark on the tools' results, when the conversation ends with them; what the
user said before, when asked for it; a sum, when the prompt is one; else prose about the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, final

from msgspec import Struct

from . import _json, _tokens
from . import _prose as prose
from ._draws import Draws
from ._recall import acknowledge, answer_from_memory
from ._schemas import make_value
from .directives import CallDirective, Directives, broken_answers, without_directives
from .requests import CALL_TOKENS, ChatRequest, JsonSchema, Message, OfferedFunction, Reading, ToolChoice

if TYPE_CHECKING:
    from .catalog import SimulatedModel, Style
    from .config import SimulatorConfig

__all__ = [
    "Answer",
    "CalledTool",
    "FinishReason",
    "Thinking",
    "Writer",
]

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

_EFFORTS: Final = {"max": 4.0, "xhigh": 3.0, "high": 2.0, "medium": 1.0, "low": 0.5, "minimal": 0.2}
_THOUGHT_TOKENS: Final = 40
_MIN_TOKENS: Final = 8
_MAX_TIMES_MEDIAN: Final = 8
_ECHOED_RESULT: Final = 300
# So that no id is longer than 40 characters, which is what OpenAI takes in a history.
_NAME_IN_ID: Final = 14


class CalledTool(Struct, frozen=True):
    """A tool call of an answer."""

    id: str
    name: str
    arguments: str


class Answer(Struct, frozen=True, kw_only=True, gc=False):
    """What a model answers, complete; how it is sent is another matter."""

    text: str
    thoughts: str
    """The reasoning; `is_thinking_hidden` says whether it may be shown."""
    is_thinking_hidden: bool
    calls: Sequence[CalledTool]
    finish_reason: FinishReason
    completion_tokens: int
    reasoning_tokens: int
    """A part of `completion_tokens`."""


class Thinking(Struct, frozen=True):
    """How much a request lets its model reason."""

    tokens: int
    is_hidden: bool


@final
class Writer:
    """Writes the answer to one request. All draws follow from the digest of its reading."""

    def __init__(
        self,
        request: ChatRequest,
        model: SimulatedModel,
        *,
        config: SimulatorConfig,
        directives: Directives,
        reading: Reading,
        times: int = 0,
    ) -> None:
        self._request = request
        self._model = model
        self._directives = directives
        self._times = times
        self._digest = reading.digest
        self._draws = Draws(reading.digest)
        self._config = config
        self._prompt = reading.prompt
        self._found_topics: list[str] | None = None

    def write(self) -> Answer:
        """The answer, cut where the request's limits and stop sequences say."""
        budget = min(self._request.limit or self._model.max_completion_tokens, self._model.max_completion_tokens)
        thinking = self._thinking()
        thoughts, reasoning_tokens = self._think(thinking.tokens, limit=budget)
        budget -= reasoning_tokens
        calls = self._calls()
        text = ""
        finish: FinishReason = "stop"
        if self._directives.refuse is not None:
            calls, tokens, finish = [], _tokens.count(self._directives.refuse), "content_filter"
        elif calls:
            calls, tokens, is_cut = _cut_calls(calls, budget)
            finish = "length" if is_cut else "tool_calls"
        else:
            text = self._stopped(self._text())
            tokens = _tokens.count(text)
            if tokens > budget:
                text, tokens, finish = "".join(_tokens.split(text)[:budget]), budget, "length"
        return Answer(
            text=text,
            thoughts=thoughts,
            is_thinking_hidden=thinking.is_hidden,
            calls=calls,
            finish_reason=finish,
            completion_tokens=tokens + reasoning_tokens,
            reasoning_tokens=reasoning_tokens,
        )

    @property
    def _topics(self) -> list[str]:
        """The words of the prompt to write about."""
        if self._found_topics is None:
            self._found_topics = prose.find_topics(without_directives(self._prompt))
        return self._found_topics

    # Reasoning.

    def _thinking(self) -> Thinking:
        request, asked = self._request, self._request.reasoning
        effort = (asked and asked.effort) or request.reasoning_effort
        if effort == "none" or (asked is not None and asked.enabled is False):
            return Thinking(0, is_hidden=True)
        if not (self._model.reasoning or asked is not None or effort or request.include_reasoning):
            return Thinking(0, is_hidden=True)
        tokens = round(_THOUGHT_TOKENS * _EFFORTS.get(effort or "medium", 1.0))
        if asked is not None and asked.max_tokens is not None:
            tokens = min(tokens, asked.max_tokens)
        hidden = request.include_reasoning is False or (asked is not None and asked.exclude is True)
        return Thinking(max(tokens, 1), is_hidden=hidden)

    def _think(self, tokens: int, *, limit: int) -> tuple[str, int]:
        """Reasoning of about *tokens* tokens, cut at the *limit*, and how many it has."""
        if not tokens:
            return "", 0
        draws = Draws(b"thoughts:" + self._digest)
        pieces = _tokens.split(prose.write_thoughts(draws, self._topics, tokens=tokens))[: min(tokens, limit)]
        return "".join(pieces), len(pieces)

    # Tool calls.

    def _calls(self) -> list[CalledTool]:
        request = self._request
        functions = request.functions
        if not functions or request.tool_choice == "none" or self._directives.say is not None:
            return []
        wanted = self._wanted_calls(functions)
        if request.parallel_tool_calls is False:
            wanted = wanted[:1]
        return [self._call(functions[wish.name], wish) for wish in wanted]

    def _wanted_calls(self, functions: dict[str, OfferedFunction]) -> list[CallDirective]:
        choice = self._request.tool_choice
        forced = choice.function.name if isinstance(choice, ToolChoice) and choice.function is not None else None
        wishes = [wish for wish in self._directives.calls if wish.name in functions]
        if wishes:
            turn = _rounds(self._request.conversation) + 1
            wishes = [wish for wish in wishes if wish.round == turn]
        if forced is not None:
            return [wish for wish in wishes if wish.name == forced] or [CallDirective(forced, None)]
        if choice == "required" and not wishes:
            return [CallDirective(self._draws.choice(list(functions)), None)]
        return wishes

    def _call(self, function: OfferedFunction, wish: CallDirective) -> CalledTool:
        arguments = wish.arguments
        if arguments is None:
            schema = _json.decode_any(bytes(function.parameters))
            made = make_value(schema, self._draws, words=self._topics)
            arguments = _json.encode(made if isinstance(made, dict) else {}).decode("utf-8")
        call_id = wish.id or self._call_id(function.name)
        return CalledTool(call_id, function.name, _spaced(arguments, self._model.style))

    def _call_id(self, name: str) -> str:
        match self._model.style:
            case "anthropic":
                return f"toolu_01{self._draws.alnum(22)}"
            case "google":
                return f"tool_{name[:_NAME_IN_ID]}_{self._draws.alnum(20)}"
            case _:
                return f"call_{self._draws.alnum(24)}"

    # Content.

    def _text(self) -> str:
        request, directives = self._request, self._directives
        if directives.say is not None:
            return directives.say
        form = request.response_format
        if form is not None and form.type in {"json_object", "json_schema"}:
            return self._perhaps_broken(self._json_text(form.json_schema))
        if request.conversation[-1].role == "tool":
            return _remark_on_results(request.conversation)
        if directives.tokens is not None:
            return prose.write_exactly(self._draws, self._topics, tokens=directives.tokens)
        return answer_from_memory(request.conversation) or prose.write_sum(self._draws, self._prompt) or self._prose()

    def _prose(self) -> str:
        if prose.asks_briefly(self._prompt):
            tokens = 0
        else:
            median = self._config.reply_tokens
            drawn = self._draws.log_normal(median=median, spread=self._config.reply_spread)
            tokens = max(_MIN_TOKENS, min(round(drawn), _MAX_TIMES_MEDIAN * median))
        known = acknowledge(self._prompt)
        if known is not None and tokens == 0:
            return known
        text = prose.write_prose(self._draws, self._topics, tokens=tokens)
        return f"{known} {text}" if known is not None else text

    def _json_text(self, form: JsonSchema | None) -> str:
        draws, topics = self._draws, self._topics
        schema = _json.decode_any(bytes(form.schema)) if form is not None else None
        if schema is not None:
            return _json.encode(make_value(schema, draws, words=topics)).decode("utf-8")
        made = {
            "topic": draws.choice(topics),
            "summary": prose.write_prose(draws, topics, tokens=0),
            "keywords": list(topics[:4]),
            "confidence_percent": draws.between(50, 99),
            "final": draws.chance(0.5),
        }
        return _json.encode(made).decode("utf-8")

    def _perhaps_broken(self, text: str) -> str:
        """*text*, or, if the user wants that of this answer, what is no JSON any more."""
        if not self._config.directives:
            return text
        answered = self._times
        for message in reversed(self._request.conversation):
            if message.role == "assistant":
                answered += 1
            elif message.role == "user" and (wanted := broken_answers(message.text)):
                return text[: max(1, len(text) * 2 // 3)].rstrip("}] ") + "," if answered < wanted else text
        return text

    def _stopped(self, text: str) -> str:
        """*text* up to the first stop sequence."""
        for stop in self._request.stops:
            if stop:
                text = text.partition(stop)[0]
        return text


def _rounds(conversation: Sequence[Message]) -> int:
    """How many rounds of tools the assistant has had since the user spoke."""
    rounds = 0
    for message in reversed(conversation):
        if message.role == "user":
            break
        rounds += message.role == "assistant"
    return rounds


def _spaced(arguments: str, style: Style) -> str:
    """Arguments as a provider's model spaces them; text that is not JSON stays as it is."""
    if style != "anthropic":
        return arguments
    try:
        return _json.with_spaces(arguments)
    except ValueError:
        return arguments


def _cut_calls(calls: Sequence[CalledTool], budget: int) -> tuple[list[CalledTool], int, bool]:
    """The calls that fit into *budget* tokens, what they cost, and whether they were cut."""
    kept: list[CalledTool] = []
    spent = 0
    for call in calls:
        pieces = _tokens.split(call.arguments)
        room = budget - spent - CALL_TOKENS
        if room < len(pieces):
            kept.append(CalledTool(call.id, call.name, "".join(pieces[: max(room, 0)])))
            return kept, budget, True
        kept.append(call)
        spent += CALL_TOKENS + len(pieces)
    return kept, spent, False


def _remark_on_results(conversation: Sequence[Message]) -> str:
    names = {
        call.id: call.function.name for m in conversation for call in m.tool_calls or () if call.function is not None
    }
    results: list[str] = []
    for message in reversed(conversation):
        if message.role != "tool":
            break
        name = names.get(message.tool_call_id) or "the tool"
        results.append(f"According to {name}: {message.text[:_ECHOED_RESULT]}")
    return "\n".join(reversed(results))
