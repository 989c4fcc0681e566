"""TLS contexts from settings, and the handshake.

What is wrong with a file is found when a context is made, before anything is connected, and names the setting. OpenSSL
says little by itself: it passes over a missing SSL_CERT_FILE in silence, asks the terminal for a password, and does not
say which of two files it could not use.
"""

from __future__ import annotations

import os
import re
import ssl
from typing import TYPE_CHECKING, Final

import trio

from ..errors import ConfigError, ConnectError
from ..network import TlsConfig
from .streams import reason_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..secret import Secret

__all__ = ["make_tls_context", "open_tls"]

_HASHED = re.compile(r"[0-9a-f]{8}\.\d+")
_PROTOCOL: Final = "http/1.1"
_OPENSSL_WORDS = re.compile(r"^\[.*?\]\s*|\s*\(_ssl\.c:\d+\)$")


def make_tls_context(
    tls: TlsConfig | ssl.SSLContext | None, *, environ: Mapping[str, str], for_proxy: bool = False
) -> ssl.SSLContext:
    """The client's context; a user's own is returned as it is. A proxy does not get to see the client's certificate.

    Raises `ConfigError` that names the setting, or the variable of the environment, and the file.
    """
    if isinstance(tls, ssl.SSLContext):
        return tls
    wanted = tls or TlsConfig()
    context = _trusting(wanted, environ)
    # Not every OpenSSL is told so when it is built; one that is told to begin later stays that.
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    context.set_alpn_protocols([_PROTOCOL])
    if wanted.cert_file is not None and not for_proxy:
        _show_certificate(context, wanted)
    return context


async def open_tls(
    stream: trio.abc.Stream, context: ssl.SSLContext, *, host: str, name: str
) -> trio.SSLStream[trio.abc.Stream]:
    """TLS on `stream`, after its handshake; `name` is who is on the other side, for errors.

    Raises `ConnectError`, which says when it is the certificate that does not verify, and why. On an error or a cancel
    the caller drops the stream.
    """
    try:
        secure = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
        await secure.do_handshake()
    except (trio.BrokenResourceError, OSError, ValueError) as exc:
        raise ConnectError(f"TLS with {name} failed: {reason_of(exc)}") from exc
    return secure


def _trusting(tls: TlsConfig, environ: Mapping[str, str]) -> ssl.SSLContext:
    """A context that trusts the authorities of the settings, or those of the system."""
    if not tls.has_authorities:
        return _trusting_the_system(environ)
    context = _trusting_the_system(environ) if tls.trust_system else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.ca_file is not None:
        _load_file(context, os.fspath(tls.ca_file), field="tls.ca_file")
    if tls.ca_path is not None:
        _load_folder(context, os.fspath(tls.ca_path), field="tls.ca_path")
    if tls.ca_data is not None:
        try:
            context.load_verify_locations(cadata=_in_ascii(tls.ca_data))
        except (ssl.SSLError, ValueError) as exc:
            raise ConfigError(f"tls.ca_data: has no certificates: {_words(exc)}") from exc
    return context


def _in_ascii(data: str | bytes) -> str | bytes:
    """What stands between certificates may be any text, and Python takes a `str` of ASCII only."""
    return data.encode("ascii", "replace").decode("ascii") if isinstance(data, str) else data


def _trusting_the_system(environ: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    file, folders = environ.get("SSL_CERT_FILE"), environ.get("SSL_CERT_DIR")
    # OpenSSL reads these by itself, and says nothing of those that it cannot read.
    if file:
        _load_file(context, file, field="SSL_CERT_FILE")
    if folders and not any(map(os.path.isdir, folders.split(os.pathsep))):
        raise ConfigError(f"SSL_CERT_DIR: there is no folder {folders!r}")
    return context


def _load_file(context: ssl.SSLContext, path: str, *, field: str) -> None:
    _check_readable(path, field)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as exc:
        raise ConfigError(f"{field}: {path!r} has no certificates in PEM: {_words(exc)}") from exc


def _load_folder(context: ssl.SSLContext, path: str, *, field: str) -> None:
    try:
        names = os.listdir(path)
    except OSError as exc:
        raise ConfigError(f"{field}: cannot read {path!r}: {exc.strerror}") from exc
    except ValueError:
        raise ConfigError(f"{field}: must be the name of a folder, not {path!r}") from None
    if not any(map(_HASHED.fullmatch, names)):
        raise ConfigError(f"{field}: {path!r} has no certificates by their hash; run `openssl rehash` on it")
    context.load_verify_locations(capath=path)


def _show_certificate(context: ssl.SSLContext, tls: TlsConfig) -> None:
    """Load the client's certificate and key."""
    certificate = os.fspath(tls.cert_file or "")
    key = certificate if tls.key_file is None else os.fspath(tls.key_file)
    key_field = "tls.cert_file" if tls.key_file is None else "tls.key_file"
    _check_holds(certificate, "tls.cert_file", "CERTIFICATE")
    _check_holds(key, key_field, "PRIVATE KEY")
    password = tls.key_password
    try:
        # Without a function for the password OpenSSL would ask the terminal.
        context.load_cert_chain(certificate, key, password=lambda: _reveal(password))
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigError(_why_no_certificate(exc, tls, certificate=certificate, key=key)) from exc


def _reveal(password: str | Secret | None) -> str:
    return "" if password is None or isinstance(password, str) else password.reveal()


def _why_no_certificate(exc: ssl.SSLError | ValueError, tls: TlsConfig, *, certificate: str, key: str) -> str:
    reason = getattr(exc, "reason", None) or ""
    if "MISMATCH" in reason:
        return f"tls.key_file: {key!r} is not the key of the certificate in {certificate!r}"
    with open(key, "rb") as file:
        is_encrypted = b"ENCRYPTED" in file.read()
    if is_encrypted and tls.key_password is None:
        return f"tls.key_password: the key in {key!r} is encrypted, and no password is given"
    if is_encrypted:
        return f"tls.key_password: does not open the key in {key!r}"
    return f"tls.cert_file: {certificate!r} with the key in {key!r} cannot be used: {_words(exc)}"


def _check_holds(path: str, field: str, kind: str) -> None:
    _check_readable(path, field)
    with open(path, "rb") as file:
        if f"{kind}-----".encode() not in file.read():
            raise ConfigError(f"{field}: {path!r} has no {kind.lower()} in PEM")


def _check_readable(path: str, field: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as exc:
        raise ConfigError(f"{field}: cannot read {path!r}: {exc.strerror}") from exc
    except ValueError:
        raise ConfigError(f"{field}: must be the name of a file, not {path!r}") from None


def _words(exc: Exception) -> str:
    """What OpenSSL says, without where in its source it says so."""
    return _OPENSSL_WORDS.sub("", str(exc.args[-1] if exc.args else exc))
