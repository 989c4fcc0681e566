"""Who asks, and which sessions are theirs: access tokens become principals, and keys the keys of their owners."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import msgspec
import trio

from ..errors import ConfigError, SecurityError, SessionNotFoundError
from ..runtime_events import AskerRefused
from ..security.sessions import SessionPolicy, resolve_session
from ..stores.keys import SessionKey
from .request import TurnExtras

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..errors import GorouterError
    from ..secret import Secret
    from ..security.rules import Authenticator, Principal
    from ..security.sessions import Owner

__all__ = ["Gate"]


class Gate:
    """In front of every turn. `guard` is what the client has as `security`; without an `authenticate` all may pass."""

    __slots__ = ("_authenticator", "_guard", "_on_refused", "_wall", "is_open")

    def __init__(
        self,
        guard: object | None,
        *,
        wall: Callable[[], float],
        on_refused: Callable[[AskerRefused], None] | None = None,
    ) -> None:
        self._wall = wall
        self._on_refused = on_refused
        self.is_open = True
        """Whether everybody may pass, as nobody."""
        self.change(guard)

    def change(self, guard: object | None) -> None:
        """Let `guard` look at who comes from now on."""
        self._guard = guard
        self._authenticator = cast("Authenticator", guard) if hasattr(guard, "authenticate") else None
        self.is_open = self._authenticator is None

    async def admit(self, extras: TurnExtras | None, token: Secret | None = None) -> TurnExtras | None:
        """The extras of a turn with the principal that their token, or else `token`, stands for.

        Raises `AuthenticationRequiredError`, `InvalidTokenError`, and `ConfigError` for a token that there is nobody to
        look at.
        """
        own = None if extras is None else extras.token
        principal = await self.identify(own or token)
        if principal is None:
            return extras
        return msgspec.structs.replace(extras or TurnExtras(), principal=principal, token=own or token)

    async def check(self, token: Secret | None) -> None:
        """Look at who asks for something that is nobody's, where somebody looks. Raises as `admit`."""
        if not self.is_open or token is not None:
            await self.identify(token)

    async def identify(self, token: Secret | None) -> Principal | None:
        """The principal that `token` stands for; None for nobody. Raises as `admit`."""
        if self._authenticator is None:
            if token is not None:
                raise ConfigError("access_token: the client has no `security` that could look at it")
            return None
        try:
            return await self._authenticator.authenticate(token, now=trio.current_time(), wall=self._wall())
        except SecurityError as exc:
            self._tell_refused(exc)
            raise

    def _tell_refused(
        self, error: GorouterError, principal: Principal | None = None, *, session: str | None = None
    ) -> None:
        if self._on_refused is not None:
            who, tenant = (None, "") if principal is None else (principal.id, principal.tenant)
            self._on_refused(
                AskerRefused(at_s=self._wall(), error=error, principal=who, tenant=tenant, session=session)
            )

    def key_for(self, principal: Principal | None, key: str, *, owner: Owner | None = None) -> str:
        """The full key of the session that `principal` means by `key`: their own, or that of `owner`.

        Raises `SessionNotFoundError` where they may not reach it, as for one that is not there.
        """
        if self.is_open:
            return key
        policy = getattr(self._guard, "session_policy", None) or SessionPolicy()
        scope = resolve_session(policy, principal, key=key, owner=owner)
        if scope is None:
            error = SessionNotFoundError(f"there is no session {key!r}")
            self._tell_refused(error, principal, session=key)
            raise error
        return str(SessionKey(tenant=scope.tenant, principal=scope.principal, id=scope.key))
