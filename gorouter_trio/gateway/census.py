"""Who is connected, counted: in all, not yet authenticated, by address, by principal. Pure."""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import TYPE_CHECKING

from .frames import Violation

if TYPE_CHECKING:
    from .config import GatewayLimits

__all__ = ["Census", "address_group"]


def address_group(address: str) -> str:
    """What counts as one address: an IPv4 address, a /64 of IPv6; anything else is itself."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


class Census:
    """Counts connections against their caps; what `enter` admits has to `leave`."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self.connections = 0
        self.unauthenticated = 0
        self._addresses: Counter[str] = Counter()
        self._principals: Counter[tuple[str, str]] = Counter()

    @property
    def principals(self) -> int:
        """How many principals are connected."""
        return len(self._principals)

    def admits_unauthenticated(self) -> bool:
        """Whether there is room for one more that nobody knows yet."""
        return self.unauthenticated < self._limits.max_unauthenticated

    def enter(self, address: str) -> Violation | None:
        """One more connection, upgraded and not yet authenticated; counted in any case, so that it has to leave."""
        self.connections += 1
        self._addresses[address] += 1
        if self.connections > self._limits.max_connections:
            return Violation(1013, "too many connections")
        if self._addresses[address] > self._limits.max_per_address:
            return Violation(1013, "too many connections from this address")
        return None

    def identify(self, principal: tuple[str, str]) -> Violation | None:
        """The connection is this principal's; counted in any case."""
        self._principals[principal] += 1
        if self._principals[principal] > self._limits.max_per_principal:
            return Violation(1013, "too many connections of this principal")
        return None

    def leave(self, address: str, principal: tuple[str, str] | None) -> None:
        """The connection has ended."""
        self.connections -= 1
        _decrease(self._addresses, address)
        if principal is not None:
            _decrease(self._principals, principal)


def _decrease(counter: Counter[str] | Counter[tuple[str, str]], key: object) -> None:
    counts: Counter[object] = counter  # type: ignore[assignment]  # one of the two, with a key of its own kind
    counts[key] -= 1
    if counts[key] <= 0:
        del counts[key]
