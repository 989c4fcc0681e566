"""The wire form of every reply, byte by byte: key order, number format, comments and the double finish.

The forms are the simulator's own, written down from captured replies; nothing here is shared with the client's codec.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, final

from msgspec import Struct

from . import _tokens
from ._json import decimal_string, dollars, encode, quote, raw_dollars, raw_number
from .catalog import SimulatedModel, Style
from .model import Answer, CalledTool

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "COMMENT",
    "DONE",
    "PADDING",
    "TIMED_OUT",
    "Event",
    "Face",
    "Generation",
    "StreamForm",
    "completion",
    "credit_balance",
    "embeddings",
    "endpoint_list",
    "endpoints",
    "failed_completion",
    "key",
    "model_count",
    "models",
    "one_model",
    "provider_slug",
    "providers",
    "supported_parameters",
    "text_completion",
    "usage",
]

COMMENT: Final = b": OPENROUTER PROCESSING\n\n"
DONE: Final = b"data: [DONE]\n\n"
PADDING: Final = b"\n         \n"
TIMED_OUT: Final = b'{"error":{"message":"The operation was aborted","code":504}}'

_NATIVE: Final[dict[Style, dict[str, str]]] = {
    "openai": {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "content_filter": "content_filter"},
    "anthropic": {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"},
    "google": {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP", "content_filter": "SAFETY"},
    "xai": {"stop": "completed", "length": "length", "tool_calls": "completed", "content_filter": "completed"},
    "open": {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "content_filter": "content_filter"},
}
_REASONING: Final[dict[Style, tuple[str, str, str]]] = {
    "openai": ("reasoning.summary", "summary", "openai-responses-v1"),
    "anthropic": ("reasoning.text", "text", "anthropic-claude-v1"),
    "google": ("reasoning.text", "text", "google-gemini-v1"),
    "xai": ("reasoning.summary", "summary", "xai-responses-v1"),
    "open": ("reasoning.text", "text", "unknown"),
}
_ENCRYPTED: Final = frozenset({"openai", "google", "xai"})
_MAX_FRAGMENT: Final = 3


@final
class Face:
    """What is the same in all replies of one model, written out once."""

    __slots__ = ("completion", "fingerprint", "names", "native", "style", "tier")

    def __init__(self, model: SimulatedModel) -> None:
        self.style = model.style
        self.native = _NATIVE[model.style]
        is_openai = model.style == "openai"
        mark = "fp_" + hashlib.blake2b(model.served_as.encode(), digest_size=5).hexdigest()
        self.fingerprint = f',"system_fingerprint":"{mark}"' if is_openai else ""
        self.tier = ',"service_tier":"default"' if is_openai else ',"service_tier":null'
        self.names = f'"model":{quote(model.served_as)},"provider":{quote(model.provider)}'
        mark_or_null = self.fingerprint or ',"system_fingerprint":null'
        self.completion = (
            f'{self.names}{mark_or_null}{self.tier},"choices":[{{"index":0,"logprobs":null,"finish_reason":'
        ).encode()


class Generation(Struct, frozen=True, kw_only=True, gc=False):
    """A generation that was started: who made it, what it says and what it costs when it is billed in full."""

    id: str
    created: int
    model: SimulatedModel
    face: Face
    answer: Answer
    prompt_tokens: int

    def cost_nanousd(self, completion_tokens: int) -> int:
        """The price with this many completion tokens."""
        model = self.model
        return (
            self.prompt_tokens * model.prompt_nanousd
            + completion_tokens * model.completion_nanousd
            + model.request_nanousd
        )

    @property
    def native_finish_reason(self) -> str:
        """The finish reason in the provider's own words."""
        return self.face.native[self.answer.finish_reason]


def usage(generation: Generation) -> str:
    """The usage object."""
    answer, model = generation.answer, generation.model
    total = dollars(generation.cost_nanousd(answer.completion_tokens))
    return (
        f'{{"prompt_tokens":{generation.prompt_tokens},"completion_tokens":{answer.completion_tokens},'
        f'"total_tokens":{generation.prompt_tokens + answer.completion_tokens},"cost":{total},"is_byok":false,'
        '"prompt_tokens_details":{"cached_tokens":0,"cache_write_tokens":0,"audio_tokens":0,"video_tokens":0},'
        f'"cost_details":{{"upstream_inference_cost":{total},'
        f'"upstream_inference_prompt_cost":{dollars(generation.prompt_tokens * model.prompt_nanousd)},'
        f'"upstream_inference_completions_cost":{dollars(answer.completion_tokens * model.completion_nanousd)}}},'
        f'"completion_tokens_details":{{"reasoning_tokens":{answer.reasoning_tokens},'
        '"image_tokens":0,"audio_tokens":0}}'
    )


# Whole replies.

_WHOLE: Final = (
    b'{"id":"%b","object":"chat.completion","created":%d,%b"%b","native_finish_reason":"%b",'
    b'"message":{"role":"assistant","content":%b,"refusal":null,"reasoning":%b%b}}],"usage":%b}'
)
_FAILED: Final = (
    b'{"id":"%b","object":"chat.completion","created":%d,%b"error","native_finish_reason":null,'
    b'"message":{"role":"assistant","content":%b,"refusal":null,"reasoning":null},"error":%b}]}'
)


def completion(generation: Generation) -> bytes:
    """The body of a whole reply."""
    answer = generation.answer
    return _WHOLE % (
        generation.id.encode("ascii"),
        generation.created,
        generation.face.completion,
        answer.finish_reason.encode("ascii"),
        generation.native_finish_reason.encode("ascii"),
        b"null" if answer.calls else encode(answer.text),
        _reasoning(generation).encode() if answer.thoughts and not answer.is_thinking_hidden else b"null",
        _tool_calls(answer.calls).encode() if answer.calls else b"",
        usage(generation).encode("ascii"),
    )


_TEXT: Final = (
    b'{"id":"%b","object":"text_completion","created":%d,%b,"choices":[{"text":%b,"index":0,"logprobs":null,'
    b'"finish_reason":"%b","native_finish_reason":"%b","reasoning":%b}],"usage":%b}'
)


def text_completion(generation: Generation) -> bytes:
    """The body of a reply of /completions."""
    answer = generation.answer
    return _TEXT % (
        generation.id.encode("ascii"),
        generation.created,
        generation.face.names.encode(),
        encode(answer.text),
        answer.finish_reason.encode("ascii"),
        generation.native_finish_reason.encode("ascii"),
        encode(answer.thoughts) if answer.thoughts and not answer.is_thinking_hidden else b"null",
        usage(generation).encode("ascii"),
    )


def embeddings(generation: Generation, rows: Sequence[str]) -> bytes:
    """The body of a reply of /embeddings, whose rows are written already."""
    cost = dollars(generation.cost_nanousd(0))
    text = (
        f'{{"object":"list","data":[{",".join(rows)}],"model":{quote(generation.model.served_as)},'
        f'"usage":{{"prompt_tokens":{generation.prompt_tokens},"total_tokens":{generation.prompt_tokens},'
        f'"cost":{cost}}},"id":"{generation.id}"}}'
    )
    return text.encode()


def failed_completion(generation: Generation) -> bytes:
    """A 200 with a part of the answer and the error that ended it inside its choice."""
    text = generation.answer.text
    return _FAILED % (
        generation.id.encode("ascii"),
        generation.created,
        generation.face.completion,
        encode(text[: len(text) // 2]),
        _broken_provider(),
    )


def _reasoning(generation: Generation) -> str:
    """The reasoning as text, and its blocks."""
    style = generation.face.style
    text = quote(generation.answer.thoughts)
    kind, key, form = _REASONING[style]
    signature = f'"signature":{quote(_signature(generation))},' if style == "anthropic" else ""
    blocks = f'{{"type":"{kind}","{key}":{text},{signature}"format":"{form}","index":0}}'
    if style in _ENCRYPTED:
        blocks += f",{_encrypted(generation)}"
    return f'{text},"reasoning_details":[{blocks}]'


def _encrypted(generation: Generation) -> str:
    form = _REASONING[generation.face.style][2]
    data = quote(_signature(generation))
    return f'{{"type":"reasoning.encrypted","data":{data},"id":"rs_{generation.id[-20:]}","format":"{form}","index":0}}'


def _signature(generation: Generation) -> str:
    """What a provider would sign its reasoning with: opaque, and to be echoed as it is."""
    return "Eq" + hashlib.blake2b(generation.id.encode(), digest_size=24).hexdigest()


def _tool_calls(calls: Sequence[CalledTool]) -> str:
    entries = [
        f'{{"type":"function","index":{index},"id":"{call.id}",'
        f'"function":{{"name":{quote(call.name)},"arguments":{quote(call.arguments)}}}}}'
        for index, call in enumerate(calls)
    ]
    return f',"tool_calls":[{",".join(entries)}]'


def _broken_provider() -> bytes:
    metadata = {"error_type": "provider_unavailable"}
    return encode({"code": 502, "message": "Provider disconnected unexpectedly", "metadata": metadata})


# Streams.


class Event(Struct, frozen=True, gc=False):
    """One or more lines of a stream, and how many completion tokens are out once they are sent."""

    data: bytes
    tokens: int


@final
class StreamForm:
    """The events of one streamed generation."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._face = generation.face
        self._head = (
            f'data: {{"id":"{generation.id}","object":"chat.completion.chunk","created":{generation.created},'
            f"{generation.face.names}"
        )

    def events(self) -> list[Event]:
        """Everything from the first delta up to and without the finish, event by event."""
        answer = self._generation.answer
        head, tail = self._around_content()
        pieces = enumerate(_tokens.split(answer.text), start=1 + answer.reasoning_tokens)
        return [
            *self._before_text(),
            *[Event(b"%b%b%b" % (head, encode(piece), tail), number) for number, piece in pieces],
        ]

    def content(self) -> bytes:
        """The same in one: for streams that nothing slows down, at a fraction of the cost."""
        before = b"".join([event.data for event in self._before_text()])
        pieces = [encode(piece) for piece in _tokens.split(self._generation.answer.text)]
        if not pieces:
            return before
        head, tail = self._around_content()
        return b"%b%b%b%b" % (before, head, (tail + head).join(pieces), tail)

    def _before_text(self) -> list[Event]:
        answer = self._generation.answer
        events = [Event(self._delta('"content":"","role":"assistant"'), 0)] if self._face.style == "openai" else []
        if answer.thoughts:
            events += self._thoughts()
        if answer.calls:
            events += self._calls(answer.reasoning_tokens)
        return events

    def ending(self) -> bytes:
        """The finish, the finish again with the usage, and the end mark."""
        generation, face = self._generation, self._face
        choice = (
            ',"choices":[{"index":0,"delta":{"content":"","role":"assistant"},'
            f'"finish_reason":"{generation.answer.finish_reason}",'
            f'"native_finish_reason":"{generation.native_finish_reason}"}}]'
        )
        head = f"{self._head}{face.fingerprint}"
        text = f'{head}{choice}}}\n\n{head}{face.tier}{choice},"usage":{usage(generation)}}}\n\n'
        return text.encode() + DONE

    def error(self) -> bytes:
        """The provider's failure in the middle, and the end mark that follows it all the same."""
        text = (
            f'{self._head},"error":{_broken_provider().decode("ascii")},'
            '"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error"}]}\n\n'
        )
        return text.encode() + DONE

    def delta(self, more: dict[str, object]) -> bytes:
        """An event with no text, but with something else."""
        return self._delta(f'"content":"","role":"assistant",{encode(more).decode("utf-8")[1:-1]}')

    def _delta(self, delta: str) -> bytes:
        choice = f'{{"index":0,"delta":{{{delta}}},"finish_reason":null,"native_finish_reason":null}}'
        return f'{self._head},"choices":[{choice}]}}\n\n'.encode()

    def _around_content(self) -> tuple[bytes, bytes]:
        head = f'{self._head},"choices":[{{"index":0,"delta":{{"content":'
        return head.encode(), b',"role":"assistant"},"finish_reason":null,"native_finish_reason":null}]}\n\n'

    def _thoughts(self) -> list[Event]:
        generation = self._generation
        answer = generation.answer
        if answer.is_thinking_hidden:
            return [Event(b"", answer.reasoning_tokens)]
        kind, key, form = _REASONING[self._face.style]
        events = []
        for number, piece in enumerate(_tokens.split(answer.thoughts), start=1):
            text = quote(piece)
            block = f'{{"type":"{kind}","{key}":{text},"format":"{form}","index":0}}'
            delta = f'"content":"","role":"assistant","reasoning":{text},"reasoning_details":[{block}]'
            events.append(Event(self._delta(delta), number))
        last = self._last_block(kind, form)
        if last is not None:
            delta = f'"content":"","role":"assistant","reasoning_details":[{last}]'
            events.append(Event(self._delta(delta), answer.reasoning_tokens))
        return events

    def _last_block(self, kind: str, form: str) -> str | None:
        if self._face.style == "anthropic":
            signature = quote(_signature(self._generation))
            return f'{{"type":"{kind}","signature":{signature},"format":"{form}","index":0}}'
        return _encrypted(self._generation) if self._face.style in _ENCRYPTED else None

    def _calls(self, done: int) -> list[Event]:
        """Each call's head, then its arguments in fragments; parallel calls interleave, as they do on the wire."""
        calls = self._generation.answer.calls
        total = self._generation.answer.completion_tokens
        deltas = [self._call_head(index, call) for index, call in enumerate(calls)]
        queues = [_fragments(call.arguments) for call in calls]
        for turn in range(max(map(len, queues))):
            deltas += [_call_fragment(index, queue[turn]) for index, queue in enumerate(queues) if turn < len(queue)]
        step = (total - done) / len(deltas)
        return [
            Event(self._delta(f'"content":null,"role":"assistant","tool_calls":[{delta}]'), done + round(step * number))
            for number, delta in enumerate(deltas, start=1)
        ]

    def _call_head(self, index: int, call: CalledTool) -> str:
        return (
            f'{{"index":{index},"id":"{call.id}","type":"function",'
            f'"function":{{"name":{quote(call.name)},"arguments":""}}}}'
        )


def _call_fragment(index: int, fragment: str) -> str:
    return f'{{"index":{index},"function":{{"arguments":{quote(fragment)}}}}}'


def _fragments(arguments: str) -> list[str]:
    """Cuts at uneven places, so that escapes and numbers get split."""
    size = max(_MAX_FRAGMENT, len(arguments) // 8)
    return [arguments[at : at + size] for at in range(0, len(arguments), size)]


# Catalog, key, credits, generation.


def models(catalog: Sequence[SimulatedModel], *, total: int, next_url: str | None) -> bytes:
    """A page of the model list."""
    data = [_model(model) for model in catalog]
    return encode({"data": data, "total_count": total, "links": {"next": next_url}})


def one_model(model: SimulatedModel) -> bytes:
    """The entry of one model."""
    return encode({"data": _model(model)})


def model_count(count: int) -> bytes:
    """The number of models."""
    return encode({"data": {"count": count}})


def _model(model: SimulatedModel) -> dict[str, object]:
    return {
        "id": model.id,
        "canonical_slug": model.id.partition(":")[0],
        "hugging_face_id": model.hugging_face_id,
        "name": model.name,
        "created": model.created,
        "description": model.description,
        "context_length": model.context_length,
        "architecture": {
            "modality": f"{'+'.join(model.inputs)}->{'+'.join(model.outputs)}",
            "input_modalities": list(model.inputs),
            "output_modalities": list(model.outputs),
            "tokenizer": model.tokenizer,
            "instruct_type": None,
        },
        "pricing": _pricing(model),
        "top_provider": {
            "context_length": model.context_length,
            "max_completion_tokens": model.max_completion_tokens,
            "is_moderated": model.style in {"openai", "anthropic"},
        },
        "per_request_limits": None,
        "supported_parameters": supported_parameters(model),
        "default_parameters": {},
        "supported_voices": None,
        "knowledge_cutoff": model.knowledge_cutoff,
        "expiration_date": None,
        "links": {"details": f"/api/v1/models/{model.id}/endpoints"},
    }


def _pricing(model: SimulatedModel) -> dict[str, str]:
    pricing = {
        "prompt": decimal_string(model.prompt_nanousd),
        "completion": decimal_string(model.completion_nanousd),
    }
    if model.request_nanousd:
        pricing["request"] = decimal_string(model.request_nanousd)
    if model.cache_read_nanousd is not None:
        pricing["input_cache_read"] = decimal_string(model.cache_read_nanousd)
    return pricing


def supported_parameters(model: SimulatedModel) -> list[str]:
    """What requests to the model may have."""
    if model.outputs == ("embeddings",):
        return ["dimensions"]
    names = ["max_tokens", "response_format", "seed", "stop", "structured_outputs", "temperature"]
    names += ["tool_choice", "tools", "top_p"]
    return sorted([*names, "include_reasoning", "reasoning"]) if model.reasoning else names


def endpoints(model: SimulatedModel, *, is_known: bool) -> bytes:
    """Who offers a model. Speeds are told to those only who have a key."""
    entry = _model(model)
    data = {name: entry[name] for name in ("id", "name", "created", "description", "architecture")}
    return encode({"data": {**data, "endpoints": [_endpoint(model, is_known=is_known)]}})


def endpoint_list(catalog: Sequence[SimulatedModel], *, is_known: bool) -> bytes:
    """The endpoints of several models."""
    return encode({"data": [_endpoint(model, is_known=is_known) for model in catalog]})


def _endpoint(model: SimulatedModel, *, is_known: bool) -> dict[str, object]:
    is_open = model.hugging_face_id is not None
    return {
        "name": f"{model.provider} | {model.served_as}",
        "model_id": model.id,
        "model_name": model.name,
        "context_length": model.context_length,
        "pricing": {**_pricing(model), "discount": 0},
        "provider_name": model.provider,
        "tag": f"{provider_slug(model.provider)}/fp8" if is_open else provider_slug(model.provider),
        "quantization": "fp8" if is_open else "unknown",
        "max_completion_tokens": model.max_completion_tokens,
        "max_prompt_tokens": None,
        "supported_parameters": supported_parameters(model),
        "status": 0,
        "uptime_last_5m": 100,
        "uptime_last_30m": raw_number(99.98),
        "uptime_last_1d": raw_number(99.93),
        "supports_implicit_caching": model.cache_read_nanousd is not None,
        "supports_tool_choice": {"auto": True, "none": True, "required": True, "function": True},
        "supports_diarization": False,
        "native_tools": {},
        "service_tier": None,
        "latency_last_30m": {"p50": 420, "p75": 610, "p90": 980, "p99": 2100} if is_known else None,
        "throughput_last_30m": {"p50": 71, "p75": 58, "p90": 40, "p99": 17} if is_known else None,
    }


def provider_slug(name: str) -> str:
    """The name of a provider as requests write it."""
    return name.lower().replace(" ", "-").replace(".", "-")


def providers(names: Sequence[str]) -> bytes:
    """The list of providers."""
    data = [
        {
            "name": name,
            "slug": provider_slug(name),
            "privacy_policy_url": f"https://{provider_slug(name)}.example/privacy",
            "terms_of_service_url": f"https://{provider_slug(name)}.example/terms",
            "status_page_url": None,
            "headquarters": "US",
            "datacenters": ["US"],
        }
        for name in names
    ]
    return encode({"data": data})


def credit_balance(bought_nanousd: int, used_nanousd: int) -> bytes:
    """What was bought and what was used."""
    return encode({"data": {"total_credits": raw_dollars(bought_nanousd), "total_usage": raw_dollars(used_nanousd)}})


def key(label: str, used_nanousd: int, *, free_requests: tuple[int, int] = (0, 1_000)) -> bytes:
    """What the key that asks may do; it has no limit. *free_requests* are used and allowed today."""
    free_used, free_limit = free_requests
    used = raw_dollars(used_nanousd)
    data: dict[str, object] = {
        "label": label,
        "is_management_key": False,
        "is_provisioning_key": False,
        "limit": None,
        "limit_reset": None,
        "limit_remaining": None,
        "include_byok_in_limit": False,
        "usage": used,
        "usage_daily": used,
        "usage_weekly": used,
        "usage_monthly": used,
        "byok_usage": 0,
        "byok_usage_daily": 0,
        "byok_usage_weekly": 0,
        "byok_usage_monthly": 0,
        "is_free_tier": False,
        "expires_at": None,
        "creator_user_id": "user_2sim0000000000000000000000",
        "organization_id": None,
        "workspace_id": "00000000-0000-4000-8000-000000000001",
        "allowed_data_regions": ["global"],
        "free_model_daily_requests": {"used": free_used, "limit": free_limit, "remaining": free_limit - free_used},
        "rate_limit": {
            "requests": -1,
            "interval": "10s",
            "note": "This field is deprecated and safe to ignore.",
        },
        # Newer than the captured replies; the official SDK needs both.
        "budgets": [],
        "effective_budget": None,
    }
    return encode({"data": data})
