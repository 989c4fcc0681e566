"""Keys of sessions: whose a session is, and which of theirs, in one text that stores sort and cut by prefix.

Any text is a key. One without an owner stands for itself; a key with a tenant or a principal is written

    tenant:<tenant>/principal:<principal>/<id>

with `%`, `/` and `:` inside the two names percent-encoded. The id comes last and is any text, so it needs no
encoding, and everything of a tenant, or of a principal within it, has one prefix. The texts without an owner that
would read as the key of one are set off by a tenant and a principal without a name. So keys and texts are one to one.
"""

from __future__ import annotations

import re

from msgspec import Struct

from ..errors import ConfigError
from ..wire.codec import encode_name

__all__ = ["SessionKey", "check_key", "prefix_range"]

_NOBODY = "tenant:/principal:/"
_NAME = r"((?:[^%/:]|%25|%2F|%3A)*)"
_OWNED = re.compile(rf"(?:{_NOBODY})*tenant:{_NAME}/principal:{_NAME}/", re.DOTALL)


class SessionKey(Struct, frozen=True, kw_only=True, order=True):
    """The key of a session by its parts; `str(key)` is what stores and `client.session` take.

    A service that answers several people makes its keys so, with `tenant` and `principal` from the connection and
    never from what was said: then no `id`, whatever it says, is a session of somebody else.
    """

    tenant: str = ""
    principal: str = ""
    id: str

    def __str__(self) -> str:
        if self.tenant or self.principal:
            return f"tenant:{_quoted(self.tenant)}/principal:{_quoted(self.principal)}/{self.id}"
        return f"{_NOBODY}{self.id}" if _owned(self.id) else self.id

    @classmethod
    def parse(cls, text: str) -> SessionKey:
        """The key that `text` is."""
        owned = _owned(text)
        if owned is None:
            return cls(id=text)
        if text.startswith(_NOBODY):
            return cls(id=text[len(_NOBODY) :])
        tenant, principal = map(_unquoted, owned.groups())
        return cls(tenant=tenant, principal=principal, id=text[owned.end() :])

    @staticmethod
    def prefix(*, tenant: str, principal: str | None = None) -> str:
        """What the keys of a tenant begin with, or those of a principal within it.

        A key without an owner may begin with the same text; `parse` tells them apart, and SQL stores have the parts
        in columns. Raises `ConfigError` where neither has a name: keys without an owner have nothing in common.
        """
        if not tenant and not principal:
            raise ConfigError("prefix: needs the name of a tenant or of a principal")
        whole = f"tenant:{_quoted(tenant)}/"
        return whole if principal is None else f"{whole}principal:{_quoted(principal)}/"


def check_key(key: str) -> bytes:
    """The bytes that `key` is stored as; raises `ConfigError` for one that no session can have."""
    return encode_name("session: the key", key)


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """The least key with the prefix and the least text above all of them, which is empty where there is none."""
    start = check_key(prefix) if prefix else b""
    # No UTF-8 ends in 0xFF, so the last byte can be raised.
    return start, start[:-1] + bytes([start[-1] + 1]) if start else b""


def _owned(text: str) -> re.Match[str] | None:
    """The match of what stands before the id in the key of an owner, or in a text that was set off from one."""
    found = _OWNED.match(text)
    return found if found is not None and any(found.groups()) else None


def _quoted(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F").replace(":", "%3A")


def _unquoted(name: str) -> str:
    return name.replace("%3A", ":").replace("%2F", "/").replace("%25", "%")
