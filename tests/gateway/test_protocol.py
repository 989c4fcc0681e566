"""The protocol and its page: both are held to the Structs.

Also a script: `python tests/gateway/test_protocol.py` writes the parts of docs/protocol.md that are made from them.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from gorouter_trio import errors, events
from gorouter_trio.errors import DecodeError, GorouterError, RateLimitError, TurnParkedError
from gorouter_trio.gateway.failures import ERROR_CODES, error_info, error_of
from gorouter_trio.gateway.protocol import (
    CLOSE_CODES,
    AskOptions,
    ClientMessage,
    Done,
    Event,
    Failed,
    ServerMessage,
    decode_client_message,
    decode_server_message,
    encode_text,
    protocol_schema,
)
from gorouter_trio.wire.messages import AssistantMessage
from gorouter_trio.wire.requests import ChatOptions
from gorouter_trio.wire.responses import Usage
from gorouter_trio.wire.result import CallRecord, ChatResult

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"


def tables() -> dict[str, str]:
    """The parts of the page that are made from the Structs, by name."""
    return {
        "client": _messages(ClientMessage),
        "server": _messages(ServerMessage),
        "codes": "\n".join(f"| {code} | {why} |" for code, why in sorted(CLOSE_CODES.items())),
        "errors": ", ".join(f"`{code}`" for code in ERROR_CODES),
        "schema": _schema(),
    }


def _schema() -> str:
    """One definition a line."""
    schema = protocol_schema()
    definitions = schema.pop("$defs")
    assert isinstance(definitions, dict)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in schema.items()]
    inner = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(definitions.items()))
    return "\n".join(["```json", "{", *lines, '"$defs": {', inner, "}}", "```"])


def _messages(union: object) -> str:
    rows = []
    for kind in get_args(union):
        first = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        fields = ", ".join(
            f"`{field.encode_name}`" + ("" if field.required else "?") for field in msgspec.structs.fields(kind)
        )
        rows.append(f"| `{kind.__struct_config__.tag}` | {fields} | {first} |")
    return "\n".join(rows)


def filled(page: str) -> str:
    """The page with these parts in their places."""
    for name, text in tables().items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{text}{end}{rest.partition(end)[2]}"
    return page


def test_the_page_is_that_of_the_structs() -> None:
    """Every message, field, close code, error code and the schema stand in docs/protocol.md as they are."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page), "run `python tests/gateway/test_protocol.py`"


def test_examples_of_the_page_are_messages() -> None:
    """What the page shows is what the two sides say."""
    page = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"^([<>]) (\{.*\})$", page, re.MULTILINE)
    assert len(shown) > 6
    for direction, text in shown:
        (decode_client_message if direction == ">" else decode_server_message)(text)


def test_the_schema_names_everything() -> None:
    """Each message is in the schema under its tag, and refuses fields that it does not have."""
    definitions: Any = protocol_schema()["$defs"]
    for kind in (*get_args(ClientMessage), *get_args(ServerMessage)):
        schema = definitions[kind.__name__]
        assert schema["properties"]["type"]["enum"] == [kind.__struct_config__.tag]
        assert schema["additionalProperties"] is False


def test_options_are_those_of_a_chat() -> None:
    """No option has a name of its own, but for those that are no field of a request, and none of those that are not
    the asker's to choose is there."""
    ours, theirs = set(AskOptions.__struct_fields__), set(ChatOptions.__struct_fields__)
    assert ours - theirs == {"fallbacks", "response_schema"}
    assert theirs - ours == {"session_id", "trace", "debug", "deferred_tools", "stop_server_tools_when"}


def test_a_result_comes_through_whole() -> None:
    """Messages, numbers and money are at the other end what they were."""
    raw = msgspec.Raw(b'[{"type":"reasoning.text","text":"hm","x":[1, 2]}]')
    result: ChatResult[object] = ChatResult(
        message=AssistantMessage(content="well", reasoning_details=raw),
        call=CallRecord(model="m", usage=Usage(1, 2, 3, cost=Decimal("0.000001"))),
        turn_id="t",
    )
    text = encode_text(Done(id=1, seq=2, result=result))
    found = decode_server_message(text)
    assert isinstance(found, Done)
    assert found.result.cost == Decimal("0.000001")
    assert encode_text(found) == text


EVENTS = [events.TextDelta("x"), events.ToolStarted("c", "n", "{}"), events.StreamFinished(finish_reason=None)]


@pytest.mark.parametrize("event", EVENTS)
def test_events_come_through(event: Any) -> None:
    """Likewise."""
    found = decode_server_message(encode_text(Event(id=1, seq=1, event=event)))
    assert isinstance(found, Event)
    assert found.event == event


KINDS = [kind for kind in map(vars(errors).get, errors.__all__) if isinstance(kind, type)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_come_through(kind: type[GorouterError]) -> None:
    """Every error is the same class at the other end, says the same, and can be shown."""
    error = kind.__new__(kind)
    GorouterError.__init__(error, "what was wrong")
    vars(error).update(status=418, code="x", maybe_billed=True, attempts=3, generation_id="gen-1")
    info = error_info(error)
    assert info.code in ERROR_CODES
    text = encode_text(Failed(id=1, error=info))
    failed = decode_server_message(text)
    assert isinstance(failed, Failed)
    found = error_of(failed.error)
    assert type(found) is kind
    assert (found.message, found.maybe_billed, found.attempts, found.generation_id) == (
        "what was wrong",
        True,
        3,
        "gen-1",
    )
    assert "what was wrong" in str(found)
    assert repr(found)


def test_what_errors_know_comes_through() -> None:
    """The wait that was asked for, the question that waits, the phase, the answer that had come."""
    limited = error_of(error_info(RateLimitError("x", status=429, retry_after_s=7.0)))
    assert (limited.status, limited.retry_after_s) == (429, 7.0)  # type: ignore[attr-defined]  # it is a RateLimitError
    parked = error_of(error_info(TurnParkedError("x", question_id="q")))
    assert parked.question_id == "q"  # type: ignore[attr-defined]  # it is a TurnParkedError
    for code in ("draining", "internal", "too_many_requests", "something newer"):
        assert error_of(msgspec.structs.replace(error_info(DecodeError("x")), code=code)).message == "x"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
