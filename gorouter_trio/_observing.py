"""Chats that have ended, as observers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .wire.codec import split_list

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._turns import TurnRequest
    from .errors import GorouterError
    from .runtime_events import ChatContext
    from .wire.result import ChatResult

__all__ = ["EndedChat", "NotedChat"]


class NotedChat(NamedTuple):
    """What is noted when a chat ends: what it was, the messages of its request, and how it ended.

    A request stands for the context of a chat that nobody has looked at before.
    """

    context: ChatContext | TurnRequest
    messages: Sequence[bytes | bytearray] | int
    at_s: float
    result: ChatResult[object] | None
    error: GorouterError | None


class EndedChat:
    """A chat, stream or session turn that has ended: with a `result`, or with an `error`.

    `context` is what it was, `at_s` when it ended, in wall-clock seconds since the epoch.
    """

    __slots__ = ("_messages", "at_s", "context", "error", "result")

    def __init__(self, noted: NotedChat, context: ChatContext) -> None:
        self.context = context
        self._messages = noted.messages
        self.at_s = noted.at_s
        self.result = noted.result
        self.error = noted.error

    @property
    def message_count(self) -> int:
        """How many messages the request had, the history of a session included."""
        if not isinstance(self._messages, int):
            self._messages = len(split_list(b"[%b]" % b",".join(piece for piece in self._messages if piece)))
        return self._messages
