"""Streams that keep a reader of archives within bounds: what it reads at once, and that it never goes back."""

from __future__ import annotations

import bz2
import gzip
import importlib
import importlib.util
import io
import lzma
from pathlib import Path
from typing import Any, BinaryIO

from loraweave.errors import AdapterUnsupported

# xz files can ask for 4 GiB; what its command line writes by default needs at most 65 MiB
MAX_XZ_MEMORY_BYTES = 128 * 2**20
_READ_BYTES = 64 * 2**10


class ShortReads(io.RawIOBase):
    """A seekable file that refuses to read more than `limit_bytes` at once, with ValueError."""

    def __init__(self, file: BinaryIO, limit_bytes: int) -> None:
        self.file = file
        self.limit_bytes = limit_bytes

    def read(self, size: int = -1) -> bytes:
        if size > self.limit_bytes:
            raise ValueError(f"it asks for {size:,} bytes at once, more than the limit of {self.limit_bytes:,}")
        return self.file.read(self.limit_bytes if size < 0 else size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


class Forward(io.RawIOBase):
    """A stream that is read forwards only and no further than allowed, so that a false size ends in ValueError.

    What is passed over counts for nothing. `last` is what the last read gave.
    """

    def __init__(self, file: Any, allowed_bytes: int) -> None:
        self.file = file
        self.allowed_bytes = allowed_bytes
        self.position = 0
        self.last = b""

    def allow(self, num_bytes: int) -> None:
        """The bytes that may be read from here on."""
        self.allowed_bytes = num_bytes

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.allowed_bytes:
            raise ValueError(f"it asks for {size:,} bytes where at most {self.allowed_bytes:,} can be meant")
        self.allowed_bytes -= size
        self.last = self._take(size)
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self.position:
            raise ValueError(f"it points back, from byte {self.position:,} to {offset:,}")
        while self.position < offset and self._take(min(offset - self.position, _READ_BYTES)):
            pass
        return self.position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def _take(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self.file.read(min(size, _READ_BYTES))):
            parts.append(part)
            size -= len(part)
            self.position += len(part)
        return b"".join(parts)


def decompressed(file: BinaryIO, archive: Path) -> Any:
    """The stream inside a gzip, bzip2, xz or zstandard file, by its first bytes; else the file itself.

    Raises AdapterUnsupported for zstandard where this Python has no reader for it (before 3.14).
    """
    mark = file.read(6)
    file.seek(0)
    if mark.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if mark.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if mark == b"\xfd7zXZ\0":
        return io.BufferedReader(_Xz(file))
    if mark.startswith(b"\x28\xb5\x2f\xfd"):
        if importlib.util.find_spec("compression") is None:
            raise AdapterUnsupported(
                f"{archive} is compressed by zstandard, which this Python cannot read (3.14 can); unpack it yourself"
            )
        return importlib.import_module("compression.zstd").ZstdFile(file)
    return file


class _Xz(io.RawIOBase):
    """The content of an xz file, within a limit of memory; lzma's own reader takes none."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.decoder = self._new()
        self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            if self.decoder.eof:
                # several streams in one file follow each other
                self.rest = (self.decoder.unused_data or self.file.read(_READ_BYTES)).lstrip(b"\0")
                if not self.rest:
                    return 0
                self.decoder = self._new()
            if self.decoder.needs_input and not self.rest:
                self.rest = self.file.read(_READ_BYTES)
                if not self.rest:
                    raise EOFError("the xz stream ends early")
            data = self.decoder.decompress(self.rest, len(view))
            self.rest = b""
            if data:
                view[: len(data)] = data
                return len(data)

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY_BYTES)
