"""Chunks of a streamed reply, decoded as leniently as whole replies (openrouter API, "Streaming")."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Struct, UnsetType

from .responses import ErrorBody, Logprobs, ReplyToolCall, RouterMetadata, Usage

__all__ = ["ChatChunk", "ChunkChoice", "Delta"]


class Delta(Struct, frozen=True, gc=False):
    """What one chunk adds. `role` is repeated in every delta, so it is not even read."""

    # The fields of all three are in the order of the wire: the decoder finds them faster.
    content: str | list[msgspec.Raw] | None = None
    reasoning: str | None = None
    reasoning_details: list[msgspec.Raw] | None = None
    tool_calls: list[ReplyToolCall] | None = None
    annotations: list[msgspec.Raw] | None = None
    images: list[msgspec.Raw] | None = None
    audio: msgspec.Raw | UnsetType = UNSET
    refusal: str | None = None


class ChunkChoice(Struct, frozen=True, gc=False):
    """The one choice of a chunk."""

    delta: Delta | None = None
    finish_reason: str | None = None
    native_finish_reason: str | None = None
    logprobs: Logprobs | None = None
    error: ErrorBody | None = None


class ChatChunk(Struct, frozen=True, gc=False):
    """One `data:` event. `choices` may be empty or null, `error` may stand anywhere.

    What is seldom sent and for debugging stays raw JSON.
    """

    id: str | None = None
    created: int | None = None
    model: str | None = None
    provider: str | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    error: ErrorBody | None = None
    choices: list[ChunkChoice] | None = None
    usage: Usage | None = None
    openrouter_metadata: RouterMetadata | None = None
    alignment: msgspec.Raw | UnsetType = UNSET
    safeguard_results: msgspec.Raw | UnsetType = UNSET
    debug: msgspec.Raw | UnsetType = UNSET
