"""TLS from files: who is trusted, who the client is, and files that cannot be used, named before anything opens."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from proxies import listening
from scripted import Peer, answering, chat, shown_by
from worlds import open_quiet_client

import gorouter_trio as gr
from gorouter_trio.errors import ConfigError, ConnectError, StreamBrokenError
from gorouter_trio.network import TlsConfig
from gorouter_trio.secret import Secret
from gorouter_trio.transport.tls import make_tls_context

KEY = "sk-or-v1-c4n4ry0f7h3tl5"
PASSWORD = "c4n4ry-k3y-p4ss"
NEVER = gr.RetryPolicy(max_retries=0)


class Files:
    """An authority, a certificate of the client's and its key, in files of every kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority, self.other = trustme.CA(), trustme.CA()
        mine = self.authority.issue_cert("client.example")
        self.ca = self._write("ca.pem", self.authority.cert_pem.bytes())
        self.other_ca = self._write("other.pem", self.other.cert_pem.bytes())
        self.cert = self._write("client.pem", b"".join(blob.bytes() for blob in mine.cert_chain_pems))
        self.key = self._write("client.key", mine.private_key_pem.bytes())
        self.both = self._write("both.pem", mine.private_key_and_cert_chain_pem.bytes())
        key = load_pem_private_key(mine.private_key_pem.bytes(), None)
        lock = BestAvailableEncryption(PASSWORD.encode())
        self.locked = self._write("locked.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
        self.bare = self._write("bare.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        other = self.authority.issue_cert("other.example")
        self.other_key = self._write("other.key", other.private_key_pem.bytes())
        self.garbage = self._write("garbage", b"not PEM")
        self.broken = self._write("broken.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        self.empty_folder = str(folder / "empty")
        Path(self.empty_folder).mkdir()
        self.hashed = self._hashed()

    def _write(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.write_bytes(data)
        return str(path)

    def _hashed(self) -> str:
        folder = self.folder / "hashed"
        folder.mkdir()
        command = ["openssl", "x509", "-hash", "-noout", "-in", self.ca]
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        (folder / f"{name}.0").write_bytes(Path(self.ca).read_bytes())
        return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


def _server_side(authority: trustme.CA, *, clients: trustme.CA | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if clients is not None:
        clients.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def _serve(stream: trio.abc.Stream, context: ssl.SSLContext) -> None:
    secure = trio.SSLStream(stream, context, server_side=True, https_compatible=True)

    def answer(_request: object) -> bytes:
        certificate = secure.getpeercert()
        return chat(str(certificate and dict(certificate)["subjectAltName"]))

    await answering(answer)(Peer(secure))


async def ask(port: int, tls: object) -> str:
    """What the server at a port says who the client is."""
    async with open_quiet_client(api_key=KEY, base_url=f"https://127.0.0.1:{port}", tls=tls, retry=NEVER) as client:
        return (await client.chat("x")).text


@pytest.mark.net
async def test_authorities_of_ones_own(files: Files, no_leaks) -> None:
    """From a file, a folder, PEM and DER in memory, and beside those of the system; and only those."""
    pem = files.authority.cert_pem.bytes().decode()
    server = _server_side(files.authority)
    async with listening(lambda stream: _serve(stream, server)) as port, no_leaks():
        for tls in (
            gr.TlsConfig(ca_file=files.ca),
            gr.TlsConfig(ca_file=Path(files.ca), trust_system=True),
            gr.TlsConfig(ca_path=files.hashed),
            gr.TlsConfig(ca_data=pem),
            gr.TlsConfig(ca_data=ssl.PEM_cert_to_DER_cert(pem)),
        ):
            assert await ask(port, tls) == "None"
        for wrong in (None, gr.TlsConfig(), gr.TlsConfig(ca_file=files.other_ca)):
            with pytest.raises(ConnectError, match=rf"TLS with 127\.0\.0\.1:{port} failed: the certificate does not"):
                await ask(port, wrong)


@pytest.mark.net
async def test_authorities_of_the_environment(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSL_CERT_FILE and SSL_CERT_DIR say what the system trusts; authorities of the settings stand in for them."""
    server = _server_side(files.authority)
    async with listening(lambda stream: _serve(stream, server)) as port:
        for name, right in (("SSL_CERT_FILE", files.ca), ("SSL_CERT_DIR", files.hashed)):
            with monkeypatch.context() as patch:
                patch.setenv(name, right)
                assert await ask(port, None) == "None"
                assert await ask(port, gr.TlsConfig(ca_file=files.other_ca, trust_system=True)) == "None"
                with pytest.raises(ConnectError, match="does not verify"):
                    await ask(port, gr.TlsConfig(ca_file=files.other_ca))


@pytest.mark.net
async def test_a_certificate_of_the_client(files: Files, no_leaks) -> None:
    """With its key in another file, in the same one, and encrypted; the server sees who it is."""
    server = _server_side(files.authority, clients=files.authority)
    async with listening(lambda stream: _serve(stream, server)) as port, no_leaks():
        for tls in (
            gr.TlsConfig(ca_file=files.ca, cert_file=files.cert, key_file=files.key),
            gr.TlsConfig(ca_file=files.ca, cert_file=files.both),
            gr.TlsConfig(ca_file=files.ca, cert_file=files.cert, key_file=files.bare),
            gr.TlsConfig(ca_file=files.ca, cert_file=files.cert, key_file=files.locked, key_password=PASSWORD),
            gr.TlsConfig(ca_file=files.ca, cert_file=files.cert, key_file=files.locked, key_password=Secret(PASSWORD)),
        ):
            assert "client.example" in await ask(port, tls)


@pytest.mark.net
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def test_a_client_that_the_server_does_not_want(version: ssl.TLSVersion, files: Files, no_leaks) -> None:
    """Without a certificate, or with one of another authority: the server's alert in words, and nothing was billed."""
    context = _server_side(files.authority, clients=files.other)
    context.maximum_version = version
    for tls in (
        gr.TlsConfig(ca_file=files.ca),
        gr.TlsConfig(ca_file=files.ca, cert_file=files.cert, key_file=files.key),
    ):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            async with no_leaks(), trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, _refuse_clients, listener, context)
                with pytest.raises((ConnectError, StreamBrokenError)) as refused:
                    await ask(listener.getsockname()[1], tls)
        assert re.search("certificate required|unknown ca|handshake failure", refused.value.message)
        assert not refused.value.maybe_billed


def _refuse_clients(listener: socket.socket, context: ssl.SSLContext) -> None:
    """One handshake by Python's own sockets, which send the alert; trio's streams close without a word."""
    conn, _ = listener.accept()
    with context.wrap_socket(conn, server_side=True, do_handshake_on_connect=False) as secure:
        with suppress(ssl.SSLError):
            secure.do_handshake()
        # Closing with something unread would be a reset, which may overtake the alert.
        while socket.socket.recv(secure, 65_536):
            pass


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ca_file": "{gone}"}, r"^tls\.ca_file: cannot read '.*/gone': No such file"),
        ({"ca_file": "{folder}"}, r"^tls\.ca_file: cannot read .*: Is a directory"),
        ({"ca_file": "{garbage}"}, r"^tls\.ca_file: '.*/garbage' has no certificates in PEM"),
        ({"ca_file": "{broken}"}, r"^tls\.ca_file: '.*/broken\.pem' has no certificates in PEM"),
        ({"ca_file": "{key}"}, r"^tls\.ca_file: '.*/client\.key' has no certificates in PEM"),
        ({"ca_path": "{gone}"}, r"^tls\.ca_path: cannot read '.*/gone'"),
        ({"ca_file": "a\0b"}, r"^tls\.ca_file: must be the name of a file, not 'a\\x00b'"),
        ({"ca_file": "\ud800"}, r"^tls\.ca_file: must be the name of a file"),
        ({"ca_path": "a\0b"}, r"^tls\.ca_path: must be the name of a folder"),
        ({"cert_file": "a\0b"}, r"^tls\.cert_file: must be the name of a file"),
        ({"ca_path": "{empty_folder}"}, r"^tls\.ca_path: '.*/empty' has no certificates by their hash"),
        ({"ca_data": "no PEM"}, r"^tls\.ca_data: has no certificates"),
        ({"ca_data": b"no DER"}, r"^tls\.ca_data: has no certificates"),
        ({"ca_data": ""}, r"^tls\.ca_data: has no certificates"),
        ({"ca_data": "kein Schlüssel"}, r"^tls\.ca_data: has no certificates"),
        ({"cert_file": "{gone}"}, r"^tls\.cert_file: cannot read '.*/gone'"),
        ({"cert_file": "{key}"}, r"^tls\.cert_file: '.*/client\.key' has no certificate in PEM"),
        ({"cert_file": "{cert}"}, r"^tls\.cert_file: '.*/client\.pem' has no private key in PEM"),
        ({"cert_file": "{cert}", "key_file": "{gone}"}, r"^tls\.key_file: cannot read '.*/gone'"),
        ({"cert_file": "{cert}", "key_file": "{ca}"}, r"^tls\.key_file: '.*/ca\.pem' has no private key in PEM"),
        ({"cert_file": "{cert}", "key_file": "{other_key}"}, r"^tls\.key_file: '.*/other\.key' is not the key of"),
        ({"cert_file": "{broken}", "key_file": "{key}"}, r"^tls\.cert_file: '.*/broken\.pem' with the key in"),
        ({"cert_file": "{cert}", "key_file": "{locked}"}, r"^tls\.key_password: the key in '.*' is encrypted"),
        ({"cert_file": "{cert}", "key_file": "{locked}", "key_password": PASSWORD + "x"},
         r"^tls\.key_password: does not open the key in '.*/locked\.key'"),
    ],
)  # fmt: skip
async def test_files_that_cannot_be_used(files: Files, fields: dict[str, str | bytes], words: str) -> None:
    """Each is a ConfigError that names the field and the file, before a connection is made."""
    places = {**vars(files), "gone": str(files.folder / "gone")}
    filled = {name: value.format(**places) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(ConfigError, match=words) as refused:
        async with open_quiet_client(api_key=KEY, tls=TlsConfig(**filled)):  # type: ignore[arg-type]
            raise AssertionError("opened")
    assert PASSWORD not in shown_by(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SSL_CERT_FILE", "/nowhere/ca.pem", r"^SSL_CERT_FILE: cannot read '/nowhere/ca\.pem': No such file"),
        ("SSL_CERT_FILE", "{garbage}", r"^SSL_CERT_FILE: '.*/garbage' has no certificates"),
        ("SSL_CERT_DIR", "/nowhere", r"^SSL_CERT_DIR: there is no folder '/nowhere'"),
    ],
)
def test_variables_that_cannot_be_used(files: Files, name: str, value: str, words: str) -> None:
    """OpenSSL would pass over them in silence, and every certificate would fail later."""
    environ = {name: value.format(**vars(files))}
    with pytest.raises(ConfigError, match=words):
        make_tls_context(None, environ=environ)
    make_tls_context(TlsConfig(ca_file=files.ca), environ=environ)
    context = ssl.create_default_context()
    assert make_tls_context(context, environ=environ) is context


def test_comments_between_certificates(files: Files) -> None:
    """Bundles name their authorities, in any language, between the certificates."""
    pem = Path(files.ca).read_text()
    context = make_tls_context(TlsConfig(ca_data=f"# Főtanúsítvány\n{pem}"), environ={})
    assert len(context.get_ca_certs()) == 1


def test_what_is_always_on(files: Files) -> None:
    """Certificates and host names are verified whatever the settings are, and the protocol is agreed upon."""
    for tls in (None, TlsConfig(), TlsConfig(ca_file=files.ca), TlsConfig(ca_data=Path(files.ca).read_text())):
        context = make_tls_context(tls, environ={})
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_a_proxy_does_not_see_the_clients_certificate(files: Files) -> None:
    """The context for a proxy trusts the same authorities, and shows no certificate: a wrong one is not even read."""
    tls = TlsConfig(ca_file=files.ca, cert_file=files.garbage)
    assert make_tls_context(tls, environ={}, for_proxy=True).get_ca_certs()
    with pytest.raises(ConfigError):
        make_tls_context(tls, environ={})
