"""A turn before it is sent, and what follows its answers: values and decisions, no waiting.

A turn is what its caller sees as one: a chat, a stream, a turn of a session. It has one round for each
request to a model: the last round gives the answer; those before it gave one without the right form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import msgspec
from msgspec import UNSET, Struct

from ._output import AnswerForm, FormCache, OutputPolicy
from .errors import (
    BadRequestError,
    DecodeError,
    GorouterError,
    InvalidOutputError,
    ModerationError,
    NotFoundError,
    ProviderError,
    RateLimitError,
)
from .wire.codec import encode_call, encode_message, join_body, join_options
from .wire.mail import DEFAULT_SETTINGS, CallSettings, HttpCall
from .wire.messages import AssistantMessage, UserMessage
from .wire.requests import AskKeywords, ChatKeywords, JsonObject
from .wire.result import CallRecord, ChatResult

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._chain import ChatState

__all__ = [
    "AskAgain",
    "AskTurnKeywords",
    "Finish",
    "NextStep",
    "Rounds",
    "TurnExtras",
    "TurnKeywords",
    "TurnRequest",
    "encode_turn",
    "is_models_fault",
]


class AskTurnKeywords(AskKeywords, total=False):
    """The keyword arguments of `client.ask`: those of a request, and those of a turn.

    `response_schema` is a JSON schema that the answer must follow, and `output` how strictly; `fallbacks` are
    models to ask, in order, when the one before has failed for reasons of its own.
    """

    response_schema: JsonObject
    output: OutputPolicy
    fallbacks: Sequence[str]


class TurnKeywords(ChatKeywords, total=False):
    """The keyword arguments of a turn; see `AskTurnKeywords`."""

    response_schema: JsonObject
    output: OutputPolicy
    fallbacks: Sequence[str]


_EXTRAS = frozenset({"response_type", "response_schema", "output", "fallbacks"})


class TurnExtras(Struct, frozen=True, kw_only=True):
    """What a turn needs besides its requests: the form of its answer, and models to fall back on."""

    form: AnswerForm | None = None
    fallbacks: tuple[str, ...] = ()


def encode_turn(
    keywords: Mapping[str, object],
    *,
    forms: FormCache,
    beneath: CallSettings = DEFAULT_SETTINGS,
    extras: TurnExtras | None = None,
) -> tuple[bytes, CallSettings, TurnExtras | None]:
    """The keyword arguments of a turn: encoded options, settings, and extras, where there are any.

    What is not given is as in `beneath` and `extras`. Raises as `encode_call`; `ConfigError` for a type or a
    schema that cannot be asked for.
    """
    if _EXTRAS.isdisjoint(keywords):
        return (*encode_call(cast("ChatKeywords", keywords), beneath=beneath), extras)
    given = dict(keywords)
    form = forms.get(given.pop("response_type", None), given.pop("response_schema", None), given.pop("output", None))
    fallbacks = _fallbacks(given.pop("fallbacks", None))
    extras = extras or TurnExtras()
    if form is not None:
        if "response_format" in given:
            raise BadRequestError("response_format: is made from the response type; give one of them", status=400)
        given["response_format"] = form.response_format
    extras = TurnExtras(form=form or extras.form, fallbacks=extras.fallbacks if fallbacks is None else fallbacks)
    return (*encode_call(cast("ChatKeywords", given), beneath=beneath), extras)


def _fallbacks(given: object) -> tuple[str, ...] | None:
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(m, str) and m for m in given):
        raise BadRequestError(f"fallbacks: must be a list of model names, not {given!r}", status=400)
    return tuple(given)


class TurnRequest:
    """One turn before it is sent.

    `options` is an encoded object; `pieces` are encoded messages, joined by commas, in as many places as they
    stand in; `settings` is what is known of both. `deadline` is on the trio clock.
    """

    __slots__ = ("deadline", "extras", "options", "pieces", "session", "settings", "turn_id")

    def __init__(
        self,
        options: bytes,
        pieces: tuple[bytes | bytearray, ...],
        *,
        settings: CallSettings = DEFAULT_SETTINGS,
        extras: TurnExtras | None = None,
        deadline: float = math.inf,
        session: str | None = None,
        turn_id: str | None = None,
    ) -> None:
        self.options = options
        self.pieces = pieces
        self.settings = settings
        self.extras = extras
        self.deadline = deadline
        self.session = session
        self.turn_id = turn_id

    def call(self, added: tuple[bytes, ...] = (), *, streaming: bool = False) -> HttpCall:
        """The HTTP request of a round; `added` are the messages that the rounds before it have added."""
        pieces = (*self.pieces, *added) if added else self.pieces
        body = join_body(self.options, pieces, streaming=streaming)
        return HttpCall(body=body, streaming=streaming, deadline=self.deadline, settings=self.settings)

    def messages(self) -> bytes:
        """The messages in one piece."""
        return b",".join(piece for piece in self.pieces if piece)

    def as_changed(self, state: ChatState) -> TurnRequest:
        """The request that extensions have made of it; raises `BadRequestError` when that is none."""
        options, messages = state.encoded()
        if options is self.options:
            return self._with(options, messages, self.settings)
        _, settings = encode_call({"extra_body": state.options}, beneath=self.settings)
        return self._with(options, messages, settings)

    def for_model(self, model: str) -> TurnRequest:
        """The same for another model."""
        options, settings = encode_call({"model": model}, beneath=self.settings)
        return self._with(join_options(self.options, options), self.messages(), settings)

    def _with(self, options: bytes, messages: bytes, settings: CallSettings) -> TurnRequest:
        return TurnRequest(
            options,
            (messages,),
            settings=settings,
            extras=self.extras,
            deadline=self.deadline,
            session=self.session,
            turn_id=self.turn_id,
        )


class Finish(Struct, frozen=True):
    """The turn has its answer."""

    result: ChatResult[object]


class AskAgain(Struct, frozen=True):
    """The answer has not the form that was asked for, and the model is told `problem`."""

    result: ChatResult
    problem: str

    def messages(self) -> bytes:
        """What the next round adds: the answer as it was given, and what is wrong with it."""
        text = f"That is not in the form that was asked for ({self.problem}). Answer again, with the JSON only."
        return b"%b,%b" % (encode_message(_as_asked(self.result.message)), encode_message(UserMessage(text)))


NextStep: TypeAlias = Finish | AskAgain


class Rounds:
    """The rounds of one turn: decides after each answer what comes next."""

    __slots__ = ("_form", "_reasks", "records")

    def __init__(self, extras: TurnExtras | None) -> None:
        self._form = None if extras is None else extras.form
        self._reasks = 0
        self.records: tuple[CallRecord, ...] = ()

    def take(self, result: ChatResult) -> NextStep:
        """What follows `result`; raises `InvalidOutputError` when it has not the right form and nothing follows."""
        if self._form is None:
            return Finish(msgspec.structs.replace(result, rounds=self.records) if self.records else result)
        try:
            value = self._form.decode(result.text)
        except DecodeError as exc:
            return self._take_invalid(result, exc)
        return Finish(msgspec.structs.replace(result, rounds=self.records, value=value))

    def _take_invalid(self, result: ChatResult, error: DecodeError) -> NextStep:
        policy = cast("AnswerForm", self._form).policy
        problem = _why_not(result) or error.message
        if _why_not(result) is None and self._reasks < policy.reasks:
            self._reasks += 1
            self.records = (*self.records, result.call)
            return AskAgain(result, problem)
        result = msgspec.structs.replace(result, rounds=self.records, invalid=problem)
        if policy.on_invalid == "none":
            return Finish(result)
        failure = InvalidOutputError(f"the answer has not the form that was asked for: {problem}")
        failure.partial = result
        failure.generation_id = result.generation_id
        failure.attempts = result.attempts
        raise failure from error


def is_models_fault(error: GorouterError) -> bool:
    """Whether another model may do better than the one that has failed, and its answer is not paid twice for that.

    The account's own troubles (key, credits), refused requests and lost answers are not of that kind; a context
    that is too long for one model may fit another.
    """
    if error.maybe_billed:
        return False
    if isinstance(error, BadRequestError):
        return error.metadata.get("error_type") == "context_length_exceeded"
    return isinstance(error, (ProviderError, RateLimitError, NotFoundError, ModerationError))


def _why_not(result: ChatResult) -> str | None:
    """What kept the model from the right form that asking again would not change."""
    if result.message.refusal is not UNSET and result.message.refusal:
        return "the model refused"
    if result.finish_reason == "length":
        return "the answer was cut off at the token limit"
    return None


def _as_asked(message: AssistantMessage) -> AssistantMessage:
    """An answer as a message of the next request: its tool calls are not answered, so they are left out."""
    return msgspec.structs.replace(message, content=message.content or "…", tool_calls=UNSET)
