"""Archives as sources: a zip or tar is unpacked into a private temporary folder, and hostile entries are refused by name.

Nothing in an archive is trusted: names are checked before they become paths, sizes before and while they are written, and no
header is read whole that claims to be large. Memory does not grow with the archive.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import importlib
import importlib.util
import io
import lzma
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from loraweave import AdapterCorrupt, AdapterUnsupported, HubError, HubFull

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

MAX_ENTRIES = 10_000
MAX_NAME_BYTES = 1_000
MAX_BYTES = 32 * 2**30
# weights hardly compress: an archive that grows by more than this factor is meant to fill a disk
MAX_RATIO = 200
FREE_BYTES = 64 * 2**20
# tarfile reads the headers with long names whole, and takes longer than linear for them
MAX_TAR_HEADER_BYTES = 64 * 2**10
MAX_ZIP_DIRECTORY_BYTES = 4 * 2**20
MAX_PADDING_BYTES = 2**20
CHUNK_BYTES = 2**20
# an xz file can ask for 4 GiB; the command line's defaults need at most 65 MiB
MAX_XZ_MEMORY_BYTES = 128 * 2**20
_READ_BYTES = 64 * 2**10

# other methods can grow without a bound in one step of zipfile's reader
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def archive_suffix(path: str | Path) -> str:
    """Return the suffix that makes `path` an archive, as it is spelled there; "" for any other name."""
    name = Path(path).name
    suffixes = [suffix for suffix in (*ZIP_SUFFIXES, *TAR_SUFFIXES) if name.lower().endswith(suffix)]
    return name[-max(map(len, suffixes)) :] if suffixes else ""


@contextmanager
def unpack(archive: Path) -> Iterator[Path]:
    """Yield a private temporary folder with the archive's files; it is deleted at the end, also after an exception.

    Raises AdapterUnsupported for an entry that is not a plain file or folder inside the archive (absolute path, `..`, link,
    device, a name twice) and for one above a limit, AdapterCorrupt for a damaged archive, HubFull for a full disk. An error
    about the files inside names the archive in place of the folder.
    """
    with tempfile.TemporaryDirectory(prefix="loraweave-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        with _named_errors(archive):
            _unpack(archive, folder)
        try:
            yield folder
        except HubError as error:
            if str(folder) not in str(error):
                raise
            raise type(error)(str(error).replace(str(folder), str(archive))) from error


def _unpack(archive: Path, folder: Path) -> None:
    with archive.open("rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise AdapterCorrupt(f"the archive {archive} is not a regular file")
        plan = _Plan(archive, folder, os.fstat(file.fileno()).st_size)
        if archive_suffix(archive).lower() in ZIP_SUFFIXES:
            _unpack_zip(file, plan)
        else:
            _unpack_tar(file, plan)


def _unpack_zip(file: BinaryIO, plan: _Plan) -> None:
    reader: Any = ShortReads(file, MAX_ZIP_DIRECTORY_BYTES)
    with zipfile.ZipFile(reader) as source:
        targets = [(info, plan.admit(info.orig_filename, _kind_in_zip(info), info.file_size)) for info in source.infolist()]
        for info, _ in targets:
            if info.flag_bits & 1:
                raise AdapterUnsupported(f"{plan.archive}: {info.filename!r} is encrypted; unpack it yourself")
            if info.compress_type not in _ZIP_METHODS:
                raise AdapterUnsupported(
                    f"{plan.archive}: {info.filename!r} is compressed by method {info.compress_type}; only stored and "
                    "deflated entries are read, so unpack it yourself or pack it again"
                )
        for info, target in targets:
            if target is not None:
                with source.open(info) as data:
                    _write(data, target, info.file_size, f"{plan.archive}: {info.filename!r}")


def _unpack_tar(file: BinaryIO, plan: _Plan) -> None:
    stream: Any = Forward(decompress(file, plan.archive), MAX_TAR_HEADER_BYTES)
    # not trusted: tarfile only finds the headers; names and kinds are checked here, and its extraction is not used
    with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as opened:
        source: Any = opened
        while True:
            stream.limit_bytes = MAX_TAR_HEADER_BYTES
            member = source.next()
            if member is None:
                break
            target = plan.admit(member.name, _kind_in_tar(member), member.size)
            # the list that tarfile keeps of all members would grow with the archive
            source.members = []
            if target is not None and (data := source.extractfile(member)) is not None:
                stream.limit_bytes = member.size
                _write(data, target, member.size, f"{plan.archive}: {member.name!r}")
        # tarfile takes a header that it cannot read, or the end of the file, for the end of the archive
        if stream.last != tarfile.NUL * tarfile.BLOCKSIZE:
            how = "is damaged" if stream.last else "was cut off"
            raise AdapterCorrupt(f"the archive {plan.archive} {how} after {plan.num_entries} entries: it has no end mark")
        # the checksum of a compressed file comes after the padding
        stream.seek(stream.position + MAX_PADDING_BYTES)


def _kind_in_zip(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return "a link" if stat.S_ISLNK(mode) else "a device or another special file"
    return "folder" if info.is_dir() else "file"


def _kind_in_tar(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "a link"
    if member.isdir():
        return "folder"
    if member.issparse():
        return "a sparse file"
    return "file" if member.isreg() else "a device or another special file"


class Archives:
    """The source of zip and tar files: `suffix` recognises one by name, `unpack` yields a temporary folder of its files."""

    suffix = staticmethod(archive_suffix)
    unpack = staticmethod(unpack)


@dataclass
class _Plan:
    """The checks of an archive's entries before each is unpacked into `folder`, and the totals admitted so far."""

    archive: Path
    folder: Path
    archive_bytes: int
    num_entries: int = 0
    total_bytes: int = 0
    # paths without case and in one Unicode form, as some file systems see them
    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)

    def admit(self, name: str, kind: str, size: int) -> Path | None:
        """Return the path to write a file entry to, in a folder that exists; None for a folder.

        `size` is in bytes, `kind` "file", "folder" or a text for any other kind. Raises AdapterUnsupported for a refused
        entry, AdapterCorrupt for a negative size, HubFull for a full disk.
        """
        shown = f"{self.archive}: entry {name!a:.120}"
        parts = self._checked_parts(name, shown)
        if kind not in ("file", "folder"):
            raise AdapterUnsupported(f"{shown} is {kind}; an archive may hold plain files and folders only")
        self.num_entries += 1
        if self.num_entries > MAX_ENTRIES:
            raise AdapterUnsupported(f"{self.archive} holds more than {MAX_ENTRIES:,} entries; unpack it and use add-tree")
        self._check_size(size, shown)
        self._check_place(parts, kind, shown)
        target = self.folder.joinpath(*parts)
        if kind == "folder":
            return None
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return target

    def _checked_parts(self, name: str, shown: str) -> list[str]:
        why = ""
        if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            why = f"its name has more than {MAX_NAME_BYTES:,} bytes"
        elif any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            why = "its name has control characters or is not valid text"
        elif name.startswith("/") or "\\" in name or (len(name) > 1 and name[1] == ":"):
            why = "its name is an absolute path, or one of another system"
        elif ".." in name.split("/"):
            why = "its name leaves the archive by '..'"
        elif any(len(part.encode()) > 255 for part in name.split("/")):
            why = "its name has a part of more than 255 bytes"
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if why or (not parts and name.strip("./")):
            raise AdapterUnsupported(f"{shown} is refused: {why}; unpack the archive yourself if you trust it")
        return parts

    def _check_size(self, size: int, shown: str) -> None:
        if size < 0:
            raise AdapterCorrupt(f"{shown} claims {size} bytes")
        self.total_bytes += size
        limit = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * self.archive_bytes))
        if self.total_bytes > limit:
            raise AdapterUnsupported(
                f"{shown} brings the archive of {self.archive_bytes:,} bytes to {self.total_bytes:,}, more than the limit "
                f"of {limit:,}; unpack it yourself if you trust it"
            )
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise HubFull(
                f"{shown} needs {size:,} bytes in {self.folder.parent}, where {free:,} are free; set TMPDIR to a folder "
                "with room"
            )

    def _check_place(self, parts: list[str], kind: str, shown: str) -> None:
        steps = [unicodedata.normalize("NFC", part).casefold() for part in parts]
        places = ["/".join(steps[:count]) for count in range(1, len(steps) + 1)]
        above = places if kind == "folder" else places[:-1]
        if kind == "file" and (not places or places[-1] in self.files or places[-1] in self.folders):
            raise AdapterUnsupported(f"{shown} is there twice; which of them is meant is not known")
        if taken := [place for place in above if place in self.files]:
            raise AdapterUnsupported(f"{shown} lies below {taken[0]!r}, which is a file of the archive")
        self.folders.update(above)
        if kind == "file":
            self.files.add(places[-1])


def _write(data: IO[bytes], target: Path, size: int, where: str) -> None:
    written = 0
    with target.open("xb") as file:
        # one byte more than claimed is asked for, so that a false claim is seen
        while chunk := data.read(min(CHUNK_BYTES, size + 1 - written)):
            written += len(chunk)
            if written > size:
                break
            file.write(chunk)
    if written != size:
        raise AdapterCorrupt(f"{where} claims {size:,} bytes, and has {'more' if written > size else f'{written:,}'}")


# the errors that the standard library's readers raise for broken bytes
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, lzma.LZMAError)
_DAMAGE = (*_BROKEN, EOFError, ValueError, OverflowError, RuntimeError, IndexError)


@contextmanager
def _named_errors(archive: Path) -> Iterator[None]:
    try:
        yield
    except HubError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HubFull(
                f"no room to unpack {archive} in {tempfile.gettempdir()}; set TMPDIR to a folder with room"
            ) from error
        raise AdapterCorrupt(f"the archive {archive} cannot be read ({type(error).__name__}: {error})") from error
    except _DAMAGE as error:
        # zipfile quotes the bytes found in place of a name, up to 64 KiB of them
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise AdapterCorrupt(f"the archive {archive} is damaged ({reason})") from error


class ShortReads(io.RawIOBase):
    """A seekable file that raises ValueError for a read of more than `limit_bytes` at once."""

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


class Forward(ShortReads):
    """A stream that reads only forwards, and at most `limit_bytes` in all until that is set anew, else raises ValueError.

    Bytes that `seek` skips do not count. `last` has the bytes of the last read.
    """

    def __init__(self, file: Any, limit_bytes: int) -> None:
        super().__init__(file, limit_bytes)
        self.position = 0
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.limit_bytes:
            raise ValueError(f"it asks for {size:,} bytes where at most {self.limit_bytes:,} can be meant")
        self.limit_bytes -= size
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

    def _take(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self.file.read(min(size, _READ_BYTES))):
            parts.append(part)
            size -= len(part)
            self.position += len(part)
        return b"".join(parts)


def decompress(file: BinaryIO, archive: Path) -> Any:
    """Return the decompressed stream of a gzip, bzip2, xz or zstandard file, told by its first bytes; else the file itself.

    Raises AdapterUnsupported for zstandard if this Python has no reader for it (before 3.14).
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
    """A stream of an xz file's content that limits the decoder's memory, as lzma's own reader cannot."""

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
                # a file may hold several streams, one after another
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
