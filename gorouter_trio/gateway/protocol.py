"""The gateway's messages: closed, tagged unions in JSON, one a direction. Values only; docs/protocol.md explains them.

A client numbers its requests from 1 upwards, and everything about a request carries its `id`. The messages of one turn
are numbered by `seq`, from 1 without gaps, over any number of connections: whoever comes back says how far they got.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Final, Literal, TypeAlias, TypeVar, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..errors import DecodeError
from ..events import (
    AnnotationDelta,
    AudioDelta,
    ImageDelta,
    LogprobsDelta,
    ReasoningDelta,
    RefusalDelta,
    StreamFinished,
    TextDelta,
    ToolCallDelta,
    ToolFinished,
    ToolProgress,
    ToolStarted,
)
from ..wire.codec import encode_json, make_decoder
from ..wire.result import ChatResult, HistoryEntry
from ..wire.schema import without_indentation

__all__ = [
    "CLOSE_CODES",
    "MAX_NUMBER",
    "SUBPROTOCOL",
    "SYSTEM_ROLES",
    "VERSION",
    "Accepted",
    "Answer",
    "Ask",
    "AskOptions",
    "Authenticate",
    "BudgetRow",
    "Cancel",
    "Clear",
    "ClientMessage",
    "Close",
    "Compact",
    "Done",
    "Draining",
    "ErrorInfo",
    "Event",
    "Failed",
    "Fork",
    "Gap",
    "GatewaySnapshot",
    "Grant",
    "Hello",
    "History",
    "HistoryPage",
    "Interrupt",
    "OwnerOnWire",
    "Question",
    "RemoteStatistics",
    "RequestId",
    "ServerMessage",
    "SessionRequest",
    "SessionRow",
    "Snapshot",
    "Statistics",
    "Undo",
    "Welcome",
    "WireEvent",
    "decode_client_message",
    "decode_server_message",
    "encode_text",
    "protocol_schema",
]

VERSION: Final = 1
"""The version that both sides speak; a `hello` that names another one is refused with 4406."""

SUBPROTOCOL: Final = "gorouter-trio.v1"
"""What a client may offer as WebSocket subprotocol; offering none is as good."""

CLOSE_CODES: Final[Mapping[int, str]] = {
    1000: "the client said goodbye, or the gateway has nothing left to say",
    1001: "the gateway goes away; connect again, and ask again under the same turn ids",
    1002: "what came is no WebSocket frame",
    1003: "binary messages are not taken",
    1007: "a text that is not UTF-8",
    1008: "too many frames, messages or pings, a message in too many pieces, or one that comes too slowly",
    1009: "a message that is too long",
    1011: "an error inside the gateway; what it was is in its log",
    1013: "too many connections: of this principal, from this address, or at all; try again later",
    4400: "a message that is none: no JSON, of no known type, or with a field that is unknown or wrong",
    4401: "nobody is authenticated, or the token does not hold any more",
    4406: "a version of the protocol that the gateway does not speak",
    4408: "no hello came in time",
    4409: "a message out of order: a second hello, or an id that is not above the last one",
    4413: "the client reads too slowly, or grants no credit",
}
"""Why a connection was closed, by its close code."""

# A tuple, no set: what is looked for in it is whatever a client has sent, which may have no hash.
SYSTEM_ROLES: Final = ("system", "developer")
"""The roles of messages that instruct the model in the name of the application."""

MAX_NUMBER: Final = 2**53 - 1
"""The largest number that is taken: every language has it, and counting on from there gives one that can be written."""

RequestId: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_NUMBER)]
_Number: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
_SessionKey: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]
_TurnId: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
_JsonObject: TypeAlias = Mapping[str, object]

OwnerOnWire: TypeAlias = tuple[str, str]
"""A tenant and the id of a principal, for those who may use sessions that are not their own."""

T = TypeVar("T")


class _Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all messages are."""


# What clients send


class Hello(_Message, frozen=True, kw_only=True, tag="hello"):
    """The first message, within 3.5 s. `token` says who speaks, unless the header of the upgrade did."""

    version: int
    token: str | None = None
    agent: Annotated[str, Meta(max_length=200)] = ""


class Authenticate(_Message, frozen=True, kw_only=True, tag="authenticate"):
    """A newer token of the same principal, before the old one ends; answered by `accepted`."""

    id: RequestId
    token: str


class AskOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The options of a turn: those of a chat request that are the asker's to choose, under the names of the API.

    `fallbacks` are models to ask when the one before has failed. `response_schema` is a JSON schema that the answer has
    to follow: the gateway asks again for one that does not. `tools` are definitions of functions that the asker runs:
    the answer then has their calls, and their results are the `tool` messages of the next turn.
    """

    model: str | UnsetType = UNSET
    models: Sequence[str] | UnsetType = UNSET
    fallbacks: Sequence[str] | UnsetType = UNSET
    max_completion_tokens: int | UnsetType = UNSET
    max_tokens: int | UnsetType = UNSET
    temperature: float | None | UnsetType = UNSET
    top_p: float | None | UnsetType = UNSET
    top_k: int | None | UnsetType = UNSET
    min_p: float | None | UnsetType = UNSET
    top_a: float | None | UnsetType = UNSET
    frequency_penalty: float | None | UnsetType = UNSET
    presence_penalty: float | None | UnsetType = UNSET
    repetition_penalty: float | None | UnsetType = UNSET
    seed: int | None | UnsetType = UNSET
    stop: str | Sequence[str] | None | UnsetType = UNSET
    logit_bias: Mapping[str, float] | None | UnsetType = UNSET
    logprobs: bool | None | UnsetType = UNSET
    top_logprobs: int | None | UnsetType = UNSET
    response_format: _JsonObject | UnsetType = UNSET
    response_schema: _JsonObject | UnsetType = UNSET
    structured_outputs: bool | UnsetType = UNSET
    tools: Sequence[_JsonObject] | UnsetType = UNSET
    tool_choice: str | _JsonObject | UnsetType = UNSET
    parallel_tool_calls: bool | None | UnsetType = UNSET
    reasoning: _JsonObject | UnsetType = UNSET
    reasoning_effort: str | UnsetType = UNSET
    include_reasoning: bool | UnsetType = UNSET
    verbosity: str | UnsetType = UNSET
    prediction: _JsonObject | UnsetType = UNSET
    modalities: Sequence[str] | UnsetType = UNSET
    image_config: _JsonObject | UnsetType = UNSET
    audio: _JsonObject | UnsetType = UNSET
    provider: _JsonObject | UnsetType = UNSET
    plugins: Sequence[_JsonObject] | UnsetType = UNSET
    transforms: Sequence[str] | UnsetType = UNSET
    route: str | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET
    user: str | UnsetType = UNSET
    metadata: Mapping[str, str] | UnsetType = UNSET
    cache_control: _JsonObject | UnsetType = UNSET
    prompt_cache_key: str | UnsetType = UNSET
    prompt_cache_options: _JsonObject | UnsetType = UNSET
    web_search_options: _JsonObject | UnsetType = UNSET
    x_search_filter: _JsonObject | UnsetType = UNSET

    def keywords(self) -> dict[str, object]:
        """What was given, as the keyword arguments of a turn."""
        given = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in given.items() if value is not UNSET}


class Ask(_Message, frozen=True, kw_only=True, tag="ask"):
    """Take a turn of `session`, or chat without one; answered by `event`s (if it is to `stream`) and an end.

    The end is `done` or `failed`, and always comes.

    A turn with a `turn_id` happens at most once: asked again it is joined where it runs, and has its stored answer
    afterwards. `resumed` says that it was asked before: then a turn that nobody knows is not begun, unless its session
    can tell what became of it; `after` is the last `seq` that has arrived. `resume="resend"` sends again what is in
    doubt. `replaces` is the id of a turn that gives way to this one with all after it; "", without `messages`, takes
    the last turn again, with its own. `credit` is how many bytes of messages about the turn the asker takes
    before it grants more; the end needs none. `deadline_s` ends the turn.
    """

    id: RequestId
    session: _SessionKey | None = None
    owner: OwnerOnWire | None = None
    turn_id: _TurnId | None = None
    messages: str | Sequence[_JsonObject] | None = None
    system: str | None = None
    options: AskOptions = AskOptions()
    resume: Literal["resend"] | None = None
    replaces: Annotated[str, Meta(max_length=256)] | None = None
    stream: bool = False
    resumed: bool = False
    after: _Number = 0
    credit: _Number = 65_536
    deadline_s: Annotated[float, Meta(gt=0)] | None = None


class Grant(_Message, frozen=True, kw_only=True, tag="grant"):
    """Take so many bytes more of the turn that `id` asked for. Not answered."""

    id: RequestId
    credit: Annotated[int, Meta(ge=1, le=MAX_NUMBER)]


class Cancel(_Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop the turn that `id` asked for; what had arrived is stored. Its own `done` or `failed` is the answer."""

    id: RequestId


class SessionRequest(_Message, frozen=True, kw_only=True):
    """What asks something of a session; `system` is what its turns are asked with, if they are asked with one."""

    id: RequestId
    session: _SessionKey
    owner: OwnerOnWire | None = None
    system: str | None = None


class Interrupt(SessionRequest, frozen=True, kw_only=True, tag="interrupt"):
    """Stop the running turn, ahead of queued ones; `accepted` with whether there was one."""


class History(SessionRequest, frozen=True, kw_only=True, tag="history"):
    """Messages of the answered turns from number `start` on; answered by `history_page`s of bounded size."""

    start: _Number = 0


class Clear(SessionRequest, frozen=True, kw_only=True, tag="clear"):
    """Empty the history."""


class Fork(SessionRequest, frozen=True, kw_only=True, tag="fork"):
    """Copy the history to a new session `target` of the same owner."""

    target: _SessionKey


class Undo(SessionRequest, frozen=True, kw_only=True, tag="undo"):
    """Leave a turn and all after it out of the history, without an id the last one; `accepted` with whether it was."""

    turn_id: _TurnId | None = None


class Compact(SessionRequest, frozen=True, kw_only=True, tag="compact"):
    """Write the session's log anew, without what no request needs any more."""


class Close(SessionRequest, frozen=True, kw_only=True, tag="close"):
    """End the session's actor: a running turn is interrupted, the history stays."""


class Answer(SessionRequest, frozen=True, kw_only=True, tag="answer"):
    """Reply to a question; `accepted` with whether a turn waited for it, once the reply is stored."""

    question_id: _TurnId
    approved: bool
    reason: Annotated[str, Meta(max_length=2000)] = ""


class Statistics(_Message, frozen=True, kw_only=True, tag="statistics"):
    """What a session does, or, without one, what the gateway does, for those who may know (`operator_roles`)."""

    id: RequestId
    session: _SessionKey | None = None
    owner: OwnerOnWire | None = None
    system: str | None = None


ClientMessage: TypeAlias = (
    Hello
    | Authenticate
    | Ask
    | Grant
    | Cancel
    | Interrupt
    | History
    | Clear
    | Fork
    | Undo
    | Compact
    | Close
    | Answer
    | Statistics
)
"""Everything that a client may send."""


# What gateways send


class Welcome(_Message, frozen=True, kw_only=True, tag="welcome"):
    """The answer to `hello`: the principal, and the bounds that hold on this connection."""

    version: int
    principal: str | None
    max_message_bytes: int
    max_requests: int
    max_credit: int
    resume_s: float


class Draining(_Message, frozen=True, kw_only=True, tag="draining"):
    """The gateway stops in so many seconds: it takes no new turns, running ones go on until then."""

    grace_s: float


class Accepted(_Message, frozen=True, kw_only=True, tag="accepted"):
    """The request `id` is done; `value` is what was asked for, where there is an answer."""

    id: int
    value: bool | None = None


WireEvent: TypeAlias = (
    TextDelta
    | ReasoningDelta
    | RefusalDelta
    | ToolCallDelta
    | AnnotationDelta
    | ImageDelta
    | AudioDelta
    | LogprobsDelta
    | ToolStarted
    | ToolProgress
    | ToolFinished
    | StreamFinished
)
"""The events of a stream that cross the wire: all but raw chunks."""


class Event(_Message, frozen=True, kw_only=True, tag="event"):
    """A piece of the answer."""

    id: int
    seq: int
    event: WireEvent


class Question(_Message, frozen=True, kw_only=True, tag="question"):
    """A tool waits to be approved: `answer` it, before `expires_at_s` (seconds since the epoch)."""

    id: int
    seq: int
    question_id: str
    tool: str
    arguments: str
    expires_at_s: float


class Gap(_Message, frozen=True, kw_only=True, tag="gap"):
    """Everything up to `seq` is not kept any more: the pieces are lost, the answer is whole in `done`."""

    id: int
    seq: int


class Done(_Message, frozen=True, kw_only=True, tag="done"):
    """The answer, whole; a session's turn is stored by now."""

    id: int
    seq: int
    result: ChatResult[object]


class ErrorInfo(_Message, frozen=True, kw_only=True):
    """Why a request failed: `code` names the error (docs/protocol.md lists them), the rest is what is known of it."""

    code: str
    message: str
    status: int | None = None
    api_code: int | str | None = None
    retry_after_s: float | None = None
    maybe_billed: bool = False
    attempts: int = 0
    generation_id: str | None = None
    question_id: str | None = None
    detail: str | None = None
    partial: ChatResult[object] | None = None


class Failed(_Message, frozen=True, kw_only=True, tag="failed"):
    """The request failed. `seq` is 0 for what is no turn."""

    id: int
    error: ErrorInfo
    seq: int = 0


class HistoryPage(_Message, frozen=True, kw_only=True, tag="history_page"):
    """Some messages of a history; `next` is where the next page starts, null at the end."""

    id: int
    entries: Sequence[HistoryEntry]
    next: int | None = None


class RemoteStatistics(_Message, frozen=True, kw_only=True, tag="session_statistics"):
    """A snapshot of a session."""

    id: int
    state: str
    queued: int
    turns: int
    version: int
    rendered_bytes: int
    length: int
    waiting: int
    waits_for: str
    since_s: float
    calls: int
    cost_usd: Decimal | None
    unpriced: int
    question_id: str | None = None
    failure: str = ""


class SessionRow(_Message, frozen=True, kw_only=True):
    """One active session in a snapshot of the gateway."""

    key: str
    state: str
    queued: int
    turns: int
    waits_for: str
    since_s: float
    cost_usd: Decimal | None = None


class BudgetRow(_Message, frozen=True, kw_only=True):
    """A budget with a limit in USD; `name` is that of the tenant, session or batch. Held is what runs may cost."""

    kind: str
    name: str
    limit_usd: Decimal
    spent_usd: Decimal
    held_usd: Decimal
    left_usd: Decimal


class GatewaySnapshot(_Message, frozen=True, kw_only=True):
    """What a gateway does: connections, turns, the pool behind it, what was spent, the sessions longest at it.

    `budgets` are those with a limit, the one with the smallest part of it left first.
    """

    name: str
    uptime_s: float
    is_draining: bool
    connections: int
    unauthenticated: int
    principals: int
    accepted: int
    refused: int
    closed: Mapping[str, int]
    live_turns: int
    kept_turns: int
    kept_bytes: int
    turns_done: int
    turns_failed: int
    errors: Mapping[str, int]
    active_sessions: int
    sessions: Sequence[SessionRow]
    queued: int
    in_flight: int
    pool_connections: int
    retries: int
    throttled: int
    answered: int
    failed: int
    loop_lag_s: float
    cost_usd: Decimal
    uncosted: int
    budgets: Sequence[BudgetRow] = ()


class Snapshot(_Message, frozen=True, kw_only=True, tag="snapshot"):
    """The answer to `statistics` without a session."""

    id: int
    snapshot: GatewaySnapshot


ServerMessage: TypeAlias = (
    Welcome | Draining | Accepted | Event | Question | Gap | Done | Failed | HistoryPage | RemoteStatistics | Snapshot
)
"""Everything that a gateway may send."""


_decode_client = make_decoder(ClientMessage)
_decode_server = make_decoder(ServerMessage)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError)


def encode_text(message: Struct) -> str:
    """A message as the text of a frame."""
    return encode_json(message).decode()


def decode_client_message(text: str | bytes) -> ClientMessage:
    """What a client sent; raises `DecodeError` that names the field which is wrong."""
    return cast("ClientMessage", _decoded(_decode_client, text))


def decode_server_message(text: str | bytes) -> ServerMessage:
    """What a gateway sent; raises `DecodeError`."""
    return cast("ServerMessage", _decoded(_decode_server, text))


def _decoded(decode: object, text: str | bytes) -> object:
    try:
        return decode(text)  # type: ignore[operator]  # a decoder of `make_decoder`
    except _MALFORMED as exc:
        raise DecodeError(f"no message of this protocol: {exc}") from None


def protocol_schema() -> dict[str, object]:
    """The JSON schema of both directions: `client` and `server` name what may be sent, `$defs` say what that is."""
    (client, server), definitions = msgspec.json.schema_components(
        [ClientMessage, ServerMessage], schema_hook=_any_json, ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"gorouter-trio gateway protocol, version {VERSION}",
        "client": client,
        "server": server,
        "$defs": without_indentation(definitions),
    }


def _any_json(kind: type) -> dict[str, object]:
    if kind is object:
        return {"description": "any JSON value"}
    raise NotImplementedError(kind)
