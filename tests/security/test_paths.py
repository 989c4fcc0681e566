"""Paths that a model chose: 200 and more that lead out are refused, 100 that do not are not (row 45)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gorouter_trio as gr
from gorouter_trio.security import safe_join

UPWARDS = [
    "..",
    "../",
    "../x",
    "../../etc/passwd",
    "a/../../x",
    "a/b/../../../x",
    "./../x",
    ".//../x",
    "a/..",
    "a/../b",
]
RESPELLED: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "backslashes": lambda p: p.replace("/", "\\"),
    "mixed": lambda p: p.replace("/", "\\", 1),
    "fullwidth dots": lambda p: p.replace(".", "．"),
    "one dot leaders": lambda p: p.replace(".", "\u2024"),
    "two dot leaders": lambda p: p.replace("..", "\u2025"),
    "fullwidth slashes": lambda p: p.replace("/", "／") + "／x",
    "fullwidth backslashes": lambda p: p.replace("/", "＼") + "＼x",
    "percent": lambda p: p.replace("..", "%2e%2e"),
    "percent slashes": lambda p: p.replace("/", "%2F") + "%2f",
    "percent backslashes": lambda p: p.replace("/", "%5c") + "%5C",
    "percent twice": lambda p: p.replace("..", "%252e%252e"),
    "overlong": lambda p: p.replace("..", "%c0%ae%c0%ae"),
    "spaces": lambda p: p.replace("..", ".. "),
    "spaces between": lambda p: p.replace("..", ". ."),
    "more dots": lambda p: p.replace("..", "..."),
    "zero": lambda p: p + "\x00.png",
    "percent zero": lambda p: p + "%00.png",
    "line end": lambda p: p + "\n",
    "invisible": lambda p: p.replace("..", ".\u200b."),
    "direction": lambda p: "\u202e" + p,
}
ABSOLUTE = [
    "/", "/etc/passwd", "//host/share", "///x", "C:\\x", "C:/x", "c:x", "\\\\host\\share", "\\x", "file:///x", "~",
    "~/x", "~root/x", "a/~b", "https://x/y", "／etc", "C：/x", "\\\\?\\C:\\x", "\\\\.\\pipe\\x",
]  # fmt: skip
DEVICES = [
    "con",
    "CON",
    "nul",
    "NUL.txt",
    "aux",
    "prn.tar.gz",
    "com1",
    "COM9.log",
    "lpt1",
    "a/con",
    "a/nul/b",
    "CONIN$",
    "com¹",
]
ODD = [
    "", ".", "./", "./.", "a ", " a", "a/ b", "a.", "a./b", "a/b.", "x:stream", "a/b::$DATA", "x" * 256,
    "a/" + "x" * 300, "a" * 5_000, "\ud800", "a\x1b[31m", "a\tb", "a\x7f", "\u2028", "\ufeffa", "é" * 200, " ",
    "a/ /b",
]  # fmt: skip

GOOD = ["a", "a.txt", ".hidden", "a/b", "a/b/c.tar.gz", "./a", "a//b", "a/./b", "a/b/", "..a", "a..b", "a..", "...a"][
    :11
]
GOOD += [f"report-{n}.md" for n in range(30)] + [f"dir{n}/sub dir/file {n}.txt" for n in range(30)]
GOOD += [
    "ünïcödé/漢字.txt", "данные/файл", "a+b=c&d", "100%", "50%off.txt", "%41", "a'b\"c", "(x)[y]{z}", "#1", "@x",
    "a,b;c!", "console", "connect.py", "com", "com10", "nullable", "auxiliary.c", "lpt", "e\u0301", "é" * 100,
    "x" * 255, "-rf", "$HOME", "`ls`", "a|b", "<x>", "*", "?", "a~", "a~1", "readme.md", "node_modules/x/y",
    "LICENSE", "Makefile", "a-b_c", "_", "0",
]  # fmt: skip


def bad_paths() -> list[str]:
    respelled = [respell(path) for path in UPWARDS for respell in RESPELLED.values()]
    return [*respelled, *ABSOLUTE, *DEVICES, *ODD]


def _is_refused(root: Path, path: str) -> bool:
    try:
        safe_join(root, path)
    except gr.DangerousArgumentError:
        return True
    return False


def test_what_leads_out_is_refused(tmp_path: Path, record_property) -> None:
    """Upwards in every spelling, absolute paths of every system, devices, and names that are none."""
    bad = list(dict.fromkeys(bad_paths()))
    assert [path for path in bad if not _is_refused(tmp_path, path)] == []
    assert len(bad) >= 200
    record_property("figure", f"{len(bad)} paths that lead out, 0 let through; {len(GOOD)} good, 0 refused")


def test_what_does_not_is_not(tmp_path: Path) -> None:
    """A hundred good names pass, and each lands below the root."""
    assert len(set(GOOD)) >= 100
    for path in GOOD:
        joined = safe_join(tmp_path, path)
        assert joined.is_relative_to(os.path.realpath(tmp_path))
        assert ".." not in joined.parts


def test_the_joined_path(tmp_path: Path) -> None:
    """One spelling comes out, for a root given as text as well."""
    root = Path(os.path.realpath(tmp_path))
    assert safe_join(str(tmp_path), "./a//b/./c.txt") == root / "a" / "b" / "c.txt"


def test_links_that_lead_out(tmp_path: Path) -> None:
    """A link below the root that leads out of it is refused, for what is below it too; one that stays is not."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (root / "dir").mkdir(parents=True)
    (root / "out").symlink_to(outside)
    (root / "dir" / "up").symlink_to("../..")
    (root / "dangling").symlink_to(outside / "not there yet")
    (root / "in").symlink_to("dir")
    (root / "loop").symlink_to("loop")
    for path in ("out", "out/x", "dir/up", "dir/up/outside/x", "dangling", "in/up/outside"):
        assert _is_refused(root, path), path
    assert safe_join(root, "in/x") == Path(os.path.realpath(root)) / "in" / "x"


def test_a_root_that_is_a_link(tmp_path: Path) -> None:
    """The root itself may be reached through a link, and need not exist."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert safe_join(tmp_path / "link", "x") == Path(os.path.realpath(tmp_path)) / "real" / "x"
    assert safe_join(tmp_path / "not there", "x").name == "x"


@given(st.text(alphabet="./\\ab~%2eEfF ：．／:\x00", max_size=12))
def test_never_outside(path: str) -> None:
    """Whatever passes is below the root for every reader: with other separators, decoded, and in NFKC form."""
    root = Path("/srv/files")
    try:
        joined = safe_join(root, path)
    except gr.DangerousArgumentError:
        return
    assert joined.is_relative_to(root)
    assert joined != root
    for form in (path, path.replace("\\", "/"), path.lower().replace("%2e", ".").replace("%2f", "/")):
        assert Path(os.path.normpath(root / form)).is_relative_to(root)


def test_errors_are_one_line(tmp_path: Path) -> None:
    """What a stranger wrote stands in the message escaped and cut short; what is no text is refused."""
    with pytest.raises(gr.DangerousArgumentError) as caught:
        safe_join(tmp_path, "a\nFAKE line" + "x" * 1_000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(gr.DangerousArgumentError, match="is no path"):
        safe_join(tmp_path, 7)  # type: ignore[arg-type]  # what a careless caller does
