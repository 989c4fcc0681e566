"""Completions, from before there were chats, on the way of chats: a chat of one message of a user, for who looks at it.

What extensions make of that message is the prompt, and what they make of the options holds as in a chat. There are no
tools: those that an extension brings are not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from msgspec import UNSET

from ._turns.chain import ChatState
from ._turns.request import TurnRequest
from .errors import BadRequestError, GorouterError
from .wire.codec import decode_json, encode_message, encode_text_prompt, settings_of_whole
from .wire.messages import AssistantMessage, UserMessage
from .wire.result import ChatResult, CompletionResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._pipeline import ChatPipeline
    from ._turns.chain import Chain
    from .runtime_events import ChatContext
    from .wire.mail import CallSettings

    Send = Callable[[bytes, CallSettings], Awaitable[CompletionResult]]

__all__ = ["run_completion"]


async def run_completion(
    prompt: str, options: bytes, *, settings: CallSettings, chain: Chain, pipeline: ChatPipeline, send: Send
) -> CompletionResult:
    """What follows `prompt`, by `send`, inside what is put around chats.

    Raises `BadRequestError` for what is no prompt, also where an extension has made it so, the errors of `send` and of
    the extensions.
    """
    body = encode_text_prompt(prompt, options)
    if chain.is_empty:
        return await send(body, settings)
    request = TurnRequest(options, (encode_message(UserMessage(prompt)),), settings=settings)
    context = chain.context_of(request, is_completion=True)
    if not chain.only_notes:
        return await _looked_at(request, context, chain=chain, send=send)
    try:
        result = await send(body, settings)
    except GorouterError as exc:
        pipeline.note(context, request.pieces, exc)
        raise
    pipeline.note(context, request.pieces, _as_chat(result))
    return result


async def _looked_at(request: TurnRequest, context: ChatContext, *, chain: Chain, send: Send) -> CompletionResult:
    state = ChatState(request.options, request.messages())
    answers: list[tuple[CompletionResult, ChatResult]] = []

    async def ask() -> None:
        answer = await send(*_encoded(state, request))
        answers.append((answer, _as_chat(answer)))
        state.result = answers[0][1]

    result = await chain.run(context, state, ask)
    if answers and result is answers[0][1]:
        return answers[0][0]
    return CompletionResult(text=result.text, call=result.call, reasoning=result.reasoning)


def _encoded(state: ChatState, request: TurnRequest) -> tuple[bytes, CallSettings]:
    """The body that extensions have left, and its settings."""
    options, messages = state.encoded()
    settings = request.settings
    if options is not request.options:
        settings = settings_of_whole(state.options, settings)
    return encode_text_prompt(_prompt_of(messages), options), settings


def _prompt_of(messages: bytes) -> str:
    found = cast("list[dict[str, object]]", decode_json(b"[%b]" % messages))
    content = found[0].get("content") if len(found) == 1 and found[0].get("role") == "user" else None
    if not isinstance(content, str):
        raise BadRequestError(
            "messages: a completion has one message of a user, whose text is the prompt; an extension has left others",
            status=400,
        )
    return content


def _as_chat(result: CompletionResult) -> ChatResult:
    reasoning = UNSET if result.reasoning is None else result.reasoning
    return ChatResult(message=AssistantMessage(result.text, reasoning=reasoning), call=result.call)
