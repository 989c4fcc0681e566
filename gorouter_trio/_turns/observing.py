"""Chats that have ended, as observers see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from ..errors import GorouterError
from ..runtime_events import ChatContext
from ..wire.codec import split_list, split_object
from ..wire.result import ChatResult

if TYPE_CHECKING:
    from .request import TurnRequest

__all__ = ["EndedChat", "NotedChat"]

_Messages: TypeAlias = Sequence[bytes | bytearray] | bytes | int

NotedChat: TypeAlias = (
    "tuple[ChatContext | TurnRequest, bool, _Messages, float, ChatResult[object] | None, GorouterError | None]"
)
"""What is noted when a chat ends: what it was, whether streamed, its messages, when it ended, and how.

A request stands for the context of a chat that nobody has looked at before. The messages are those that were sent, in
pieces that do not change any more, or the whole body that was sent, or their number. A plain tuple, since nothing costs
less on the way of a chat.
"""


class EndedChat(Struct, eq=False):
    """A chat, stream or session turn that has ended: with a `result`, or with an `error`.

    `context` is what it was, `at_s` when it ended, in wall-clock seconds since the epoch.
    """

    context: ChatContext
    _messages: _Messages
    at_s: float
    result: ChatResult[object] | None
    error: GorouterError | None

    def __repr__(self) -> str:
        return f"<EndedChat {self.context.chat_id}>"

    @property
    def message_count(self) -> int:
        """How many messages the request had, the history of a session included."""
        if not isinstance(self._messages, int):
            self._messages = _count(self._messages)
        return self._messages


def _count(pieces: Sequence[bytes | bytearray] | bytes) -> int:
    if isinstance(pieces, bytes):
        return len(split_list(split_object(pieces)["messages"]))
    # Messages are objects: where only one begins, there is one.
    if len(pieces) == 1 and pieces[0].count(b"{") == 1:
        return 1
    return len(split_list(b"[%b]" % b",".join(piece for piece in pieces if piece)))
