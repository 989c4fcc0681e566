"""Strings that nobody gets to see: keys, passwords, tokens."""

from __future__ import annotations

from typing import NoReturn

from .errors import ConfigError

__all__ = ["Secret", "is_header_text"]


class Secret:
    """A string that shows itself nowhere: not in a repr, a format, a pickle or a traceback's locals."""

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        if not isinstance(value, str):
            raise ConfigError(f"a Secret is made of a str, not of a {type(value).__name__}")
        self.__value = value

    def reveal(self) -> str:
        """The string itself."""
        return self.__value

    def stripped(self) -> Secret:
        """The same without white space around it."""
        return Secret(self.__value.strip())

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it to keep secret."""
        return not self.__value.strip()

    @property
    def is_header_text(self) -> bool:
        """Whether it can stand in an HTTP header."""
        return is_header_text(self.__value)

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.__value == other.__value

    def __hash__(self) -> int:
        return hash((Secret, self.__value))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")


def is_header_text(value: str) -> bool:
    """Whether it can stand in an HTTP header."""
    return value.isascii() and value.isprintable()
