"""How the API is reached: through which proxy, and with which certificates. Values and rules, no I/O.

The environment names proxies as it does for curl and most other programs: `https_proxy` or `http_proxy` after the
scheme of the base URL, then `all_proxy`, each in lower case before upper case, and `no_proxy` for hosts that need none.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from msgspec import Struct
from msgspec.structs import force_setattr

from .errors import ConfigError
from .secret import Secret

if TYPE_CHECKING:
    from urllib.parse import SplitResult

__all__ = [
    "Proxy",
    "ProxyEnvironment",
    "ProxyScheme",
    "TlsConfig",
    "is_loopback",
    "parse_proxy",
    "read_proxy_environment",
]

ProxyScheme = Literal["http", "https", "socks5"]
"""How a proxy is spoken to: HTTP in the clear, HTTP over TLS, or SOCKS 5 (RFC 1928), which gets the host's name."""

_DEFAULT_PORTS: dict[str, int] = {"http": 80, "https": 443, "socks5": 1080}
_SCHEMES: dict[str, ProxyScheme] = {"http": "http", "https": "https", "socks5": "socks5", "socks5h": "socks5"}
_FORM = "must look like http://user:password@host:port (or https://, or socks5://)"
_SEPARATORS = re.compile(r"[,\s]+")
_SOCKS_FIELD_BYTES = 255


class TlsConfig(Struct, frozen=True, kw_only=True):
    """Which servers are trusted, and how this client shows who it is. Certificates and host names are always verified.

    `ca_file` (PEM), `ca_path` (a directory as `openssl rehash` makes it) and `ca_data` (PEM as a string, DER as bytes)
    name the authorities that are trusted, in place of the system's unless `trust_system` says as well. With none of
    them it is the system's, where SSL_CERT_FILE and SSL_CERT_DIR say what that is.

    `cert_file` is the client's certificate with its chain, `key_file` its key, if that is in a file of its own, and
    `key_password` what the key is encrypted with. All are read when the client is opened.
    """

    ca_file: str | os.PathLike[str] | None = None
    ca_path: str | os.PathLike[str] | None = None
    ca_data: str | bytes | None = None
    trust_system: bool = False
    cert_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None
    key_password: str | Secret | None = None

    def __post_init__(self) -> None:
        if isinstance(self.key_password, str):
            force_setattr(self, "key_password", Secret(self.key_password))
        for name in ("ca_file", "ca_path", "cert_file", "key_file"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, (str, os.PathLike)) or not os.fspath(path)):
                raise ConfigError(f"tls.{name}: must be a path, not {path!r}")
        if not isinstance(self.ca_data, (str, bytes, type(None))):
            raise ConfigError("tls.ca_data: must be PEM as str or DER as bytes")
        if not isinstance(self.trust_system, bool):
            raise ConfigError("tls.trust_system: must be True or False")
        if not isinstance(self.key_password, (Secret, type(None))):
            raise ConfigError("tls.key_password: must be a str or a Secret")
        for name in ("key_file", "key_password"):
            if getattr(self, name) is not None and self.cert_file is None:
                raise ConfigError(f"tls.{name}: needs tls.cert_file")

    @property
    def has_authorities(self) -> bool:
        """Whether it names authorities of its own."""
        return not self.ca_file is self.ca_path is self.ca_data is None


class Proxy(Struct, frozen=True, kw_only=True):
    """A proxy, taken apart; made by `parse_proxy`."""

    scheme: ProxyScheme
    host: str
    port: int
    user: Secret | None = None
    password: Secret | None = None

    @property
    def url(self) -> str:
        """Where it is, without who uses it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def forwards(self, scheme: str) -> bool:
        """Whether it is asked for whole URLs of this scheme, which it fetches itself, and not for a tunnel."""
        return scheme == "http" and self.scheme != "socks5"

    def authorization(self) -> Secret | None:
        """The value of the Proxy-Authorization header (RFC 7617), if there is one."""
        if self.user is None:
            return None
        password = "" if self.password is None else self.password.reveal()
        pair = f"{self.user.reveal()}:{password}"
        return Secret("Basic " + base64.b64encode(pair.encode()).decode("ascii"))


class ProxyEnvironment(Struct, frozen=True, kw_only=True):
    """What the environment says of proxies, read by `read_proxy_environment`: by scheme, the variable and its value."""

    proxies: Mapping[str, tuple[str, Secret]]
    no_proxy: str

    def proxy_for(self, base_url: str) -> Proxy | None:
        """The proxy to reach this URL by, or None. This machine needs no proxy to itself.

        Raises `ConfigError` that names the variable when its value is none.
        """
        parts = urlsplit(base_url)
        host = parts.hostname or ""
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
        if parts.scheme not in self.proxies or is_loopback(host) or _is_exempt(host, port, no_proxy=self.no_proxy):
            return None
        name, url = self.proxies[parts.scheme]
        return parse_proxy(url, field=name)


def read_proxy_environment(environ: Mapping[str, str]) -> ProxyEnvironment:
    """What the variables say.

    A lower-case name hides the upper-case one, also when it is empty. HTTP_PROXY is not read where REQUEST_METHOD is
    set: in a CGI program it is what a client sent as a `Proxy` header.
    """
    proxies = {}
    for scheme in ("http", "https"):
        name = _variable(environ, scheme)
        if name is not None:
            value = environ[name].strip()
            proxies[scheme] = (name, Secret(value if "://" in value else f"http://{value}"))
    no_proxy = environ["no_proxy"] if "no_proxy" in environ else environ.get("NO_PROXY", "")
    return ProxyEnvironment(proxies=proxies, no_proxy=no_proxy)


def parse_proxy(url: Secret, *, field: str) -> Proxy:
    """The proxy that a URL names; raises `ConfigError` that names `field`, and shows nothing of the URL."""
    parsed = _take_apart(url.reveal())
    if isinstance(parsed, str):
        raise ConfigError(f"{field}: {parsed}")
    return parsed


def is_loopback(host: str) -> bool:
    """Whether the host is this machine by its name or address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def _take_apart(url: str) -> Proxy | str:
    """The proxy, or what is wrong with its URL: a string, since an exception would keep the URL in its frame."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return _FORM
    scheme = _SCHEMES.get(parts.scheme)
    if scheme is None:
        return f"{parts.scheme}:// is not supported; it {_FORM}" if parts.scheme.isalnum() and "://" in url else _FORM
    if not parts.hostname or port == 0 or parts.path not in {"", "/"} or "?" in url or "#" in url:
        return f"{_FORM}; write other characters of a password percent-encoded"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "must be printable ASCII without spaces; write other characters percent-encoded"
    return _with_credentials(Proxy(scheme=scheme, host=parts.hostname, port=port or _DEFAULT_PORTS[scheme]), parts)


def _with_credentials(proxy: Proxy, parts: SplitResult) -> Proxy | str:
    user, password = parts.username, parts.password
    if not user and not password:
        return proxy
    user, password = unquote(user or ""), unquote(password or "")
    if proxy.scheme != "socks5" and ":" in user:
        return "the user's name must not have a colon"
    if proxy.scheme == "socks5" and not (0 < len(user.encode()) <= _SOCKS_FIELD_BYTES >= len(password.encode())):
        return f"SOCKS 5 takes names and passwords of 1 to {_SOCKS_FIELD_BYTES} bytes"
    return Proxy(scheme=proxy.scheme, host=proxy.host, port=proxy.port, user=Secret(user), password=Secret(password))


def _variable(environ: Mapping[str, str], scheme: str) -> str | None:
    """The name of the variable that counts for this scheme."""
    for kind in (scheme, "all"):
        lower, upper = f"{kind}_proxy", f"{kind}_proxy".upper()
        name = lower if lower in environ else upper
        is_what_a_client_sent = name == "HTTP_PROXY" and "REQUEST_METHOD" in environ
        if not is_what_a_client_sent and environ.get(name, "").strip():
            return name
    return None


def _is_exempt(host: str, port: int, *, no_proxy: str) -> bool:
    """Whether a host needs no proxy: by name with all names under it, by address, by network, each perhaps with a port.

    `example.com`, `.example.com` and `*.example.com` mean the same, as for curl; `*` is everything.
    """
    entries = [entry.lower() for entry in _SEPARATORS.split(no_proxy) if entry]
    return any(_is_meant(host.rstrip("."), port, entry=entry) for entry in entries)


def _is_meant(host: str, port: int, *, entry: str) -> bool:
    if entry == "*":
        return True
    name, wanted_port = _split_port(entry)
    if wanted_port and wanted_port != str(port):
        return False
    address = _address(host)
    if address is not None:
        network = _network(name)
        return network is not None and address in network
    name = name.removeprefix("*").strip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _split_port(entry: str) -> tuple[str, str]:
    """Host and port of an entry; an IPv6 address has its port after brackets only."""
    if entry.startswith("["):
        host, _, port = entry[1:].partition("]")
        return host, port.removeprefix(":")
    host, _, port = entry.partition(":")
    return (host, port) if port.isdecimal() else (entry, "")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
