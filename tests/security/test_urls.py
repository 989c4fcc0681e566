"""URLs that a model chose: 200 and more that lead inside are refused, 100 that do not are not (row 45)."""

# Wrong settings are made on purpose, and what a decision or a field is, the next line tells.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import ipaddress
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gorouter_trio as gr
from gorouter_trio.security import CheckedUrl, UrlPolicy, check_address, check_addresses, check_url, join_redirect

DEFAULT = UrlPolicy()
LOOSE = UrlPolicy(schemes=("https", "http"), ports=None)

# Where no request may lead, by what it is.
INSIDE_V4 = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.0.0.1",
    "127.255.255.254", "168.63.129.16", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.1",
    "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1", "192.168.255.255", "198.18.0.1", "198.19.255.255",
    "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
]  # fmt: skip
INSIDE_V6 = [
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1",
    "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:4136:e378::",
    "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "3fff::1", "4000::1", "5f00::1",
    "fc00::1", "fd00:ec2::254", "fd12:3456::1", "fe80::1", "fec0::1", "ff02::1", "ff0e::1", "2001:1::1",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1", "8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.0", "172.15.0.1", "172.32.0.1", "126.255.0.1",
    "128.0.0.1", "169.253.1.1", "192.167.1.1", "192.169.1.1", "198.17.1.1", "198.20.1.1", "223.255.255.255",
    "2606:4700:4700::1111", "2a00:1450:4001::200e", "2620:fe::fe", "2003::1", "2400:cb00::1", "3ffe::1",
]  # fmt: skip


def spellings(address: str) -> list[str]:
    """An IPv4 address in the ways in which resolvers and browsers read one."""
    a, b, c, d = map(int, address.split("."))
    number = int(ipaddress.IPv4Address(address))
    wide = "".join(chr(ord(ch) + 0xFEE0) for ch in address)
    return [
        address, str(number), hex(number), f"0{number:o}", f"{a:#x}.{b:#x}.{c:#x}.{d:#x}",
        f"0{a:o}.0{b:o}.0{c:o}.0{d:o}", f"{a}.{b}.{c * 256 + d}", f"{a}.{b * 65536 + c * 256 + d}",
        f"{a:#x}.{b}.{c}.{d}", f"{address}.", f"00{a}.{b}.{c}.{d}", f"{a}.{b}.{c}.{d:#X}", wide,
        address.replace(".", "。"), address.replace(".", "．"), f"[::ffff:{address}]", f"[::{address}]",
        f"[64:ff9b::{address}]", f"{a}.{b}.{c}.{d}%00", "".join(f"%{ord(ch):02x}" for ch in address),
    ]  # fmt: skip


NAMES_INSIDE = [
    "localhost", "LOCALHOST", "localhost.", "foo.localhost", "ｌocalhost", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "localhost.localdomain",
    "printer", "router.local", "metadata.google.internal", "metadata", "vault.service.internal", "db.corp", "nas.lan",
    "wiki.intranet", "x.home.arpa", "1.0.0.127.in-addr.arpa", "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local", "a.onion", "a.test", "a.invalid", "host.docker.internal", "0", "127.1",
    "127.0.1", "0x7f.1", "017700000001", "2130706433", "0x", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.256",
    "example.com.127", "a.0x7f",
]  # fmt: skip
TRICKS = [
    "https://user@127.0.0.1/", "https://good.example.com@10.0.0.1/", "https://10.0.0.1#@good.example.com/",
    "https://good.example.com:443@10.0.0.1/", "https://a:b@good.example.com/", "https://@good.example.com/",
    "https://good.example.com\\@10.0.0.1/", "https:\\\\10.0.0.1/", "https:/\\10.0.0.1/", "https:10.0.0.1",
    "//10.0.0.1/", "https:///10.0.0.1/", "https://", "https:///", "https://:443/", "https://[", "https://[::1",
    "https://[::1]x/", "https://[::1]:99999/", "https://[fe80::1%25eth0]/", "https://[fe80::1%eth0]/",
    "https://[v1.x]/", "https://[]/", "http://good.example.com/", "ftp://good.example.com/", "file:///etc/passwd",
    "gopher://good.example.com:70/_x", "dict://good.example.com:11211/", "javascript:alert(1)", "data:text/plain,x",
    "ldap://good.example.com/", "jar:https://good.example.com!/", "ws://good.example.com/",
    "https://good.example.com:22/", "https://good.example.com:0/", "https://good.example.com:80/",
    "https://good.example.com:65536/", "https://good.example.com:-1/", "https://good.example.com:x/",
    "https://good.example.com:443:443/", " https://good.example.com/", "https://good.example.com/ x",
    "https://good.example.com/\n", "https://good.exa\tmple.com/", "https://10.0.\n0.1/",
    "https://good.example.com/\x00", "https://good.example.com\u200b/", "\u202ehttps://good.example.com/",
    "https://good.example.com\u3000/", "https://-bad.example.com/", "https://bad-.example.com/", "https://a..b.com/",
    "https://.example.org/", "https://" + "a" * 64 + ".com/", "https://" + "a." * 130 + "com/",
    "https://ex ample.com/", "https://ex%61mple.org/", "https://127。0。0。1/",
    "https://good.example.com/" + "a" * 9_000, "", "x", "https", "https://1.1.1.1.1.1.1.1/", "https://*.example.org/",
    "https://exa$mple.org/", "https://a,b.com/", "https://\ud800.com/", "https://a!b.com/", "https://xn--.com:x/",
    "https://\u00ad/", "https://example.org:4４3/", "https://" + "é" * 70 + ".com/", "https://" + "é." * 3_000 + "com/",
]  # fmt: skip


def bad_urls() -> list[str]:
    hosts = [spelling for address in INSIDE_V4 for spelling in spellings(address)]
    hosts += [f"[{address}]" for address in INSIDE_V6] + NAMES_INSIDE
    return [f"https://{host}/latest/meta-data" for host in hosts] + TRICKS


def good_urls() -> list[str]:
    hosts = [f"[{a}]" if ":" in a else a for a in PUBLIC]
    names = [
        "example.org", "www.example.org", "api.openrouter.ai", "a.b.c.d.e.co.uk", "x--y.org", "xn--mnchen-3ya.de",
        "münchen.de", "пример.рф", "例え.jp", "EXAMPLE.ORG", "example.org.", "1and1.com", "3com.com", "0x.org", "a1.io",
        "127.0.0.1.example.org", "localhost.example.org", "internal.example.com", "local.example.com", "_dmarc.a.org",
        "metadata.example.net", "my-host.fr", "corp.co", "test.io", "10.example.org",
    ]  # fmt: skip
    targets = ["", "/", "/a/b?c=d&e=f", "/%2e%2e/x", "/a#fragment"]
    found = [f"https://{host}{target}" for host in names for target in targets[:4]]
    return found + [f"https://{host}/" for host in hosts] + ["https://example.org:443/x", "HTTPS://example.org/"]


def test_what_leads_inside_is_refused(record_property) -> None:
    """Every spelling of every closed address, every local name and every parser's trick."""
    bad = bad_urls()
    passed = [url for url in bad if _is_open(url)]
    assert passed == []
    assert len(set(bad)) >= 200
    record_property(
        "figure", f"{len(set(bad))} URLs that lead inside, 0 let through; {len(good_urls())} good, 0 refused"
    )


def test_what_does_not_is_not() -> None:
    """A hundred good URLs pass, in the one spelling that is then to be fetched."""
    good = good_urls()
    assert len(set(good)) >= 100
    assert [url for url in good if not _is_open(url)] == []
    assert [check_url(check_url(url).url) for url in good] == [check_url(url) for url in good]


def _is_open(url: str, policy: UrlPolicy = DEFAULT) -> bool:
    try:
        check_url(url, policy=policy)
    except gr.DangerousArgumentError:
        return False
    return True


def test_loose_policies_close_addresses_all_the_same() -> None:
    """Whatever schemes and ports are allowed, no spelling of a closed address or local name is."""
    hosts = [s for address in INSIDE_V4 for s in spellings(address)] + [f"[{a}]" for a in INSIDE_V6] + NAMES_INSIDE
    assert [host for host in hosts for port in ("", ":8080") if _is_open(f"http://{host}{port}/", LOOSE)] == []
    assert check_url("http://example.org:8080/x", policy=LOOSE).port == 8080


@pytest.mark.parametrize("address", INSIDE_V4 + INSIDE_V6)
def test_closed_addresses(address: str) -> None:
    """What a name resolves to is looked at in the same way, alone and among good ones (rebinding)."""
    for ip in (address, ipaddress.ip_address(address)):
        with pytest.raises(gr.DangerousArgumentError, match="not on the public Internet"):
            check_address(ip)
        with pytest.raises(gr.DangerousArgumentError):
            check_addresses(["1.1.1.1", ip])


def test_open_addresses() -> None:
    """Public ones come back as addresses, ready to be connected to; none at all is an error."""
    assert [str(check_address(address)) for address in PUBLIC] == PUBLIC
    assert check_addresses(PUBLIC[:2]) == tuple(map(ipaddress.ip_address, PUBLIC[:2]))
    with pytest.raises(gr.DangerousArgumentError, match="no address"):
        check_addresses([])
    for nonsense in ("", "1.2.3", "example.org", "1.1.1.1/32", "fe80::1%eth0", "2606:4700::1%1"):
        with pytest.raises(gr.DangerousArgumentError):
            check_address(nonsense)


@given(st.ip_addresses(v=4))
def test_no_private_address_is_open(address: ipaddress.IPv4Address) -> None:
    """What the standard library knows as not global is closed here as well."""
    try:
        check_address(address)
    except gr.DangerousArgumentError:
        return
    assert address.is_global


def test_a_resolver_that_changes_its_mind(rng: random.Random) -> None:
    """Rebinding: of a hundred answers that alternate, only the wholly public ones are given to connect to."""
    for _ in range(100):
        answer = rng.choices([*PUBLIC, *INSIDE_V4, *INSIDE_V6], k=rng.randint(1, 3))
        if all(ip in PUBLIC for ip in answer):
            assert [str(ip) for ip in check_addresses(answer)] == answer
        else:
            with pytest.raises(gr.DangerousArgumentError):
                check_addresses(answer)


def test_redirects() -> None:
    """Each is checked like a URL of its own; relative ones stay on the host."""
    base = check_url("https://example.org/a/b?c=d")
    assert join_redirect(base, "../x?y=z").url == "https://example.org/x?y=z"
    assert join_redirect(base, "//example.net/").host == "example.net"
    assert join_redirect(base, "https://example.net/x").url == "https://example.net/x"
    bad = [
        "http://example.org/", "//127.0.0.1/", "https://169.254.169.254/", "file:///etc/passwd",
        "/x\r\nSet-Cookie: a", "\\\\10.0.0.1\\x", "https://user@example.org/", "x" * 9_000, "//localhost",
        "http://[::1", "//[x]/",
    ]  # fmt: skip
    for location in bad:
        with pytest.raises(gr.DangerousArgumentError):
            join_redirect(base, location)


def test_hosts() -> None:
    """Allowed hosts are the only ones, closed ones never, and names below them as the rule says."""
    policy = UrlPolicy(hosts=("api.example.com", ".example.net"), closed_hosts=("evil.example.net", ".bad.example.net"))
    allowed = {"api.example.com", "a.example.net", "a.b.example.net"}
    refused = {
        "example.com", "x.api.example.com", "example.net", "evil.example.net", "x.bad.example.net", "aexample.net",
        "1.1.1.1", "example.org",
    }  # fmt: skip
    assert {host for host in allowed | refused if _is_open(f"https://{host}/", policy)} == allowed
    assert not _is_open("https://1.1.1.1/", UrlPolicy(addresses=False))
    assert not _is_open("https://[2606:4700:4700::1111]/", UrlPolicy(addresses=False))
    assert _is_open("https://example.org/", UrlPolicy(addresses=False))


@pytest.mark.parametrize(
    ("rule", "url"),
    [
        ("bücher.example.org", "https://xn--bcher-kva.example.org/"),
        ("BÜCHER.example.org", "https://bücher.example.org/"),
        (".bücher.example.org", "https://a.xn--bcher-kva.example.org/"),
        ("Evil.example.net.", "https://evil.example.net/"),
        ("[2606:4700:4700:0::1111]", "https://[2606:4700:4700::1111]/"),
        ("2606:4700:4700:0:0:0:0:1111", "https://[2606:4700:4700::1111]/"),
    ],
)
def test_hosts_in_other_spellings(rule: str, url: str) -> None:
    """A rule applies however its host is written, as it does to any spelling in a URL."""
    assert not _is_open(url, UrlPolicy(closed_hosts=[rule]))
    assert _is_open(url, UrlPolicy(hosts=[rule]))


def test_policies_that_cannot_be_right() -> None:
    """A str where several names belong is refused, and so are schemes, ports and hosts that are none."""
    for fields in (
        {"schemes": "https"},
        {"schemes": ["file"]},
        {"ports": [0]},
        {"ports": ["443"]},
        {"hosts": "example.org"},
        {"closed_hosts": "a"},
        {"closed_hosts": ["*.example.org"]},
        {"closed_hosts": ["https://example.org"]},
        {"hosts": ["example.org:443"]},
        {"hosts": ["."]},
    ):
        with pytest.raises(gr.SecurityConfigError):
            UrlPolicy(**fields)


def test_what_is_checked_is_what_is_fetched() -> None:
    """The parts add up to a URL without fragment or default port that all parsers read alike."""
    url = check_url("HTTPS://MÜNCHEN.de.:443/a/ü?b=c#d")
    assert url == CheckedUrl("https", "xn--mnchen-3ya.de", 443, "/a/ü?b=c", None)
    assert url.url == "https://xn--mnchen-3ya.de/a/ü?b=c"
    assert check_url("https://[2606:4700:4700:0::1111]/").url == "https://[2606:4700:4700::1111]/"
    assert check_url("https://1.1.1.1").address == "1.1.1.1"


def test_errors_are_one_line() -> None:
    """What a stranger wrote stands in the message escaped and cut short."""
    with pytest.raises(gr.DangerousArgumentError) as caught:
        check_url("https://evil\r\nFAKE: line/" + "x" * 1_000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(gr.DangerousArgumentError, match="a int is no URL"):
        check_url(7)
