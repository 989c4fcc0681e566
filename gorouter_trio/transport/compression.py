"""Compressed bodies: what is asked for, and decoding as it arrives, bounded in memory. No I/O.

A decoder gives out at most a piece at a time, however much the input unpacks to, and everything that a flush of the
other side has made complete, so that an event of a stream is not held back. gzip and deflate are Python's own; br and
zstd need the extra `compression` (zstd comes with Python from 3.14 on), and are imported when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..errors import ConfigError, DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .http import ConnectionLimits

__all__ = ["BodyDecoder", "FileDecoder", "accept_encoding", "make_decoder"]

_PIECE_BYTES: Final = 256 * 1024
# Below this no ratio fills a memory. It has to be large: most bytes of a stream's event are those of the one before,
# and 5,000 events (1.4 MB) that were compressed in one go unpack to 108 (gzip) to 164 (br) times their size.
_HARMLESS_BYTES: Final = 8 * 1024 * 1024
# What a decoder of zstd must have for any reply, and need not go beyond (RFC 9659): a window of 8 MiB.
_ZSTD_WINDOW_LOG: Final = 23
_ZSTD_MODULE: Final = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
_GZIP_WBITS: Final = 31
_ALIASES: Final = {"x-gzip": "gzip"}


class _Codec(Protocol):
    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What it raises for data that are broken."""

    @property
    def needs_input(self) -> bool:
        """Whether nothing comes out before something goes in."""

    @property
    def is_ended(self) -> bool:
        """Whether the data so far are whole."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Take `data` and give out at most so many bytes; more may be there for a call without data."""


class _Zlib:
    """gzip, of one or more members, and what deflate turns out to be."""

    errors = (zlib.error,)

    def __init__(self, wbits: int, *, many: bool) -> None:
        self._wbits = wbits
        self._many = many
        self._inflate = zlib.decompressobj(wbits)
        self._rest = b""
        self._is_full = False

    @property
    def needs_input(self) -> bool:
        return not self._rest and not self._is_full

    @property
    def is_ended(self) -> bool:
        return self._inflate.eof and not self._rest

    def decompress(self, data: bytes, max_length: int) -> bytes:
        data = self._rest + data
        if self._inflate.eof and data:
            if not self._many:
                raise zlib.error("there is more after its end")
            self._inflate = zlib.decompressobj(self._wbits)
        made = self._inflate.decompress(data, max_length)
        self._rest = self._inflate.unconsumed_tail or self._inflate.unused_data
        self._is_full = len(made) == max_length
        return made


class _Deflate:
    """What calls itself deflate: zlib's format (RFC 1950), as it should be, or bare (RFC 1951), as it often is."""

    errors = (zlib.error,)

    def __init__(self) -> None:
        self._start = b""
        self._zlib: _Zlib | None = None

    @property
    def needs_input(self) -> bool:
        return self._zlib is None or self._zlib.needs_input

    @property
    def is_ended(self) -> bool:
        return self._zlib is not None and self._zlib.is_ended

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if self._zlib is None:
            data = self._start = self._start + data
            if len(data) < 2:
                return b""
            has_header = data[0] & 0x0F == 8 and data[0] >> 4 <= 7 and int.from_bytes(data[:2], "big") % 31 == 0
            self._zlib = _Zlib(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS, many=False)
        return self._zlib.decompress(data, max_length)


class _Brotli:
    """br (RFC 7932)."""

    def __init__(self) -> None:
        library: Any = importlib.import_module("brotli")
        self.errors: tuple[type[Exception], ...] = (library.error,)
        self._decompressor = library.Decompressor()
        self._rest = b""
        self._is_full = False

    @property
    def needs_input(self) -> bool:
        return not (self._rest or self._is_full) and bool(self._decompressor.can_accept_more_data())

    @property
    def is_ended(self) -> bool:
        return not self._rest and bool(self._decompressor.is_finished())

    def decompress(self, data: bytes, max_length: int) -> bytes:
        data, self._rest = self._rest + data, b""
        if not self._decompressor.can_accept_more_data():
            data, self._rest = b"", data
        made: bytes = self._decompressor.process(data, output_buffer_limit=max_length)
        self._is_full = len(made) >= max_length
        return made


class _Zstd:
    """zstd (RFC 8878), of one or more frames."""

    def __init__(self) -> None:
        self._library: Any = importlib.import_module(_ZSTD_MODULE)
        self.errors: tuple[type[Exception], ...] = (self._library.ZstdError,)
        self._frame = self._open_frame()

    @property
    def needs_input(self) -> bool:
        return bool(not self._frame.unused_data if self._frame.eof else self._frame.needs_input)

    @property
    def is_ended(self) -> bool:
        return bool(self._frame.eof and not self._frame.unused_data)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if self._frame.eof:
            data = self._frame.unused_data + data
            if not data:
                return b""
            self._frame = self._open_frame()
        made: bytes = self._frame.decompress(data, max_length)
        return made

    def _open_frame(self) -> Any:  # noqa: ANN401 - one of two modules, neither always there
        options = {self._library.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        return self._library.ZstdDecompressor(options=options)


_CODECS: Final[dict[str, Callable[[], _Codec]]] = {
    "zstd": _Zstd,
    "br": _Brotli,
    "gzip": lambda: _Zlib(_GZIP_WBITS, many=True),
    "deflate": _Deflate,
}
_LIBRARIES: Final = {"zstd": _ZSTD_MODULE, "br": "brotli"}


class BodyDecoder:
    """The body of one reply, decoded piece by piece.

    Raises `DecodeError` for data that are broken or cut, and for a body over the limits: `max_body_bytes` decoded, or
    over 8 MiB and more than `max_compression_ratio` times what came over the wire.
    """

    __slots__ = ("_codec", "_coding", "_decoded_bytes", "_limits", "_received_bytes")

    def __init__(self, coding: str, limits: ConnectionLimits) -> None:
        self._coding = coding
        self._codec = _CODECS[coding]()
        self._limits = limits
        self._received_bytes = 0
        self._decoded_bytes = 0

    @property
    def needs_input(self) -> bool:
        """Whether nothing comes out before something goes in."""
        return self._codec.needs_input

    def decode(self, data: bytes = b"") -> bytes:
        """Take what has arrived, and give out the next piece; it may be empty while more is needed."""
        self._received_bytes += len(data)
        try:
            piece = self._codec.decompress(data, _PIECE_BYTES)
        except self._codec.errors as exc:
            raise DecodeError(f"the reply's body is not {self._coding}: {exc}") from exc
        self._decoded_bytes += len(piece)
        if self._decoded_bytes > self._limits.max_body_bytes:
            raise DecodeError(f"the reply's body is over {self._limits.max_body_bytes} bytes")
        ratio = self._limits.max_compression_ratio
        if self._decoded_bytes > max(_HARMLESS_BYTES, ratio * self._received_bytes):
            raise DecodeError(f"the reply's body unpacks to more than {ratio} times its size")
        return piece

    def finish(self) -> None:
        """The body has ended: raises `DecodeError` when its data have not."""
        if self._received_bytes and not self._codec.is_ended:
            raise DecodeError(f"the reply's body ends in the middle of its {self._coding} data")


class FileDecoder:
    """A compressed file, decoded as it is read, without bounds: who names a file trusts it.

    `coding` is one of those above. Raises `DecodeError` for data that are broken or cut, and without the library.
    """

    __slots__ = ("_codec", "_coding", "_has_begun")

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._has_begun = False
        try:
            self._codec = _CODECS[coding]()
        except ImportError as exc:
            raise DecodeError(f"{coding} needs the extra: pip install gorouter-trio[compression]") from exc

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` unpack to, in pieces."""
        self._has_begun = self._has_begun or bool(data)
        while data or not self._codec.needs_input:
            try:
                piece = self._codec.decompress(data, _PIECE_BYTES)
            except self._codec.errors as exc:
                raise DecodeError(f"the {self._coding} data are broken: {exc}") from exc
            data = b""
            yield piece

    def finish(self) -> None:
        """The file has ended: raises `DecodeError` when its data have not."""
        if self._has_begun and not self._codec.is_ended:
            raise DecodeError(f"the file ends in the middle of its {self._coding} data")


def make_decoder(content_encoding: str, limits: ConnectionLimits) -> BodyDecoder | None:
    """The decoder for a Content-Encoding header, None where it names none; `DecodeError` when there is none for it."""
    names = [name.strip().lower() for name in content_encoding.split(",")]
    codings = [_ALIASES.get(name, name) for name in names if name not in {"", "identity"}]
    if not codings:
        return None
    if len(codings) > 1 or codings[0] not in _CODECS:
        raise DecodeError(f"the reply's body is encoded as {content_encoding[:60]!r}, which cannot be decoded")
    try:
        return BodyDecoder(codings[0], limits)
    except ImportError as exc:
        raise DecodeError(f"the reply's body is encoded as {codings[0]}: needs gorouter-trio[compression]") from exc


def accept_encoding(compression: bool | Sequence[str]) -> str:
    """The Accept-Encoding header for the setting `compression`; `ConfigError` for what cannot be decoded here."""
    if compression is False or compression == ():
        return "identity"
    if compression is True:
        return ", ".join(filter(_is_available, _CODECS))
    for name in compression:
        # In a list, since what is no name need not be hashable.
        if name not in list(_CODECS):
            raise ConfigError(f"compression: {name!r} is none of {', '.join(_CODECS)}")
        if not _is_available(name):
            raise ConfigError(f"compression: {name} needs the extra: pip install gorouter-trio[compression]")
    return ", ".join(compression) or "identity"


def _is_available(coding: str) -> bool:
    module = _LIBRARIES.get(coding)
    if module is None:
        return True
    parent = module.rpartition(".")[0]
    return (not parent or importlib.util.find_spec(parent) is not None) and importlib.util.find_spec(module) is not None
