"""What POST /embeddings takes and gives (openrouter API, "Other endpoints")."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

from msgspec import Struct

from .responses import ErrorBody, Usage

if TYPE_CHECKING:
    from .preferences import ProviderPreferences, TraceOptions

__all__ = ["Embedding", "EmbeddingInput", "EmbeddingKeywords", "EmbeddingReply", "EmbeddingResult"]

EmbeddingInput: TypeAlias = (
    str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Mapping[str, object]]
)
"""What is embedded: a text, texts, a text as tokens, texts as tokens, or inputs of several kinds in wire names."""


class EmbeddingKeywords(TypedDict, total=False):
    """The keyword arguments of `client.embeddings` besides input and model; what is not given is not sent.

    `dimensions` shortens the vectors where the model can. `encoding_format` "base64" makes replies a third as long;
    `Embedding.vector` reads both. `input_type` is a model's own, such as "search_query". `routing_id` is the API's
    `session_id`. `extra_body` and `extra_headers` are as in a chat.
    """

    dimensions: int
    encoding_format: Literal["float", "base64"]
    input_type: str
    provider: ProviderPreferences | Mapping[str, object]
    user: str
    routing_id: str
    trace: TraceOptions | Mapping[str, object]
    extra_body: Mapping[str, object]
    extra_headers: Mapping[str, str]


class Embedding(Struct, frozen=True, kw_only=True):
    """One vector; `index` is the place of its input. `embedding` is as it came: numbers, or base64 of 32-bit floats."""

    embedding: list[float] | str
    index: int | None = None

    @property
    def vector(self) -> list[float]:
        """The numbers; raises `ValueError` when the base64 is broken."""
        if not isinstance(self.embedding, str):
            return self.embedding
        try:
            data = base64.b64decode(self.embedding, validate=True)
            return [number for (number,) in struct.iter_unpack("<f", data)]
        except (binascii.Error, struct.error) as exc:
            raise ValueError(f"the embedding is not base64 of 32-bit floats: {exc}") from exc


class EmbeddingReply(Struct, frozen=True, kw_only=True):
    """The reply; `error` may stand in place of `data`."""

    data: list[Embedding] | None = None
    model: str | None = None
    id: str | None = None
    usage: Usage | None = None
    error: ErrorBody | None = None


class EmbeddingResult(Struct, frozen=True, kw_only=True):
    """Vectors in the order of their inputs, and what they cost; `usage` is None when the reply did not say."""

    data: list[Embedding]
    model: str | None = None
    generation_id: str | None = None
    usage: Usage | None = None
    attempts: int = 1

    @property
    def vectors(self) -> list[list[float]]:
        """The numbers alone."""
        return [embedding.vector for embedding in self.data]
