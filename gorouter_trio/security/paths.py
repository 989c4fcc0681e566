"""Paths that a model chose, kept below one directory."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from ..errors import DangerousArgumentError
from .text import escape_controls

__all__ = ["safe_join"]

_MAX_PATH_CHARS = 4_096
_MAX_NAME_BYTES = 255
# What becomes a dot, a separator or an end when somebody decodes it once more.
_ENCODED = re.compile(r"%(25)*(2e|2f|5c|00|3a|7e|c0%ae|c0%af)", re.IGNORECASE)
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)


def safe_join(root: str | Path, relative: str) -> Path:
    """The path `relative` below `root`, in one spelling; raises `DangerousArgumentError` when it could be elsewhere.

    `relative` is looked at as every system and decoder would: no absolute paths, drives, `..`, backslashes, controls,
    names of devices or streams, in fullwidth or percent-encoded form neither. Symbolic links that are there now and
    lead out of `root` are refused; against one that is made afterwards, open with `O_NOFOLLOW`, and keep `root` where
    others cannot write.
    """
    _check_text(relative)
    for form in {relative, unicodedata.normalize("NFKC", relative)}:
        _check_form(relative, form)
    parts = [part for part in relative.split("/") if part not in {"", "."}]
    if not parts:
        raise _refused(relative, "it names no file")
    base = Path(os.path.realpath(root))
    path = base.joinpath(*parts)
    if not Path(os.path.realpath(path)).is_relative_to(base):
        raise _refused(relative, "a link on it leads out of the directory")
    return path


def _check_text(relative: object) -> None:
    if not isinstance(relative, str):
        raise _refused("", f"a {type(relative).__name__} is no path")
    if len(relative) > _MAX_PATH_CHARS:
        raise _refused(relative, f"it has more than {_MAX_PATH_CHARS} characters")
    if any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in relative):
        raise _refused(relative, "it holds control characters")


def _check_form(relative: str, form: str) -> None:
    if form.startswith("/") or "\\" in form or ":" in form:
        raise _refused(relative, "it is absolute, or has a drive or backslashes")
    if _ENCODED.search(form):
        raise _refused(relative, "it hides characters by percent-encoding")
    for part in form.split("/"):
        _check_part(relative, part)


def _check_part(relative: str, part: str) -> None:
    if part.strip(" .") == "" and part not in {"", "."}:
        raise _refused(relative, "it leads upwards")
    if part.startswith("~"):
        raise _refused(relative, "it leads to a home directory")
    if part != part.strip(" ") or (part.endswith(".") and part != "."):
        raise _refused(relative, "a name in it begins or ends with a space, or ends with a dot")
    if _DEVICES.fullmatch(part):
        raise _refused(relative, "it names a device")
    if len(part.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES:
        raise _refused(relative, "a name in it is too long")


def _refused(relative: str, why: str) -> DangerousArgumentError:
    shown = f" {escape_controls(relative[:200])!r}" if relative else ""
    return DangerousArgumentError(f"the path{shown} is refused: {why}")
