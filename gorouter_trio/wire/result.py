"""What a call returns: one frozen value, the same for chat, stream and session turns."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Generic

import msgspec
from msgspec import UNSET, Struct, UnsetType

from .attachments import read_annotations, read_audio, read_images, read_texts, read_thoughts, split_entries
from .messages import AssistantMessage, Message
from .responses import Logprobs, RouterMetadata, Usage
from .toolcalls import ToolCallReport

if TYPE_CHECKING:
    # With a default, so that a plain `ChatResult` is one whose value is None; at run time the typing module's will do.
    from typing_extensions import TypeVar

    from .attachments import Annotation, OutputAudio, OutputImage

    T_co = TypeVar("T_co", default=None, covariant=True)
else:
    from typing import TypeVar

    T_co = TypeVar("T_co", covariant=True)

__all__ = ["CallRecord", "ChatResult", "CompletionResult", "HistoryEntry"]


class CallRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known about the call that made an answer; stored beside the message in a history.

    `finished_at_s` is wall-clock seconds since the epoch. `queue_wait_s` is the time spent waiting
    for the pool, with that in which a connection was made, `ttft_s` the time from sending to the
    first data, `duration_s` everything from the caller's request to the whole answer. `attempts`
    counts requests sent, retries included. `maybe_billed` says that an attempt before this one may
    have been charged as well.
    `interrupted` marks an answer that was stopped before its end. `service_tier` is the one that the
    provider ran it on. `openrouter_metadata`, `alignment` and `safeguard_results` come where a header
    or a plugin of the request asks for them; the last two are raw JSON.
    """

    generation_id: str | None = None
    model: str | None = None
    provider: str | None = None
    finish_reason: str | None = None
    native_finish_reason: str | None = None
    usage: Usage | None = None
    attempts: int = 1
    maybe_billed: bool = False
    interrupted: bool = False
    queue_wait_s: float = 0.0
    ttft_s: float | None = None
    duration_s: float = 0.0
    finished_at_s: float = 0.0
    service_tier: str | None = None
    system_fingerprint: str | None = None
    logprobs: Logprobs | None = None
    openrouter_metadata: RouterMetadata | None = None
    alignment: msgspec.Raw | UnsetType = UNSET
    safeguard_results: msgspec.Raw | UnsetType = UNSET

    @property
    def cost(self) -> Decimal | None:
        """USD really charged, or None when the reply did not say: unknown is never zero."""
        return None if self.usage is None else self.usage.cost


class ChatResult(Struct, Generic[T_co], frozen=True, kw_only=True):
    """The answer to one chat, stream or session turn.

    `call` is the call that gave it, `rounds` are the calls before that in the same turn: those whose tools
    were run, and those whose answer had not the form that was asked for. `tool_calls` is the execution report:
    what became of each call of a tool that was run here. `value` is the answer as the
    `response_type` that was asked for, None otherwise. `invalid` says why there is no value where an
    answer without the right form was admitted.
    """

    message: AssistantMessage
    call: CallRecord
    turn_id: str | None = None
    rounds: tuple[CallRecord, ...] = ()
    tool_calls: tuple[ToolCallReport, ...] = ()
    value: T_co = None  # type: ignore[assignment]  # None is right for a plain result, and a typed one is never made without
    invalid: str | None = None

    @property
    def text(self) -> str:
        """The answer's text; empty when the model only called tools or refused."""
        content = self.message.content
        return content if isinstance(content, str) else "".join(read_texts(content or ()))

    @property
    def reasoning(self) -> str | None:
        """The model's visible reasoning, if it sent any: as text, or else what is readable in its blocks."""
        if self.message.reasoning is not UNSET:
            return self.message.reasoning
        return read_thoughts(split_entries(self.message.reasoning_details)) or None

    @property
    def refusal(self) -> str | None:
        """What the model said in place of an answer, if it refused."""
        return None if self.message.refusal is UNSET else self.message.refusal

    @property
    def annotations(self) -> list[Annotation]:
        """Pages that the answer cites, and files that were read for it; as they came in `message.annotations`."""
        return read_annotations(split_entries(self.message.annotations))

    @property
    def images(self) -> list[OutputImage]:
        """Images that the model made; as they came in `message.images`."""
        return read_images(split_entries(self.message.images))

    @property
    def audio(self) -> OutputAudio | None:
        """What the model said aloud, if it did; as it came in `message.audio`."""
        return read_audio(self.message.audio)

    @property
    def logprobs(self) -> Logprobs | None:
        """Log probabilities of the tokens, where the request asked for them."""
        return self.call.logprobs

    @property
    def usage(self) -> Usage | None:
        """Tokens and cost as the API reported them, of the call that gave the answer."""
        return self.call.usage

    @property
    def cost(self) -> Decimal | None:
        """USD really charged for the whole turn, all its rounds, or None when a reply did not say."""
        if not self.rounds:
            return self.call.cost
        costs = [call.cost for call in (*self.rounds, self.call)]
        return None if None in costs else sum((cost for cost in costs if cost is not None), Decimal(0))

    @property
    def attempts(self) -> int:
        """Requests that were sent for the whole turn, retries included."""
        return self.call.attempts + sum(call.attempts for call in self.rounds)

    @property
    def maybe_billed(self) -> bool:
        """Whether an attempt whose answer was lost may have been charged as well."""
        return self.call.maybe_billed or any(call.maybe_billed for call in self.rounds)

    @property
    def model(self) -> str | None:
        """The model that answered; often a dated name, not the one asked for."""
        return self.call.model

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length`, `tool_calls`, `content_filter`, `error`, or something newer."""
        return self.call.finish_reason

    @property
    def native_finish_reason(self) -> str | None:
        """Why it ended, in the provider's own words."""
        return self.call.native_finish_reason

    @property
    def provider(self) -> str | None:
        """The provider that served it."""
        return self.call.provider

    @property
    def service_tier(self) -> str | None:
        """The tier that it ran on, where the provider said so."""
        return self.call.service_tier

    @property
    def generation_id(self) -> str | None:
        """The API's id of this answer."""
        return self.call.generation_id

    @property
    def duration_s(self) -> float:
        """Seconds from the request to the whole answer, queueing and retries included."""
        return self.call.duration_s

    @property
    def interrupted(self) -> bool:
        """Whether the answer was stopped before its end."""
        return self.call.interrupted


class CompletionResult(Struct, frozen=True, kw_only=True):
    """The answer to a prompt without a conversation, from POST /completions; `logprobs` are the provider's own JSON."""

    text: str
    call: CallRecord
    reasoning: str | None = None
    logprobs: msgspec.Raw | UnsetType = UNSET

    @property
    def usage(self) -> Usage | None:
        """Tokens and cost as the API reported them."""
        return self.call.usage

    @property
    def cost(self) -> Decimal | None:
        """USD really charged, or None when the reply did not say."""
        return self.call.cost

    @property
    def model(self) -> str | None:
        """The model that answered."""
        return self.call.model

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, as in `ChatResult`."""
        return self.call.finish_reason


class HistoryEntry(Struct, frozen=True):
    """One message of a session, the call that made it where a call did, and the id of its turn."""

    message: Message
    call: CallRecord | None = None
    turn_id: str | None = None
