"""A judge of histories: would a provider take these messages as the messages of a request?

The rules are what OpenAI, Anthropic and DeepSeek answer 400 or 422 to when a request reaches them through a
chat-completions interface, each found in reports of real refusals. OpenRouter passes such refusals on as "Provider
returned error". Not judged, because OpenRouter translates it: the place and number of system messages (Anthropic wants
one of its own, Anthropic's and DeepSeek's roles have no `developer`), images and files. Not judged either, because it
depends on the model: two user messages in a row (an early deepseek-reasoner), reasoning that has to come back.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, Literal, TypeAlias, cast, final

from msgspec import Struct

from ..errors import DecodeError
from ..wire.codec import decode_json, encode_json
from ..wire.messages import Message
from ..wire.result import HistoryEntry

__all__ = ["PROVIDERS", "History", "InvalidHistoryError", "Provider", "check_history", "validate_history"]

Provider = Literal["openai", "anthropic", "deepseek"]
"""Whose refusals a rule stands for."""

PROVIDERS: Final[tuple[Provider, ...]] = ("openai", "anthropic", "deepseek")

History: TypeAlias = bytes | str | Mapping[str, object] | Sequence[Message | HistoryEntry | Mapping[str, object]]
"""The messages of a request: as values, as mappings in wire names, or encoded."""

_Object: TypeAlias = Mapping[str, object]
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_INSTRUCTIONS: Final = frozenset({"system", "developer"})
_WORD: Final = re.compile(r"[A-Za-z0-9_-]+")
_MAX_ID: Final = 40
_MAX_NAME: Final = 64
_SHOWN: Final = 60


class InvalidHistoryError(AssertionError):
    """A history that a provider would refuse; `problems` are the lines of `check_history`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("a provider would refuse these messages:\n" + "\n".join(problems))
        self.problems = tuple(problems)


def check_history(
    messages: History, *, providers: Collection[Provider] = PROVIDERS, allow_prefill: bool = True
) -> list[str]:
    """What the providers would refuse in these messages, a line each in the order of the messages; empty is valid.

    `messages` are the messages of one request: values of `wire.messages`, mappings in wire names, `HistoryEntry`
    values, or encoded: a request body, a JSON array, or messages joined by commas. No messages at all are a valid
    history, but not a valid body. A line names the message by its index, the problem, and who refuses it.
    Without `allow_prefill`, the last message may not be the assistant's (Anthropic since Claude 4.6).

    The rules, and who refuses what breaks them (the functions below have one each):

    * a role is one of five, and there (all); more than instructions (Anthropic)
    * each tool call is answered by a tool message directly after it, among tool messages only (all), once (Anthropic,
      DeepSeek); a tool message answers a call of the message it follows (all)
    * ids of calls are there and not empty (all), unique in the whole request (Anthropic, DeepSeek), of letters, digits,
      `_` and `-` (Anthropic), at most 40 characters (OpenAI)
    * a list of calls is not empty (OpenAI, DeepSeek); names are there (all) and of 1 to 64 letters, digits, `_` and `-`
      (OpenAI, Anthropic); arguments are a string (all), which is empty or a JSON object (Anthropic)
    * content is text or parts (all); it is null only beside tool calls (all), or beside a refusal (OpenAI); it is not
      blank in a message of a user, in instructions, or in an assistant's message without calls (Anthropic); a text part
      is never empty (Anthropic), and a list of parts has parts (OpenAI, Anthropic)
    """
    history = _read(messages)
    wanted = [provider for provider in PROVIDERS if provider in providers]
    lines = []
    for finding in sorted(_findings(history, allow_prefill=allow_prefill), key=lambda found: found.index):
        refusing = [provider for provider in wanted if provider in finding.providers]
        if refusing:
            where = f"messages[{finding.index}]" if finding.index >= 0 else "messages"
            lines.append(f"{where}: {finding.text} [{', '.join(refusing)}]")
    return lines


def validate_history(
    messages: History, *, providers: Collection[Provider] = PROVIDERS, allow_prefill: bool = True
) -> None:
    """Raise `InvalidHistoryError` for messages in which `check_history` finds a problem."""
    problems = check_history(messages, providers=providers, allow_prefill=allow_prefill)
    if problems:
        raise InvalidHistoryError(problems)


class _Finding(Struct, frozen=True):
    """`index` is the message, -1 for the request as a whole."""

    index: int
    text: str
    providers: tuple[Provider, ...] = PROVIDERS


class _Read(Struct, frozen=True):
    """Messages as JSON has them; `fault` says why they could not be read."""

    messages: Sequence[object] = ()
    fault: str = ""
    is_body: bool = False


# Reading


def _read(messages: History) -> _Read:
    if isinstance(messages, str):
        messages = messages.encode("utf-8", "surrogatepass")
    if isinstance(messages, (bytes, bytearray, memoryview)):
        return _read_bytes(bytes(messages))
    if isinstance(messages, Mapping):
        return _read_body(messages)
    plain: list[object] = []
    for message in messages:
        try:
            plain.append(_plain(message))
        except (TypeError, ValueError, RecursionError, DecodeError) as exc:
            return _Read(plain, f"message {len(plain)} cannot be written as JSON: {exc}")
    return _Read(plain)


def _read_bytes(data: bytes) -> _Read:
    try:
        value = decode_json(data)
    except DecodeError as exc:
        return _read_joined(data) or _Read(fault=exc.message, is_body=True)
    if isinstance(value, list):
        return _Read(value)
    if isinstance(value, dict):
        return _Read([value]) if "role" in value and "messages" not in value else _read_body(value)
    return _Read(fault="a request body is a JSON object", is_body=True)


def _read_joined(data: bytes) -> _Read | None:
    """Encoded messages joined by commas, as a transcript renders them."""
    try:
        messages = cast("list[object]", decode_json(b"[%b]" % data))
    except DecodeError:
        return None
    return _Read(messages) if messages else None


def _read_body(body: Mapping[str, object]) -> _Read:
    messages = body.get("messages")
    if not isinstance(messages, (list, tuple)):
        return _Read(fault="a request body has a list of messages", is_body=True)
    inner = _read(messages)
    return _Read(inner.messages, inner.fault, is_body=True)


def _plain(message: object) -> object:
    """A message as decoded JSON: what the provider's own parser would see."""
    if isinstance(message, HistoryEntry):
        message = message.message
    return decode_json(encode_json(message))


# The whole request


def _findings(history: _Read, *, allow_prefill: bool) -> Iterator[_Finding]:
    if history.fault:
        yield _Finding(-1, history.fault)
    messages = [message if isinstance(message, dict) else {} for message in history.messages]
    yield from _request(history, messages, allow_prefill=allow_prefill)
    for index, (raw, message) in enumerate(zip(history.messages, messages, strict=True)):
        if not isinstance(raw, dict):
            yield _Finding(index, f"a message is an object, not {_show(raw)}")
            continue
        for check in (_role, _content, _calls):
            yield from check(index, message)
    yield from _unique_ids(messages)
    for group in _groups(messages):
        yield from _pairing(group, messages)


def _request(history: _Read, messages: Sequence[_Object], *, allow_prefill: bool) -> Iterator[_Finding]:
    """OpenAI, Anthropic and DeepSeek want a message; Anthropic one that is no instruction; Claude 4.6 the last word
    for somebody else than the assistant.

    github.com/run-llama/llama_index/issues/9373, arthur-ai/arthur-engine/pull/1302, mario-andreschak/FLUJO/issues/283.
    """
    if not messages:
        if history.is_body and not history.fault:
            yield _Finding(-1, "a request needs at least one message")
    elif all(message.get("role") in _INSTRUCTIONS for message in messages if isinstance(message.get("role"), str)):
        yield _Finding(-1, "there are only instructions, no message of a user or the assistant", ("anthropic",))
    if messages and not allow_prefill and messages[-1].get("role") == "assistant":
        yield _Finding(len(messages) - 1, "the assistant has the last word (a prefill)", ("anthropic",))


# One message


def _role(index: int, message: _Object) -> Iterator[_Finding]:
    """OpenAI, Anthropic and DeepSeek refuse a role that they do not know.

    github.com/0xPlaygrounds/rig/issues/368, NyarchLinux/NyarchAssistant/issues/157.
    """
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        yield _Finding(index, f"unknown role {_show(role)}" if "role" in message else "a message needs a role")


def _content(index: int, message: _Object) -> Iterator[_Finding]:
    """OpenAI and DeepSeek refuse null, Anthropic blanks as well, where nothing else stands in the content's place.

    github.com/vercel/ai/pull/13744 and run-llama/llama_index/issues/17555 (OpenAI, null), carlrobertoh/ProxyAI/
    issues/834 (DeepSeek, null), LibreChat-AI/agents/pull/124 (Anthropic's rules on blanks, tried out), charmbracelet/
    crush/issues/910 (null through OpenRouter).
    """
    content = message.get("content")
    role = message.get("role")
    if isinstance(content, list):
        yield from _parts(index, content, is_tool=role == "tool")
    elif content is None:
        yield from _null(index, message)
    elif not isinstance(content, str):
        yield _Finding(index, f"content is text or a list of parts, not {_show(content)}")
    elif not content.strip() and not (role == "tool" or _stands_in(message)):
        yield _Finding(index, "content is blank", ("anthropic",))


def _null(index: int, message: _Object) -> Iterator[_Finding]:
    if message.get("role") == "assistant" and _stands_in(message):
        return
    refused = message.get("role") == "assistant" and bool(message.get("refusal"))
    what = "content is null" if "content" in message else "content is missing"
    yield _Finding(index, what, ("anthropic", "deepseek") if refused else PROVIDERS)


def _stands_in(message: _Object) -> bool:
    """Whether something beside the content makes it unnecessary."""
    return message.get("role") == "assistant" and any(message.get(name) for name in ("tool_calls", "images", "audio"))


def _parts(index: int, parts: list[object], *, is_tool: bool) -> Iterator[_Finding]:
    """Anthropic refuses an empty text part anywhere, and content whose only text is blank (a tool's may be); OpenAI and
    Anthropic refuse a list without parts.

    github.com/anthropics/claude-code/issues/59812, LibreChat-AI/agents/pull/124, UKGovernmentBEIS/inspect_ai/pull/832.
    """
    if not parts and not is_tool:
        yield _Finding(index, "content has no parts", ("openai", "anthropic"))
    texts = []
    for position, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str):
            yield _Finding(index, f"content[{position}] is no part: {_show(part)}")
        elif kind == "text":
            texts.append(part.get("text"))
            if not isinstance(texts[-1], str):
                yield _Finding(index, f"content[{position}].text is no string: {_show(texts[-1])}")
            elif not texts[-1]:
                yield _Finding(index, f"content[{position}].text is empty", ("anthropic",))
    blank = bool(texts) and all(isinstance(text, str) and text and not text.strip() for text in texts)
    if blank and len(texts) == len(parts) and not is_tool:
        yield _Finding(index, "content is blank", ("anthropic",))


def _calls(index: int, message: _Object) -> Iterator[_Finding]:
    """OpenAI and DeepSeek refuse an empty list of calls.

    github.com/openai/openai-node/pull/1341, NousResearch/hermes-agent/issues/84365 (DeepSeek).
    """
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        yield _Finding(index, f"tool_calls is a list, not {_show(calls)}")
    elif message.get("role") != "assistant":
        yield _Finding(index, f"only the assistant calls tools, not {_show(message.get('role'))}")
    elif not calls:
        yield _Finding(index, "tool_calls is an empty list", ("openai", "deepseek"))
    else:
        for position, call in enumerate(calls):
            for text, providers in _call(call if isinstance(call, dict) else {}):
                yield _Finding(index, f"tool_calls[{position}]{text}", providers)


_Fault: TypeAlias = tuple[str, tuple[Provider, ...]]


def _call(call: _Object) -> Iterator[_Fault]:
    """OpenAI wants ids of at most 40 characters, Anthropic ids of letters, digits, `_` and `-`; all want one.

    github.com/vercel/ai/issues/5171 (length), maximhq/bifrost/issues/5097 (letters), anomalyco/opencode/issues/1279
    (empty).
    """
    call_id = call.get("id")
    if not isinstance(call_id, str) or not call_id:
        yield f".id must be a string that is not empty, not {_show(call_id)}", PROVIDERS
    else:
        if not _WORD.fullmatch(call_id):
            yield f".id {_show(call_id)} has more than letters, digits, _ and -", ("anthropic",)
        if len(call_id) > _MAX_ID:
            yield f".id {_show(call_id)} is longer than {_MAX_ID} characters", ("openai",)
    if call.get("type") == "function":
        yield from _function(call.get("function"))
    else:
        yield f".type is 'function', not {_show(call.get('type'))}", PROVIDERS


def _function(function: object) -> Iterator[_Fault]:
    """OpenAI wants a name and arguments that are a string; Anthropic's input must be an object.

    github.com/continuedev/continue/issues/9784 (name), aaif-goose/goose-mobile/pull/20 (a string),
    CopilotKit/CopilotKit/issues/3300 and prism-php/prism/issues/659 (an object).
    """
    if not isinstance(function, dict):
        yield f".function is an object, not {_show(function)}", PROVIDERS
        return
    name = function.get("name")
    if not isinstance(name, str) or not name:
        yield f".function.name must be a string that is not empty, not {_show(name)}", PROVIDERS
    elif not _WORD.fullmatch(name) or len(name) > _MAX_NAME:
        yield f".function.name {_show(name)} is not 1 to 64 letters, digits, _ and -", ("openai", "anthropic")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        yield f".function.arguments is a string, not {_show(arguments)}", PROVIDERS
    elif arguments.strip() and not _is_object(arguments):
        yield f".function.arguments is no JSON object: {_show(arguments)}", ("anthropic",)


def _is_object(text: str) -> bool:
    try:
        return isinstance(decode_json(text), dict)
    except DecodeError:
        return False


# Calls and their answers


@final
class _Group:
    """A run of tool messages, and the message with the calls in front of it (None for a run that stands alone)."""

    __slots__ = ("answers", "calls", "index")

    def __init__(self, index: int | None, calls: list[str]) -> None:
        self.index = index
        self.calls = calls
        self.answers: list[int] = []


def _groups(messages: Sequence[_Object]) -> Iterator[_Group]:
    group: _Group | None = None
    for index, message in enumerate(messages):
        if message.get("role") == "tool":
            group = group or _Group(None, [])
            group.answers.append(index)
            continue
        if group is not None:
            yield group
        calls = _call_ids(message)
        group = _Group(index, calls) if calls else None
    if group is not None:
        yield group


def _call_ids(message: _Object) -> list[str]:
    calls = message.get("tool_calls")
    if message.get("role") != "assistant" or not isinstance(calls, list):
        return []
    ids = [call.get("id") for call in calls if isinstance(call, dict)]
    return [call_id for call_id in ids if isinstance(call_id, str) and call_id]


def _unique_ids(messages: Sequence[_Object]) -> Iterator[_Finding]:
    """Anthropic and DeepSeek refuse an id that names two calls, in one message or in two.

    github.com/anthropics/claude-code/issues/28515, craft-ai-agents/craft-agents-oss/issues/630 (which says that OpenAI
    takes it).
    """
    seen: dict[str, int] = {}
    for index, message in enumerate(messages):
        for call_id in _call_ids(message):
            if call_id in seen:
                where = f"messages[{seen[call_id]}]" if seen[call_id] != index else "the same message"
                yield _Finding(index, f"the id {_show(call_id)} names a call of {where} too", ("anthropic", "deepseek"))
            seen.setdefault(call_id, index)


def _pairing(group: _Group, messages: Sequence[_Object]) -> Iterator[_Finding]:
    """OpenAI, Anthropic and DeepSeek refuse a call without its answer directly after it, and an answer without its call
    directly before it; Anthropic and DeepSeek refuse a second answer.

    github.com/sdcb/chats/pull/132 (OpenAI, both ways), anthropics/claude-code/issues/8210 and 13460 (Anthropic, both),
    TurixAI/TuriX-CUA/issues/15 and qwersyk/Newelle/issues/425 (DeepSeek, both), craft-ai-agents/craft-agents-oss/
    issues/621 (DeepSeek, twice), langchain-ai/langchain/issues/22600 (OpenAI, no id).
    """
    answered: set[str] = set()
    for index in group.answers:
        call_id = messages[index].get("tool_call_id")
        if not isinstance(call_id, str) or not call_id:
            yield _Finding(index, f"tool_call_id must be a string that is not empty, not {_show(call_id)}")
        elif call_id not in group.calls:
            yield _Finding(index, _stray(call_id, messages[:index]))
        elif call_id in answered:
            yield _Finding(index, f"the call {_show(call_id)} was answered before", ("anthropic", "deepseek"))
        else:
            answered.add(call_id)
    for call_id in dict.fromkeys(group.calls):
        if call_id not in answered and group.index is not None:
            yield _Finding(group.index, f"the call {_show(call_id)} has no answer directly after it")


def _stray(call_id: str, before: Sequence[_Object]) -> str:
    made = any(call_id in _call_ids(message) for message in before)
    if made:
        return f"the tool message for {_show(call_id)} does not directly follow its call"
    return f"the tool message for {_show(call_id)} answers no call before it"


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
