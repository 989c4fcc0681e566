"""Where a URL that a model chose may lead: not into the machine, its network or its cloud's metadata (SSRF).

Three steps, and all are needed. `check_url` looks at the text. Whoever connects resolves the name, passes what comes
of it through `check_addresses`, and **connects to an address that came out**, not to the name again: a resolver
may answer differently the second time. Each redirect starts over, with `join_redirect`. No step does I/O.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, TypeAlias, cast
from urllib.parse import urljoin, urlsplit

import msgspec
from msgspec import Struct

from ..errors import ConfigError, DangerousArgumentError, SecurityConfigError
from ._checks import check_choice, check_count, check_names
from .text import escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Address",
    "CheckedUrl",
    "UrlPolicy",
    "check_address",
    "check_addresses",
    "check_url",
    "join_redirect",
]

Address: TypeAlias = IPv4Address | IPv6Address

_MAX_URL_CHARS = 8_192
_MAX_HOST_CHARS = 253
_PORTS = {"https": 443, "http": 80, "wss": 443, "ws": 80}
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_DOTTED = re.compile(r"(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}")
# A last label that is a number in any base makes the whole host an IPv4 address to many resolvers (WHATWG URL, 3.5).
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")

# The IANA registries of special-purpose addresses, and what clouds serve their secrets on.
_V4_CLOSED = tuple(
    ipaddress.ip_network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
        "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
    )
)  # fmt: skip
# Only 2000::/3 is the Internet; in it, ranges that carry another address, or are for documents and protocols.
_V6_OPEN = ipaddress.ip_network("2000::/3")
_V6_CLOSED = tuple(
    ipaddress.ip_network(block)
    for block in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
_CLOSED_NAMES = frozenset(
    {
        "localhost", "localdomain", "local", "internal", "intranet", "lan", "home", "corp", "private", "arpa", "onion",
        "alt", "test", "invalid", "example", "home.arpa", "kubernetes", "svc", "cluster.local", "in-addr.arpa",
    }
)  # fmt: skip


class UrlPolicy(Struct, frozen=True, kw_only=True):
    """Which URLs may be fetched: by default `https` on port 443 to any public host.

    `hosts`, where given, are the only ones: `api.example.com`, or `.example.com` for every name below it.
    `closed_hosts`, in the same form, are refused in any case. A bare IP address is refused unless `addresses` is True;
    it has to be a public one all the same.
    """

    schemes: Collection[str] = ("https",)
    ports: Collection[int] | None = (443,)
    hosts: Collection[str] | None = None
    closed_hosts: Collection[str] = ()
    addresses: bool = True

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "schemes", check_names("url_policy.schemes", self.schemes))
        msgspec.structs.force_setattr(self, "closed_hosts", _host_rules("url_policy.closed_hosts", self.closed_hosts))
        for scheme in self.schemes:
            check_choice("url_policy.schemes", scheme, tuple(_PORTS))
        ports = cast("object", self.ports)
        if ports is not None and (not isinstance(ports, Collection) or isinstance(ports, (str, bytes))):
            raise ConfigError(f"url_policy.ports: must be several numbers, or None for any, not {self.ports!r}")
        for port in self.ports or ():
            check_count("url_policy.ports", port, least=1, most=65_535)
        if self.hosts is not None:
            msgspec.structs.force_setattr(self, "hosts", _host_rules("url_policy.hosts", self.hosts))


def _host_rules(place: str, given: object) -> tuple[str, ...]:
    """The rules in the form that hosts are compared in, or one in another spelling would never apply."""
    return tuple(_host_rule(f"{place}[{index}]", rule) for index, rule in enumerate(check_names(place, given)))


def _host_rule(place: str, rule: str) -> str:
    try:
        return str(ipaddress.ip_address(rule.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    dot, name = ("." if rule.startswith(".") else ""), rule.removeprefix(".")
    try:
        host = _idna(name)
    except UnicodeError:
        host = ""
    if not all(_LABEL.fullmatch(label) for label in host.split(".")):
        raise SecurityConfigError(f"{place}: must be a host, or .host for every name below it, not {rule!r}")
    return dot + host


class CheckedUrl(Struct, frozen=True):
    """A URL whose text may be followed: `host` is ASCII and lower case, `address` set where it is an IP address."""

    scheme: str
    host: str
    port: int
    target: str
    address: str | None = None

    @property
    def url(self) -> str:
        """The URL in the one spelling that was checked."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS.get(self.scheme) else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"


_DEFAULT = UrlPolicy()


def check_url(url: str, *, policy: UrlPolicy = _DEFAULT) -> CheckedUrl:
    """The parts of a URL that may be followed, as far as its text can tell; raises `DangerousArgumentError` otherwise.

    Fetch `CheckedUrl.url`, not the text that was given: other parsers may read that differently.
    """
    _check_text(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refused(url, "it cannot be taken apart") from None
    if parts.scheme not in policy.schemes or parts.scheme not in _PORTS:
        raise _refused(url, f"its scheme is not {' or '.join(policy.schemes)}")
    if "@" in parts.netloc:
        raise _refused(url, "it carries credentials, or hides its host behind them")
    port = _PORTS[parts.scheme] if port is None else port
    if port == 0 or (policy.ports is not None and port not in policy.ports):
        raise _refused(url, f"port {port} is not allowed")
    host, address = _check_host(url, parts.netloc, policy)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return CheckedUrl(parts.scheme, host, port, target, None if address is None else str(address))


def join_redirect(base: CheckedUrl, location: str, *, policy: UrlPolicy = _DEFAULT) -> CheckedUrl:
    """Where a redirect leads, checked like a URL of its own. Credentials of the first request must not follow it."""
    if len(location) > _MAX_URL_CHARS:
        raise _refused("", "a redirect leads to what is too long")
    _check_characters(location)
    try:
        joined = urljoin(base.url, location)
    except ValueError:
        raise _refused(location, "it cannot be taken apart") from None
    return check_url(joined, policy=policy)


def check_address(ip: str | Address) -> Address:
    """The address, if it is one on the public Internet; raises `DangerousArgumentError` otherwise.

    Refused: loopback, private, link-local (with the metadata of clouds), shared, multicast, reserved and documentation
    ranges, and IPv6 addresses that carry an IPv4 one or a zone.
    """
    try:
        address = ipaddress.ip_address(ip) if isinstance(ip, str) else ip
    except ValueError:
        raise _refused(str(ip), "it is no IP address") from None
    if isinstance(address, IPv4Address):
        closed = any(address in block for block in _V4_CLOSED)
    else:
        closed = address.scope_id is not None or address not in _V6_OPEN or any(address in b for b in _V6_CLOSED)
    if closed:
        raise _refused(str(address), "it is not on the public Internet")
    return address


def check_addresses(found: Iterable[str | Address]) -> tuple[Address, ...]:
    """What a name resolved to, if all of it may be connected to; raises `DangerousArgumentError` otherwise.

    One closed address among open ones is refused too: which of them is connected to is left to chance.
    """
    addresses = tuple(check_address(ip) for ip in found)
    if not addresses:
        raise DangerousArgumentError("the name has no address")
    return addresses


def _check_text(url: object) -> None:
    if not isinstance(url, str):
        raise _refused("", f"a {type(url).__name__} is no URL")
    if len(url) > _MAX_URL_CHARS:
        raise _refused(url, f"it has more than {_MAX_URL_CHARS} characters")
    _check_characters(url)
    if "://" not in url:
        raise _refused(url, "it names no host")


def _check_characters(url: str) -> None:
    """What parsers drop, or take for something else: white space, controls, backslashes."""
    if any(c.isspace() or unicodedata.category(c)[0] == "C" for c in url) or "\\" in url:
        raise _refused(url, "it holds spaces, control characters or backslashes")


def _check_host(url: str, netloc: str, policy: UrlPolicy) -> tuple[str, Address | None]:
    if netloc.startswith("["):
        found = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](:\d*)?", netloc)
        if found is None:
            raise _refused(url, "its host is no IPv6 address")
        return _check_literal(url, found[1], policy)
    host = _ascii_host(url, netloc.partition(":")[0])
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        if not _DOTTED.fullmatch(host):
            raise _refused(url, "its host is an IP address in an unusual spelling")
        return _check_literal(url, host, policy)
    _check_name(url, host, policy)
    return host, None


def _check_literal(url: str, text: str, policy: UrlPolicy) -> tuple[str, Address | None]:
    address = check_address(text)
    if not policy.addresses or not _is_open(str(address), policy):
        raise _refused(url, "its host is an IP address")
    return str(address), address


def _ascii_host(url: str, host: str) -> str:
    """The host as resolvers see it: IDNA also turns fullwidth and circled characters into the plain ones."""
    if "%" in host or len(host) > _MAX_HOST_CHARS:
        raise _refused(url, "its host is percent-encoded or too long")
    try:
        return _idna(host)
    except UnicodeError:
        raise _refused(url, "its host is no name") from None


def _idna(host: str) -> str:
    encoded = host.lower() if host.isascii() else host.encode("idna").decode("ascii").lower()
    return encoded.removesuffix(".")


def _check_name(url: str, host: str, policy: UrlPolicy) -> None:
    labels = host.split(".")
    if len(host) > _MAX_HOST_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        raise _refused(url, "its host is no name")
    closed = any(_below(host, name) for name in _CLOSED_NAMES)
    if len(labels) < 2 or closed:
        raise _refused(url, "its host is a name of this machine or network")
    if not _is_open(host, policy):
        raise _refused(url, "its host is not one of those allowed")


def _is_open(host: str, policy: UrlPolicy) -> bool:
    if any(_matches(host, rule) for rule in policy.closed_hosts):
        return False
    return policy.hosts is None or any(_matches(host, rule) for rule in policy.hosts)


def _matches(host: str, rule: str) -> bool:
    return host.endswith(rule) if rule.startswith(".") else host == rule


def _below(host: str, name: str) -> bool:
    return host == name or host.endswith("." + name)


def _refused(url: str, why: str) -> DangerousArgumentError:
    shown = f" {escape_controls(url[:200])!r}" if url else ""
    return DangerousArgumentError(f"the address{shown} is refused: {why}")
