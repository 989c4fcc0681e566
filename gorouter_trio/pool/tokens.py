"""How many tokens a prompt has, before anybody has counted them: an estimate to plan with, a bound to reserve with.

Theory of operation. Only a provider's tokenizer knows, and a body is not read for this, only measured. The estimate is
bytes / 4, corrected for each model by what replies said: a decaying mean of prompt tokens a byte. The bound holds for
every text: a token of a byte-level tokenizer is at least a byte, and JSON is never shorter than the text in it. So it
is the number of bytes, some for each request (and more where there are tools, which providers wrap in instructions of
their own), and for pictures, sound and files what the dearest tokenizers make of them.

Media in a body are data of no text length: a picture has a fixed number of tokens, sound one for so many bytes. What is
only named by an address is a picture, or else something that cannot be bounded here.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from .prices import TEXT_ONLY, RequestShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..wire.responses import Usage

__all__ = ["PromptBound", "TokenEstimator"]

_COLD_RATIO: Final = 0.25
_WEIGHT: Final = 0.1
_RATIOS: Final = (0.02, 1.0)
_SMALLEST_SAMPLE: Final = 64
_MAX_MODELS: Final = 1_024

_REQUEST_TOKENS: Final = 64
_TOOLS_TOKENS: Final = 1_024
_IMAGE_ESTIMATE: Final = 1_200
_IMAGE_BOUND: Final = 6_000
# OpenAI counts the tokens of pictures for this model about 33 times, at a lower price: 2,833 + 6 x 5,667.
_DEAR_IMAGES: Final = ("openai/gpt-4o-mini", 36_835)
# Bytes of base64 for a token: as expected, and at least.
_BYTES_A_TOKEN: Final = {
    b"input_audio": (300, 16),
    b"file": (40, 4),
    b"video_url": (400, 20),
    b"input_video": (400, 20),
}
_MOST_SEARCHES: Final = 10

_PARTS: Final = b'"content":['
_MEDIA: Final = re.compile(rb'"type":"(image_url|input_audio|file|video_url|input_video)"')
# By the names of their fields: a text may look like base64, or like the URL of some data.
_DATA: Final = re.compile(
    rb'"(?:(?:url|image_url|video_url|file_data|data)":"data:[^"\\]{1,80},|(?:file_data|data)":")([A-Za-z0-9+/=]{200,})"'
)
_ADDRESS: Final = re.compile(rb'"(?:file_data|url)":"https?:|"file_id":')
_IMAGE_DATA: Final = b'"url":"data:image'

_MESSAGES: Final = b'"messages":['
_TOOLS: Final = b'"tools":['
_LONG_CACHE: Final = b'"ttl":"1h"'
_WORDS: Final = (b'"plugins"', b"web_", _LONG_CACHE, b'"modalities"')
# Whatever lists stand between: a text cannot look like this, since its quotes are escaped.
_SEARCH_PLUGIN: Final = re.compile(rb'"plugins":\[.*?"id":"web"|"web_search_options":\{', re.DOTALL)
_SEARCH_TOOL: Final = re.compile(rb'"type":"openrouter:(?:web_search|web_fetch)')
_MODALITIES: Final = re.compile(rb'"modalities":\[([^\]]*)\]')


class PromptBound(NamedTuple):
    """The most prompt tokens that a request can have, and what else its price depends on."""

    tokens: int
    shape: RequestShape


class _Media(NamedTuple):
    """What of a body is no text: bytes of it, their tokens as expected and at most, and what they are."""

    data_bytes: int
    expected_tokens: int
    most_tokens: int
    shape: RequestShape


class TokenEstimator:
    """What is known of the tokenizers of models, as ratios of tokens to bytes. Bounded: models used least go first."""

    __slots__ = ("_ratios",)

    def __init__(self) -> None:
        self._ratios: OrderedDict[str, float] = OrderedDict()

    def __repr__(self) -> str:
        return f"<TokenEstimator {len(self._ratios)} models>"

    def ratio(self, model: str) -> float:
        """Prompt tokens a byte of a body, as far as is known."""
        return self._ratios.get(model, _COLD_RATIO)

    def estimate_prompt(self, model: str, body: bytes) -> int:
        """About how many prompt tokens the request with this body has; at least 1."""
        ratio = self._ratios.get(model, _COLD_RATIO)
        if _PARTS not in body:
            return int(len(body) * ratio) + 1
        media = _media_of(model, body)
        return int((len(body) - media.data_bytes) * ratio) + media.expected_tokens + 1

    def bound_prompt(self, model: str, body: bytes, *, fallbacks: Sequence[str] = ()) -> PromptBound:
        """The most prompt tokens that the request can have, whatever the text is, whichever of the models answers."""
        options = body[: body.find(_MESSAGES)]
        tokens = len(body) + (_REQUEST_TOKENS if _TOOLS not in options else _TOOLS_TOKENS)
        if _PARTS not in body:
            return PromptBound(tokens, _shape_of(options))
        media = _media_of(model, body, fallbacks)
        return PromptBound(tokens - media.data_bytes + media.most_tokens, media.shape)

    def observe(self, model: str, body: bytes, *, usage: Usage) -> None:
        """Learn from a reply. Bodies with media, and short ones, say nothing about text."""
        tokens = usage.prompt_tokens
        if tokens and len(body) >= _SMALLEST_SAMPLE and _PARTS not in body:
            self.learn(model, tokens=tokens, text_bytes=len(body))

    def learn(self, model: str, *, tokens: int, text_bytes: int) -> None:
        """Take one count into the mean; counts that no tokenizer makes are cut to what one could."""
        low, high = _RATIOS
        seen = min(max(tokens / text_bytes, low), high)
        ratios = self._ratios
        before = ratios.get(model)
        if before is not None:
            ratios[model] = before + (seen - before) * _WEIGHT
            return
        ratios[model] = seen
        if len(ratios) > _MAX_MODELS:
            ratios.popitem(last=False)


def _shape_of(options: bytes) -> RequestShape:
    """What a price depends on besides tokens, read off the encoded options, which stand before the messages."""
    if not any(word in options for word in _WORDS):
        return TEXT_ONLY
    modalities = _MODALITIES.search(options)
    asked = modalities[1] if modalities is not None else b""
    searches = 1 if _SEARCH_PLUGIN.search(options) else 0
    return RequestShape(
        long_cache=_LONG_CACHE in options,
        web_searches=_MOST_SEARCHES if _SEARCH_TOOL.search(options) else searches,
        audio_output=b'"audio"' in asked,
        image_output=b'"image"' in asked,
    )


def _media_of(model: str, body: bytes, fallbacks: Sequence[str] = ()) -> _Media:
    """Measure what is no text. Data are told by their length: base64 has no space and no other sign for 200 bytes."""
    shape = _shape_of(body[: body.find(_MESSAGES)])
    if _LONG_CACHE in body and not shape.long_cache:
        shape = msgspec.structs.replace(shape, long_cache=True)
    kinds = [found[1] for found in _MEDIA.finditer(body)]
    if not kinds:
        return _Media(0, 0, 0, shape)
    images = kinds.count(b"image_url")
    others = {kind for kind in kinds if kind != b"image_url"}
    data_bytes = sum(len(found[1]) for found in _DATA.finditer(body))
    # Which data belong to which part is not looked at: all of them count as the dearest kind that is there.
    expected_bytes = min((_BYTES_A_TOKEN[kind][0] for kind in others), default=0)
    least_bytes = min((_BYTES_A_TOKEN[kind][1] for kind in others), default=0)
    is_dear = any(name.startswith(_DEAR_IMAGES[0]) for name in (model, *fallbacks))
    image_bound = _DEAR_IMAGES[1] if is_dear else _IMAGE_BOUND
    return _Media(
        data_bytes,
        images * _IMAGE_ESTIMATE + (data_bytes // expected_bytes if others else 0),
        images * image_bound + (data_bytes // least_bytes if others else 0),
        msgspec.structs.replace(
            shape, images=images, audio=bool(others), unbounded=bool(others) and _is_addressed(body, images)
        ),
    )


def _is_addressed(body: bytes, images: int) -> bool:
    """Whether more is named by its address than pictures."""
    return len(_ADDRESS.findall(body)) > images - body.count(_IMAGE_DATA)
