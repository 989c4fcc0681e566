"""How the API is reached: which proxy a URL means and which the environment means, and settings that are refused."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import pytest
from scripted import shown_by

import gorouter_trio as gr
from gorouter_trio.errors import ConfigError
from gorouter_trio.network import Proxy, TlsConfig, parse_proxy, read_proxy_environment
from gorouter_trio.secret import Secret

PASSWORD = "c4n4ry-pr0xy-p4ss"
URL = "https://openrouter.ai/api/v1"


def parsed(url: str) -> Proxy:
    return parse_proxy(Secret(url), field="proxy")


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port"),
    [
        ("http://proxy.example:3128", "http", "proxy.example", 3128),
        ("http://proxy.example", "http", "proxy.example", 80),
        ("https://proxy.example/", "https", "proxy.example", 443),
        ("HTTP://Proxy.Example:1", "http", "proxy.example", 1),
        ("socks5://proxy.example", "socks5", "proxy.example", 1080), ("socks5h://p:9", "socks5", "p", 9),
        ("http://[::1]:8080", "http", "::1", 8080), ("http://10.0.0.1", "http", "10.0.0.1", 80),
    ],
)  # fmt: skip
def test_urls_of_proxies(url: str, scheme: str, host: str, port: int) -> None:
    """Scheme, host and port, with the port of the scheme where there is none."""
    proxy = parsed(url)
    assert (proxy.scheme, proxy.host, proxy.port, proxy.user) == (scheme, host, port, None)
    assert proxy.authorization() is None


def test_credentials_in_the_url() -> None:
    """User and password are percent-decoded, and go into the header as RFC 7617 has them."""
    proxy = parsed("http://us%40er:p%2Fa%3A%C3%A9@h:1")
    authorization = proxy.authorization()
    assert authorization is not None
    assert base64.b64decode(authorization.reveal().removeprefix("Basic ")).decode() == "us@er:p/a:é"
    alone = parsed("http://user@h").authorization()
    assert alone is not None
    assert base64.b64decode(alone.reveal().removeprefix("Basic ")) == b"user:"


@pytest.mark.parametrize(
    "url",
    [
        "", "h:1", "proxy.example", "//h", "http://", "http://:3128", "http://h:0", "http://h:65536", "http://h:x",
        "ftp://h", "socks4://h", "http://h/path", "http://h?q", "http://h#f", "http://h h", "http://h\n", "http://[::1",
        "http://ü", "http://us%3Aer:p@h", f"http://u:{PASSWORD}/x@h", f"http://u:{PASSWORD}#@h", "socks5://:p@h",
        f"socks5://{'u' * 256}:p@h", f"http://u:{PASSWORD}@h:port",
    ],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    """A URL that is no proxy's is refused with the field's name, and shows nothing of itself."""
    with pytest.raises(ConfigError, match=r"^proxy: ") as refused:
        gr.ClientConfig(api_key="k", proxy=url)
    assert "gorouter_trio/network.py" in shown_by(refused.value)
    assert PASSWORD not in shown_by(refused.value)


def test_the_password_shows_nowhere() -> None:
    """Neither a configuration nor a proxy has it in its repr, resolved or not; where the proxy is can be seen."""
    config = gr.ClientConfig(api_key="k", proxy=f"http://me:{PASSWORD}@proxy.example:3128")
    for shown in (config, config.resolved({}), config.proxy, str(config), f"{config.proxy}"):
        assert PASSWORD not in repr(shown)
        assert "me:" not in repr(shown)
    assert "proxy.example" in repr(config)
    assert config.resolved({}).resolved({"https_proxy": "http://other"}).proxy == config.proxy


def chosen(environ: Mapping[str, str], url: str = URL) -> str | None:
    proxy = read_proxy_environment(environ).proxy_for(url)
    return None if proxy is None else proxy.url


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://a:1"}, "http://a:1"),
        ({"https_proxy": "http://a:1", "HTTPS_PROXY": "http://b:1"}, "http://a:1"),
        ({"https_proxy": "", "HTTPS_PROXY": "http://b:1"}, None),
        ({"https_proxy": " ", "ALL_PROXY": "http://c:1"}, "http://c:1"),
        ({"HTTPS_PROXY": "http://a:1", "all_proxy": "http://c:1"}, "http://a:1"),
        ({"all_proxy": "socks5://c", "ALL_PROXY": "http://d:1"}, "socks5://c:1080"),
        ({"http_proxy": "http://a:1", "HTTP_PROXY": "http://a:1"}, None),
        ({"HTTPS_PROXY": "proxy.example:3128"}, "http://proxy.example:3128"),
        ({"HTTPS_PROXY": " http://a:1 "}, "http://a:1"),
    ],
)
def test_variables_for_https(environ: dict[str, str], expected: str | None) -> None:
    """The scheme's own variable before that for all, lower case before upper case; a bare host is an http proxy."""
    assert chosen(environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HTTP_PROXY": "http://a:1"}, "http://a:1"),
        ({"HTTP_PROXY": "http://a:1", "REQUEST_METHOD": "GET"}, None),
        ({"http_proxy": "http://a:1", "REQUEST_METHOD": "GET"}, "http://a:1"),
        ({"HTTP_PROXY": "http://a:1", "REQUEST_METHOD": "GET", "ALL_PROXY": "http://c:1"}, "http://c:1"),
        ({"HTTPS_PROXY": "http://a:1"}, None),
    ],
)
def test_variables_for_http(environ: dict[str, str], expected: str | None) -> None:
    """HTTP_PROXY is not believed in a CGI program, where a client sets it by sending a header."""
    assert chosen(environ, "http://api.example/v1") == expected


@pytest.mark.parametrize(
    ("no_proxy", "url", "exempt"),
    [
        ("*", URL, True), ("", URL, False), ("openrouter.ai", URL, True), (".openrouter.ai", URL, True),
        ("ai", URL, True), ("router.ai", URL, False), ("OpenRouter.AI", URL, True),
        ("a.example, openrouter.ai", URL, True),
        ("a.example openrouter.ai", URL, True), ("openrouter.ai", "https://eu.openrouter.ai/v1", True),
        ("*.openrouter.ai", "https://eu.openrouter.ai/v1", True), ("eu.openrouter.ai", URL, False),
        ("openrouter.ai:443", URL, True), ("openrouter.ai:80", URL, False),
        ("openrouter.ai:8443", "https://openrouter.ai:8443/", True),
        ("openrouter.ai.", "https://openrouter.ai./", True), ("10.1.2.3", "https://10.1.2.3/", True),
        ("10.0.0.0/8", "https://10.1.2.3/", True), ("10.0.0.0/8", "https://11.1.2.3/", False),
        ("10.1.2.3:443", "https://10.1.2.3/", True), ("fd00::/8", "https://[fd00::1]/", True),
        ("[fd00::1]", "https://[fd00::1]/", True), ("[fd00::1]:443", "https://[fd00::1]/", True),
        ("[fd00::1]:80", "https://[fd00::1]/", False), ("fd00::2", "https://[fd00::1]/", False),
        ("0.0.0.0/0", URL, False), (".", URL, False), (",,", URL, False),
    ],
)  # fmt: skip
def test_hosts_that_need_no_proxy(no_proxy: str, url: str, exempt: bool) -> None:
    """NO_PROXY by name and all under it, by address and network, with ports, as curl and Go read it."""
    for name in ("no_proxy", "NO_PROXY"):
        assert (chosen({"HTTPS_PROXY": "http://a:1", name: no_proxy}, url) is None) == exempt


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "[::1]", "api.localhost"])
def test_this_machine_needs_no_proxy(host: str) -> None:
    """Whatever the environment says, unless a proxy is named in the settings."""
    environ = {"https_proxy": "http://a:1", "http_proxy": "http://a:1", "all_proxy": "http://a:1"}
    assert chosen(environ, f"https://{host}:8443/v1") is None
    config = gr.ClientConfig(api_key="k", base_url="http://127.0.0.1:1", proxy="http://named:1")
    resolved = config.resolved(environ)
    assert isinstance(resolved.proxy, Proxy)
    assert resolved.proxy.host == "named"


def test_a_variable_that_is_no_proxy() -> None:
    """The error names the variable, and shows no password."""
    for value in (f"socks4://u:{PASSWORD}@h", f"http://u:{PASSWORD}@h:x"):
        with pytest.raises(ConfigError, match=r"^HTTPS_PROXY: ") as refused:
            gr.ClientConfig(api_key="k").resolved({"HTTPS_PROXY": value, "OTHER": PASSWORD})
        assert "gorouter_trio/config.py" in shown_by(refused.value)
        assert PASSWORD not in shown_by(refused.value)


def test_who_wins() -> None:
    """A named proxy before the environment's; "direct", a transport and a socket before both."""
    environ = {"HTTPS_PROXY": "http://a:1"}
    for fields, expected in (
        ({}, "http://a:1"),
        ({"proxy": "http://b:1"}, "http://b:1"),
        ({"proxy": "direct"}, None),
        ({"transport": object()}, None),
        ({"unix_socket": "/run/x"}, None),
    ):
        resolved = gr.ClientConfig(api_key="k", base_url=URL, **fields).resolved(environ)
        assert (resolved.proxy.url if isinstance(resolved.proxy, Proxy) else None) == expected


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"proxy": 5}, "proxy"), ({"tls": "x"}, "tls"), ({"tls": True}, "tls"), ({"unix_socket": 5}, "unix_socket"),
        ({"unix_socket": ""}, "unix_socket"), ({"unix_socket": "x" * 108}, "unix_socket"),
        ({"unix_socket": "/run/\ud800"}, "unix_socket"),
        ({"unix_socket": "/x", "proxy": "http://h"}, "unix_socket"),
        ({"unix_socket": "/x", "transport": 1}, "unix_socket"),
        ({"unix_socket": "/x", "transport": []}, "unix_socket"),
        ({"compression": "gzip"}, "compression"), ({"compression": 5}, "compression"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(fields: dict[str, object], named: str) -> None:
    """What is no proxy, no TLS setting, no socket and no coding is refused by its name."""
    with pytest.raises(ConfigError, match=rf"^{named}: "):
        gr.ClientConfig(api_key="k", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ca_file": ""}, "ca_file"), ({"ca_file": 5}, "ca_file"), ({"ca_data": 5}, "ca_data"),
        ({"key_file": "x"}, "key_file"), ({"key_password": "x"}, "key_password"),
        ({"cert_file": "x", "key_password": 5}, "key_password"), ({"trust_system": 1}, "trust_system"),
    ],
)  # fmt: skip
def test_tls_settings_that_are_refused(fields: dict[str, object], named: str) -> None:
    """A path that is none, a key without its certificate: refused by name."""
    with pytest.raises(ConfigError, match=rf"^tls\.{named}: "):
        TlsConfig(**fields)  # type: ignore[arg-type]


def test_the_password_of_a_key_shows_nowhere() -> None:
    """It becomes a Secret where it comes in."""
    assert PASSWORD not in repr(gr.TlsConfig(cert_file="x", key_password=PASSWORD))


def test_plain_http_through_a_socket_of_this_machine() -> None:
    """A socket's other end is this machine, so the key may go in the clear whatever the host's name is."""
    gr.ClientConfig(api_key="k", base_url="http://api.internal/v1", unix_socket="/run/x").resolved({})
    with pytest.raises(ConfigError, match="insecure_http"):
        gr.ClientConfig(api_key="k", base_url="http://api.internal/v1").resolved({})


@pytest.mark.parametrize("wrong", [{"nothing": 1}, {"pool": 1}, {"model": ""}, {"base_url": "x"}, {"options": 1}])
async def test_other_settings_that_are_wrong_show_no_secret(wrong: dict[str, object]) -> None:
    """Whatever is wrong, the key and the proxy's password are in no frame of the error."""
    key = "sk-or-v1-c4n4ry-k3y"
    with pytest.raises(ConfigError) as refused:
        async with gr.open_client(api_key=key, proxy=f"http://u:{PASSWORD}@h", **wrong):
            raise AssertionError("opened")
    assert "gorouter_trio/client.py" in shown_by(refused.value)
    assert key not in shown_by(refused.value)
    assert PASSWORD not in shown_by(refused.value)
