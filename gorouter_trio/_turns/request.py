"""A turn before it is sent, and what follows its answers: values and decisions, no waiting.

A turn is what its caller sees as one: a chat, a stream, a turn of a session. It has one round for each
request to a model: the last round gives the answer; those before it called tools, or gave an answer that had
not the form that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias, cast

import msgspec
from msgspec import UNSET, Struct

from ..config import ToolLimits
from ..errors import BadRequestError, DecodeError, InvalidOutputError
from ..secret import Secret
from ..security.rules import Principal
from ..tools.registry import Tool, ToolSet
from ..tools.turn import ApprovalDecision, ApprovalRequest
from ..wire.codec import decode_json, encode_call, encode_message, join_body, join_options
from ..wire.mail import DEFAULT_SETTINGS, CallSettings, HttpCall
from ..wire.messages import AssistantMessage, ToolCall, UserMessage
from ..wire.requests import AskKeywords, ChatKeywords, JsonObject
from ..wire.result import CallRecord, ChatResult
from .output import AnswerForm, FormCache, OutputPolicy

if TYPE_CHECKING:
    from typing import Literal

    from ..wire.toolcalls import ToolCallReport

__all__ = [
    "Approve",
    "AskAgain",
    "AskTurnKeywords",
    "CallTools",
    "EncodedTurn",
    "Finish",
    "NextStep",
    "Rounds",
    "TurnEncoder",
    "TurnExtras",
    "TurnKeywords",
    "TurnRequest",
    "access_secret",
]

Approve: TypeAlias = Callable[[ApprovalRequest], Awaitable[ApprovalDecision | None]]
"""Asked before a sensitive tool runs; None leaves the question to somebody else, or the call undone."""


class AskTurnKeywords(AskKeywords, total=False):
    """The keyword arguments of `client.ask`: those of a request, and those of a turn.

    `response_schema` is a JSON schema that the answer must follow, and `output` how strictly, also where the form is
    the session's; `fallbacks` are models to ask, in order, when the one before has failed for reasons of its own.
    `tool_limits` bounds the tools among `tools` that are functions, which are run here; `approve` is asked before one
    runs that is sensitive. `access_token` says who asks, where the client has `security`.
    """

    response_schema: JsonObject
    output: OutputPolicy
    fallbacks: Sequence[str]
    tool_limits: ToolLimits
    approve: Approve
    access_token: str | Secret


class TurnKeywords(ChatKeywords, total=False):
    """The keyword arguments of a turn; see `AskTurnKeywords`."""

    response_schema: JsonObject
    output: OutputPolicy
    fallbacks: Sequence[str]
    tool_limits: ToolLimits
    approve: Approve
    access_token: str | Secret


_FORM = ("response_type", "response_schema", "output")
_EXTRAS = frozenset({*_FORM, "fallbacks", "tools", "tool_limits", "approve", "access_token"})
_CACHED_TOOLS = 256


class TurnExtras(Struct, frozen=True, kw_only=True):
    """What a turn needs besides its requests.

    The form of its answer, models to fall back on, tools that are run here with their limits and who approves of
    them, and who asks: the token before it was looked at, the principal after that.
    """

    form: AnswerForm | None = None
    fallbacks: tuple[str, ...] = ()
    tools: ToolSet | None = None
    limits: ToolLimits | None = None
    approve: Approve | None = None
    token: Secret | None = None
    principal: Principal | None = None

    @property
    def has_rounds(self) -> bool:
        """Whether one request may not be all; who asks alone changes nothing about the requests."""
        return self.form is not None or bool(self.fallbacks) or self.tools is not None


EncodedTurn: TypeAlias = tuple[bytes, CallSettings, TurnExtras | None]
"""Encoded options, what is known of them, and the extras, where there are any."""


class TurnEncoder:
    """Makes requests of keyword arguments. One for a client: what is made of types and tools is kept for the next."""

    def __init__(self) -> None:
        self._forms = FormCache()
        self._tools: dict[tuple[object, ...], ToolSet] = {}

    def encode(
        self,
        keywords: Mapping[str, object],
        *,
        beneath: CallSettings = DEFAULT_SETTINGS,
        extras: TurnExtras | None = None,
    ) -> EncodedTurn:
        """The keyword arguments of a turn; what is not given is as in `beneath` and `extras`.

        Raises as `encode_call`; `ConfigError` for a type, a schema or a tool that cannot be.
        """
        has_own_format = extras is not None and extras.form is not None and "response_format" in keywords
        if _EXTRAS.isdisjoint(keywords) and not has_own_format:
            return (*encode_call(cast("ChatKeywords", keywords), beneath=beneath), extras)
        given = dict(keywords)
        changes: dict[str, object] = {}
        self._take_form(given, changes, None if extras is None else extras.form)
        self._take_tools(given, changes)
        if "fallbacks" in given:
            changes["fallbacks"] = _fallbacks(given.pop("fallbacks"))
        changes |= _taken(given, "limits", "tool_limits", kind=ToolLimits)
        if "approve" in given:
            changes["approve"] = _callable(given.pop("approve"))
        if given.get("access_token") is not None:
            changes["token"] = access_secret(given["access_token"])
        given.pop("access_token", None)
        if changes:
            extras = msgspec.structs.replace(extras or TurnExtras(), **changes)
        return (*encode_call(cast("ChatKeywords", given), beneath=beneath), extras)

    def _take_form(self, given: dict[str, object], changes: dict[str, object], beneath: AnswerForm | None) -> None:
        """The form that is given; a policy alone is one for the form `beneath`, which stays the form.

        A format of the API's own takes the place of the form beneath: its answer is the text.
        """
        kind, schema, policy = (given.pop(name, None) for name in _FORM)
        if kind is None and schema is None and policy is not None and beneath is not None:
            kind, schema = beneath.response_type, beneath.response_schema
        form = self._forms.get(kind, schema, policy)
        if form is None:
            if beneath is not None and "response_format" in given:
                changes["form"] = None
            return
        if "response_format" in given:
            raise BadRequestError("response_format: is made from the response type; give one of them", status=400)
        given["response_format"] = form.response_format
        changes["form"] = form

    def _take_tools(self, given: dict[str, object], changes: dict[str, object]) -> None:
        """Tools that are functions are run here; definitions alone are the caller's affair."""
        tools = given.get("tools")
        if tools is None or isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
            return
        sources = tuple(tools)
        if not any(callable(source) or isinstance(source, Tool) for source in sources):
            changes["tools"] = None
            return
        chosen = self._tool_set(sources)
        given["tools"] = chosen.definitions
        changes["tools"] = chosen

    def _tool_set(self, sources: tuple[object, ...]) -> ToolSet:
        try:
            known = self._tools.get(sources)
        except TypeError:
            # Definitions as mappings have no hash.
            return ToolSet(cast("Sequence[Tool[..., object]]", sources))
        if known is None:
            known = self._tools[sources] = ToolSet(cast("Sequence[Tool[..., object]]", sources))
            if len(self._tools) > _CACHED_TOOLS:
                del self._tools[next(iter(self._tools))]
        return known


def _taken(given: dict[str, object], field: str, name: str, *, kind: type) -> dict[str, object]:
    if name not in given:
        return {}
    value = given.pop(name)
    if not isinstance(value, kind):
        raise BadRequestError(f"{name}: must be {kind.__name__}, not a {type(value).__name__}", status=400)
    return {field: value}


def _callable(given: object) -> object:
    if given is not None and not callable(given):
        raise BadRequestError(f"approve: must be an async function of an ApprovalRequest, not {given!r}", status=400)
    return given


def access_secret(given: object) -> Secret:
    """An access token as it is kept; raises `BadRequestError` for what is none."""
    if isinstance(given, Secret):
        return given
    if not isinstance(given, str):
        raise BadRequestError(f"access_token: must be a text, not a {type(given).__name__}", status=400)
    return Secret(given)


def _fallbacks(given: object) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(m, str) and m for m in given):
        raise BadRequestError(f"fallbacks: must be a list of model names, not {given!r}", status=400)
    return tuple(given)


_FREE_CHOICE: Final = b'{"tool_choice":"auto"}'


class TurnRequest:
    """A request of a turn before it is sent.

    `options` is an encoded object; `pieces` are encoded messages, joined by commas, in as many places as they
    stand in; `settings` is what is known of both. `deadline` is on the trio clock. `purpose` is for the ledger.
    """

    __slots__ = ("deadline", "options", "pieces", "purpose", "session", "settings", "turn_id")

    def __init__(
        self,
        options: bytes,
        pieces: tuple[bytes | bytearray, ...],
        *,
        settings: CallSettings = DEFAULT_SETTINGS,
        deadline: float = math.inf,
        session: str | None = None,
        turn_id: str | None = None,
        purpose: Literal["chat", "tool_round", "reask"] = "chat",
    ) -> None:
        self.options = options
        self.pieces = pieces
        self.settings = settings
        self.deadline = deadline
        self.session = session
        self.turn_id = turn_id
        self.purpose = purpose

    def call(self, *, streaming: bool = False) -> HttpCall:
        """The HTTP request for it."""
        return HttpCall(
            body=join_body(self.options, self.pieces, streaming=streaming),
            streaming=streaming,
            deadline=self.deadline,
            settings=self.settings,
            flow=self.session or "",
            purpose=self.purpose,
        )

    def messages(self) -> bytes:
        """The messages in one piece."""
        return b",".join(piece for piece in self.pieces if piece)

    def with_more(self, messages: bytes) -> TurnRequest:
        """The same with further messages."""
        return self._changed(pieces=(*self.pieces, messages))

    def with_purpose(self, purpose: Literal["chat", "tool_round", "reask"]) -> TurnRequest:
        """The same for another entry in the ledger."""
        return self._changed(purpose=purpose)

    def with_options(self, options: bytes, settings: CallSettings) -> TurnRequest:
        """The same with other options, and what is known of them."""
        return self._changed(options=options, settings=settings)

    def with_messages(self, messages: bytes) -> TurnRequest:
        """The same with other messages."""
        return self._changed(pieces=(messages,))

    def free_to_answer(self) -> TurnRequest:
        """The same, where the model was made to call a tool and has done so: it would have to call one for ever."""
        if b'"tool_choice"' not in self.options:
            return self
        choice = cast("dict[str, object]", decode_json(self.options)).get("tool_choice")
        is_forced = choice == "required" or (isinstance(choice, dict) and choice.get("type") == "function")
        return self._changed(options=join_options(self.options, _FREE_CHOICE)) if is_forced else self

    def for_model(self, model: str) -> TurnRequest:
        """The same for another model."""
        options, settings = encode_call({"model": model}, beneath=self.settings)
        return self._changed(options=join_options(self.options, options), settings=settings)

    def _changed(
        self,
        *,
        options: bytes | None = None,
        pieces: tuple[bytes | bytearray, ...] | None = None,
        settings: CallSettings | None = None,
        purpose: Literal["chat", "tool_round", "reask"] | None = None,
    ) -> TurnRequest:
        return TurnRequest(
            self.options if options is None else options,
            self.pieces if pieces is None else pieces,
            settings=settings or self.settings,
            deadline=self.deadline,
            session=self.session,
            turn_id=self.turn_id,
            purpose=purpose or self.purpose,
        )


class Finish(Struct, frozen=True):
    """The turn has its answer."""

    result: ChatResult[object]


class CallTools(Struct, frozen=True):
    """The answer calls tools, which are run next."""

    result: ChatResult


class AskAgain(Struct, frozen=True):
    """The answer has not the form that was asked for, and the model is told `problem`."""

    result: ChatResult
    problem: str

    def messages(self) -> bytes:
        """What the next round adds: the answer as it was given, and what is wrong with it."""
        text = f"That is not in the form that was asked for ({self.problem}). Answer again, with the JSON only."
        return b"%b,%b" % (encode_message(_as_asked(self.result.message)), encode_message(UserMessage(text)))


NextStep: TypeAlias = Finish | CallTools | AskAgain


class Rounds:
    """The rounds of one turn: decides after each answer what comes next.

    `records` are the calls of the answers that were not the last, `reports` what became of each tool call.
    `calls_made` and `rounds_made` count those of an earlier life as well.
    """

    __slots__ = ("_form", "_limits", "_may_reask", "_reasks", "_tools", "records", "reports", "rounds_made")

    def __init__(
        self,
        extras: TurnExtras,
        *,
        tools: ToolSet | None,
        limits: ToolLimits,
        may_reask: bool = True,
        rounds_made: int = 0,
    ) -> None:
        self._form = extras.form
        self._tools = tools
        self._limits = limits
        self._may_reask = may_reask
        self._reasks = 0
        self.rounds_made = rounds_made
        self.records: tuple[CallRecord, ...] = ()
        self.reports: list[ToolCallReport] = []

    def take(self, result: ChatResult) -> NextStep:
        """What follows `result`; raises `InvalidOutputError` when it has not the right form and nothing follows."""
        calls = result.message.tool_calls
        if calls is not UNSET and calls and self._runs_tools(calls):
            self.rounds_made += 1
            self._leave(result)
            return CallTools(result)
        if self._form is None:
            return Finish(self._finished(result))
        try:
            value = self._form.decode(result.text)
        except DecodeError as exc:
            return self._take_invalid(result, exc)
        return Finish(self._finished(result, value=value))

    def _runs_tools(self, calls: Sequence[object]) -> bool:
        """Whether the calls are run here: there is room, and none of them is one that the caller runs."""
        tools = self._tools
        if tools is None or self.rounds_made >= self._limits.max_rounds:
            return False
        return not any(tools.is_for_caller(call.function.name) for call in cast("Sequence[ToolCall]", calls))

    def _finished(self, result: ChatResult, **changes: object) -> ChatResult[object]:
        if not (self.records or self.reports or changes):
            return result
        return msgspec.structs.replace(result, rounds=self.records, tool_calls=tuple(self.reports), **changes)

    def _leave(self, result: ChatResult) -> None:
        self.records = (*self.records, result.call)

    def _take_invalid(self, result: ChatResult, error: DecodeError) -> NextStep:
        policy = cast("AnswerForm", self._form).policy
        problem = _why_not(result) or error.message
        if _why_not(result) is None and self._may_reask and self._reasks < policy.reasks:
            self._reasks += 1
            self._leave(result)
            return AskAgain(result, problem)
        finished = self._finished(result, invalid=problem)
        if policy.on_invalid == "none":
            return Finish(finished)
        failure = InvalidOutputError(f"the answer has not the form that was asked for: {problem}")
        failure.partial = finished
        failure.generation_id = result.generation_id
        failure.attempts = finished.attempts
        raise failure from error


def _why_not(result: ChatResult) -> str | None:
    """What kept the model from the right form that asking again would not change."""
    if result.message.refusal is not UNSET and result.message.refusal:
        return "the model refused"
    if result.finish_reason == "length":
        return "the answer was cut off at the token limit"
    if result.message.tool_calls is not UNSET and result.message.tool_calls:
        return "the model called tools instead"
    return None


def _as_asked(message: AssistantMessage) -> AssistantMessage:
    """An answer as a message of the next request."""
    return msgspec.structs.replace(message, content=message.content or "…", tool_calls=UNSET)
