"""What requests have that say nothing else: the defaults of a client, which may change while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BadRequestError
from ..wire.codec import encode_call, encode_json, encode_message, join_options
from ..wire.messages import SystemMessage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..config import ClientConfig
    from ..wire.mail import CallSettings
    from ..wire.requests import ChatKeywords
    from .request import EncodedTurn, TurnEncoder

__all__ = ["CallDefaults"]


class CallDefaults:
    """The defaults of one client. What they are at the start of a request holds to its end.

    `number` counts the changes, so that whoever has encoded something above them knows whether it still holds.
    """

    __slots__ = ("_encoder", "_has_only_model", "encoded", "number", "settings", "system")

    encoded: bytes
    settings: CallSettings

    def __init__(self, config: ClientConfig, encoder: TurnEncoder) -> None:
        self._encoder = encoder
        self.number = -1
        self.system = encode_json(SystemMessage(config.system)) if config.system else b""
        self.change(config)

    def change(self, config: ClientConfig) -> None:
        """Take those of `config` for what is asked from now on; raises `ConfigError`, having changed nothing."""
        self.encoded, self.settings = config.call_defaults()
        self._has_only_model = self.encoded == encode_json({"model": config.model})
        self.number += 1

    def call(self, options: ChatKeywords) -> tuple[bytes, CallSettings]:
        """The options of a call above the defaults, encoded, and what is not part of its body."""
        if not options:
            return self.encoded, self.settings
        encoded, settings = encode_call(options, beneath=self.settings)
        return self._joined(encoded, "model" in options), settings

    def turn(self, options: Mapping[str, object]) -> EncodedTurn:
        """The same for a turn, with its extras."""
        if not options:
            return self.encoded, self.settings, None
        encoded, settings, extras = self._encoder.encode(options, beneath=self.settings)
        return self._joined(encoded, "model" in options), settings, extras

    def system_message(self, system: str | None) -> bytes:
        """The encoded system message of a conversation that names this one: an empty text is none.

        Raises `BadRequestError` for what is no text.
        """
        if system is None:
            return self.system
        if not isinstance(system, str):
            raise BadRequestError(f"system: must be a text, not a {type(system).__name__}", status=400)
        return encode_message(SystemMessage(system)) if system else b""

    def _joined(self, encoded: bytes, has_model: bool) -> bytes:
        return encoded if self._has_only_model and has_model else join_options(self.encoded, encoded)
