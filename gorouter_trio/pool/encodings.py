"""OpenAI's own tokenizer, where it is installed and its data are on this machine already; nothing is downloaded.

tiktoken fetches an encoding that its cache lacks, and fetches one again whose digest is wrong. So both are checked here
before it is asked, and reading, checking and counting run in a thread: the data are megabytes.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

import trio

if TYPE_CHECKING:
    from .tokens import TokenEstimator

__all__ = ["Encoding", "EncodingName", "calibrate", "load_encoding"]

EncodingName = str
"""`o200k_base` (GPT-4o and newer) or `cl100k_base` (before that)."""

_BASE_URL: Final = "https://openaipublic.blob.core.windows.net/encodings/"
_DIGESTS: Final = {
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}


class Encoding(Protocol):
    """What is used of a `tiktoken.Encoding`."""

    def encode_ordinary(self, text: str) -> list[int]:
        """The tokens of a text."""


async def load_encoding(name: EncodingName = "o200k_base") -> Encoding | None:
    """The encoding, or None: tiktoken is not installed, does not know it, or would have to download it."""
    return await trio.to_thread.run_sync(_load, name)


async def calibrate(estimator: TokenEstimator, model: str, *, encoding: Encoding, text: str) -> float:
    """Teach the estimator a model's tokens a byte from a text like those that will be sent; returns the ratio."""
    tokens = await trio.to_thread.run_sync(lambda: len(encoding.encode_ordinary(text)))
    if tokens:
        estimator.learn(model, tokens=tokens, text_bytes=len(text.encode()))
    return estimator.ratio(model)


def _load(name: EncodingName) -> Encoding | None:
    if not _is_cached(name):
        return None
    try:
        tiktoken = importlib.import_module("tiktoken")
    except ImportError:
        return None
    return cast("Encoding", tiktoken.get_encoding(name))


def _is_cached(name: EncodingName) -> bool:
    """Whether tiktoken will find the whole encoding where it looks first."""
    digest = _DIGESTS.get(name)
    named = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if digest is None or named == "":
        return False
    folder = Path(named) if named else Path(tempfile.gettempdir()) / "data-gym-cache"
    url = f"{_BASE_URL}{name}.tiktoken"
    try:
        data = (folder / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == digest
