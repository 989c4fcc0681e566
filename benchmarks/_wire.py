"""What goes over the wire in every benchmark: one request, one plain reply, one streamed reply, and what is checked."""

from __future__ import annotations

import json
from typing import Final

MODEL: Final = "openai/gpt-4o-mini"
PROMPT: Final = (
    "A lighthouse keeper logs 14 ships on Monday and half as many on Tuesday; on Wednesday fog keeps all but three in "
    "the harbour. Say in one paragraph how many ships passed in all, and explain each step for a reader of ten years."
)
MESSAGES: Final = [{"role": "user", "content": PROMPT}]
PATH: Final = "/api/v1"
API_KEY: Final = "sk-benchmark"
FINISH: Final = "stop"
TEXT_CHUNKS: Final = 200
"""Deltas with text in a streamed reply; a first one without text, the finish and the usage come on top."""

_WORDS: Final = ("the", "tide", "turns", "at", "four", "and", "every", "ship", "beyond", "the", "bar", "comes", "in")
_HEAD: Final = {
    "id": "gen-1795300001-Kq3VtR8mZx1LwPd7NyB2",
    "created": 1795300001,
    "model": "openai/gpt-4o-mini-2024-07-18",
    "provider": "OpenAI",
}
_USAGE: Final = {
    "prompt_tokens": 64,
    "completion_tokens": TEXT_CHUNKS,
    "total_tokens": 64 + TEXT_CHUNKS,
    "cost": 0.0001296,
    "is_byok": False,
    "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, "audio_tokens": 0, "video_tokens": 0},
    "cost_details": {
        "upstream_inference_cost": 0.0001296,
        "upstream_inference_prompt_cost": 0.0000096,
        "upstream_inference_completions_cost": 0.00012,
    },
    "completion_tokens_details": {"reasoning_tokens": 0, "image_tokens": 0, "audio_tokens": 0},
}
_HEADERS: Final = (
    b"HTTP/1.1 200 OK\r\nDate: Sun, 22 Nov 2026 12:00:00 GMT\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: keep-alive\r\nCache-Control: %b\r\nX-Generation-Id: gen-1795300001-Kq3VtR8mZx1LwPd7NyB2\r\n"
    b"Access-Control-Allow-Origin: *\r\nServer: cloudflare\r\n\r\n"
)
LAST_CHUNK: Final = b"0\r\n\r\n"


def pieces(count: int) -> list[str]:
    """The text of `count` deltas, a word each."""
    return [_WORDS[i % len(_WORDS)] + " " for i in range(count)]


PLAIN_TEXT: Final = "".join(pieces(80)).strip()
STREAM_TEXT: Final = "".join(pieces(TEXT_CHUNKS))


def request(*, streaming: bool) -> dict[str, object]:
    """The request that every contender sends, as JSON values."""
    body: dict[str, object] = {"model": MODEL, "messages": MESSAGES}
    return body | {"stream": True} if streaming else body


def framed(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def plain_body() -> bytes:
    """The JSON of the plain reply, about 1 kB."""
    message = {"role": "assistant", "content": PLAIN_TEXT, "refusal": None, "reasoning": None}
    choice = {
        "index": 0,
        "logprobs": None,
        "finish_reason": FINISH,
        "native_finish_reason": "stop",
        "message": message,
    }
    reply = _HEAD | {"object": "chat.completion", "system_fingerprint": None, "choices": [choice], "usage": _USAGE}
    return _compact(reply)


def plain_reply() -> bytes:
    """The plain reply as it goes out."""
    return _HEADERS % (b"application/json", b"private, no-store") + framed(plain_body()) + LAST_CHUNK


def stream_head() -> bytes:
    """The head of the streamed reply."""
    return _HEADERS % (b"text/event-stream", b"no-cache")


def stream_events() -> list[bytes]:
    """The streamed reply, event by event, `[DONE]` included."""
    chunks = [_chunk({"content": text, "role": "assistant"}, None) for text in ["", *pieces(TEXT_CHUNKS)]]
    last = _chunk({"content": "", "role": "assistant"}, FINISH)
    chunks += [last, last | {"usage": _USAGE}]
    return [b"data: %b\n\n" % _compact(chunk) for chunk in chunks] + [b"data: [DONE]\n\n"]


def _chunk(delta: dict[str, str], finish: str | None) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "native_finish_reason": finish}
    return _HEAD | {"object": "chat.completion.chunk", "choices": [choice]}


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
