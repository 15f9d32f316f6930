"""Archives as sources: what is in them comes in as from a folder, and nothing hostile gets past its own name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib
from types import SimpleNamespace

import pytest
import tiny_hubs

from loraweave.errors import AdapterCorrupt, AdapterUnsupported, HubError, HubFull
from loraweave.extensions.sources.sources import archives
from loraweave.extensions.sources.sources.archives import archive_suffix, unpack
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub


def adapter(seed=0):
    return tiny_hubs.adapter(seed, "plural")


def tar_of(path, members, mode="w"):
    """A tar of (TarInfo or name, data) pairs."""
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            if data is not None and info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data or b""))
    return path


def zip_of(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for info, data in members:
            archive.writestr(info, data)
    return path


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """The only place for temporary folders; a test leaves nothing there."""
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert list(place.iterdir()) == []


@pytest.fixture
def packed(tmp_path):
    """Packs an adapter's folder below `top/` into an archive of a kind."""

    def pack(kind, seed=0):
        folder = adapter(seed).save_pretrained(tmp_path / "saved" / str(seed))
        members = [(f"top/{file.name}", file.read_bytes()) for file in sorted(folder.iterdir())]
        path = tmp_path / f"plural-v1.{kind}"
        if kind == "zip":
            return zip_of(path, members)
        return tar_of(
            path, members, {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "TAR.XZ": "w:xz"}[kind]
        )

    return pack


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz", "tar.bz2", "TAR.XZ"])
def test_an_archive_is_read_as_its_folder_is(packed, kind):
    assert Adapter.from_pretrained(packed(kind)).hash == adapter().hash


def test_a_hub_takes_an_archive_and_names_it_after_the_adapter(packed, tmp_path):
    with Hub(tmp_path / "hub") as hub:
        record = hub.add(str(packed("tar.gz")))
        assert (record.name, hub[record.name].hash) == ("plural", adapter().hash)


def test_without_a_name_inside_the_archives_own_name_counts_without_its_suffix(packed, tmp_path):
    archive = packed("zip")
    with zipfile.ZipFile(archive) as source:
        kept = [(info, source.read(info)) for info in source.infolist() if not info.filename.endswith("loraweave.json")]
    assert Adapter.from_pretrained(zip_of(tmp_path / "my.adapter.ZIP", kept)).name == "my.adapter"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.zip", ".zip"), ("a.tar.gz", ".tar.gz"), ("b/A.TGZ", ".TGZ"), ("a.gz", ""), ("zip", ""), ("owner/name", "")],
)
def test_a_name_says_whether_it_is_an_archive(name, suffix):
    assert archive_suffix(name) == suffix


def test_a_folder_that_is_called_like_an_archive_is_a_folder(tmp_path):
    folder = adapter().save_pretrained(tmp_path / "odd.zip")
    assert Adapter.from_pretrained(folder).hash == adapter().hash


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/etc/passwd", "absolute path"),
        ("top/../../outside", "leaves the archive"),
        ("..", "leaves the archive"),
        ("C:\\windows\\x", "another system"),
        ("a\\..\\b", "another system"),
        ("a\nb", "control characters"),
        ("x" * 300, "more than 255 bytes"),
        ("y/" * 600 + "z", "more than 1,000 bytes"),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_leaves_the_archive_or_cannot_be_a_path_is_refused(tmp_path, kind, name, words):
    make = zip_of if kind == "zip" else tar_of
    info = zipfile.ZipInfo(name) if kind == "zip" else name
    archive = make(tmp_path / f"hostile.{kind}", [("fine", b"x"), (info, b"x")])
    with pytest.raises(AdapterUnsupported, match=words):
        Adapter.from_pretrained(archive)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"hostile.{kind}"]


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
        (b"Z", "a device or another special file"),
    ],
)
def test_links_and_devices_of_a_tar_are_refused(tmp_path, kind, words):
    archive = tar_of(tmp_path / "a.tar", [(special("adapter_config.json", kind), None)])
    with pytest.raises(AdapterUnsupported, match=f"'adapter_config.json' is {words}"):
        Adapter.from_pretrained(archive)


@pytest.mark.parametrize(("mode", "words"), [(stat.S_IFLNK, "a link"), (stat.S_IFIFO, "a device")])
def test_links_and_devices_of_a_zip_are_refused(tmp_path, mode, words):
    info = zipfile.ZipInfo("adapter_config.json")
    info.external_attr = (mode | 0o777) << 16
    with pytest.raises(AdapterUnsupported, match=f"'adapter_config.json' is {words}"):
        Adapter.from_pretrained(zip_of(tmp_path / "a.zip", [(info, b"/etc/passwd")]))


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("a/b", "a/b", "there twice"),
        ("a/b", "A/B", "there twice"),
        ("a/b", "./a//b", "there twice"),
        ("caf\u00e9", "cafe\u0301", "there twice"),
        ("a/b", "a", "there twice"),
        ("a", "a/b", "which is a file"),
    ],
)
def test_two_entries_for_one_place_are_refused(tmp_path, first, second, words):
    archive = tar_of(tmp_path / "a.tar", [(first, b"1"), (second, b"2")])
    with pytest.raises(AdapterUnsupported, match=words):
        Adapter.from_pretrained(archive)


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_bomb_is_refused_by_what_it_claims_before_anything_of_it_is_written(tmp_path, temporary, kind, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    path, zeros = tmp_path / f"bomb.{kind}", bytes(2**25)
    if kind == "zip":
        zip_of(path, [("zeros", zeros)])
    else:
        tar_of(path, [("zeros", zeros)], f"w:{kind.rpartition('.')[2]}")
    tracemalloc.start()
    with pytest.raises(AdapterUnsupported, match=r"'zeros' brings the archive of [\d,]+ bytes to 33,554,432, more than"):
        Adapter.from_pretrained(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # an xz file's own dictionary takes 8 MiB
    assert peak < 16 * 2**20


def test_many_small_entries_count_together(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_ENTRIES", 10)
    with pytest.raises(AdapterUnsupported, match="more than 10 entries"):
        Adapter.from_pretrained(tar_of(tmp_path / "a.tar", [(f"{n}", b"x") for n in range(11)]))
    monkeypatch.setattr(archives, "MAX_BYTES", 100)
    with pytest.raises(AdapterUnsupported, match=r"'2' brings .* to 120, more than the limit of 100"):
        Adapter.from_pretrained(zip_of(tmp_path / "a.zip", [(f"{n}", b"x" * 40) for n in range(5)]))


def test_what_a_full_disk_cannot_hold_is_told_before(tmp_path, monkeypatch):
    archive = tar_of(tmp_path / "a.tar", [("big", bytes(4096))])
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: SimpleNamespace(free=99))
    with pytest.raises(HubFull, match=r"needs 4,096 bytes .* where 99 are free; set TMPDIR"):
        Adapter.from_pretrained(archive)


def zip_with(path, change):
    """A zip of one stored entry whose bytes `change` edits."""
    zip_of(path, [("name", b"abcdefgh" * 8)], zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def test_a_zip_that_claims_less_than_it_holds_gives_no_more_than_it_claims(tmp_path):
    def shrink(data):
        central = data.index(b"PK\x01\x02")
        struct.pack_into("<I", data, 22, 8)
        struct.pack_into("<I", data, central + 24, 8)

    with pytest.raises(AdapterCorrupt, match="is damaged"):
        Adapter.from_pretrained(zip_with(tmp_path / "a.zip", shrink))


def test_an_error_never_pours_out_the_bytes_of_an_archive(tmp_path):
    path = tmp_path / "a.zip"
    zip_of(path, [("name", b"abcdefgh" * 5000)], zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    # the length of the name in the entry's own header
    struct.pack_into("<H", data, 26, 20_000)
    path.write_bytes(data)
    with pytest.raises(AdapterCorrupt, match="is damaged") as caught:
        Adapter.from_pretrained(path)
    assert len(str(caught.value)) < 1000


def test_a_zip_that_claims_more_than_it_holds_is_damaged(tmp_path):
    def grow(data):
        central = data.index(b"PK\x01\x02")
        struct.pack_into("<I", data, central + 24, 1000)

    with pytest.raises(AdapterCorrupt, match="claims 1,000 bytes, and has 64"):
        Adapter.from_pretrained(zip_with(tmp_path / "a.zip", grow))


def test_a_flipped_byte_in_a_zip_is_found(tmp_path):
    def flip(data):
        data[data.index(b"abcd")] ^= 1

    with pytest.raises(AdapterCorrupt, match="CRC"):
        Adapter.from_pretrained(zip_with(tmp_path / "a.zip", flip))


def test_encrypted_entries_and_compression_without_a_bound_are_refused(tmp_path):
    def encrypt(data):
        data[6] |= 1
        data[data.index(b"PK\x01\x02") + 8] |= 1

    with pytest.raises(AdapterUnsupported, match="'name' is encrypted"):
        Adapter.from_pretrained(zip_with(tmp_path / "a.zip", encrypt))
    with pytest.raises(AdapterUnsupported, match="compressed by method 12"):
        Adapter.from_pretrained(zip_of(tmp_path / "b.zip", [("name", b"x" * 99)], zipfile.ZIP_BZIP2))


def test_a_tar_with_a_header_as_large_as_memory_is_refused_unread(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**24))
    tracemalloc.start()
    with pytest.raises(AdapterCorrupt, match="at most 6"):
        Adapter.from_pretrained(path)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


def test_a_tar_whose_sizes_point_backwards_is_refused(tmp_path):
    buffer = bytearray(tarfile.TarInfo("name").tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = b"\xff" * 11 + b"\x00"
    checksum = sum(buffer[:148]) + 8 * 32 + sum(buffer[156:512])
    buffer[148:156] = b"%06o\0 " % checksum
    (tmp_path / "a.tar").write_bytes(bytes(buffer) + bytes(1024))
    # tarfile itself refuses it in newer releases of Python
    with pytest.raises(AdapterCorrupt, match=r"claims -256 bytes|damaged \(ReadError: invalid offset\)"):
        Adapter.from_pretrained(tmp_path / "a.tar")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_that_was_cut_off_is_damaged_wherever_the_cut_is(packed, tmp_path, compress):
    whole = packed("tar").read_bytes()
    data, cut = compress(whole), tmp_path / "cut.tar"
    for position in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
        # of a plain tar the second block of the end mark and the padding may be missing
        if compress is not bytes or position < len(whole.rstrip(b"\0")):
            cut.write_bytes(data[:position])
            with pytest.raises(HubError):
                Adapter.from_pretrained(cut)


def test_an_xz_that_asks_for_gigabytes_of_memory_is_refused(tmp_path):
    with lzma.open(tmp_path / "a.tar.xz", "wb", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**16}]) as file:
        file.write(bytes(10240))
    data = bytearray((tmp_path / "a.tar.xz").read_bytes())
    # byte 4 of the block's header is the dictionary's size, 2 ** (n / 2 + 12), and its last four are a CRC of it
    header = data[12:24]
    header[4] = 2 * (30 - 12)
    header[8:12] = struct.pack("<I", zlib.crc32(bytes(header[:8])))
    data[12:24] = header
    (tmp_path / "a.tar.xz").write_bytes(data)
    with pytest.raises(AdapterCorrupt, match=r"[Mm]emory"):
        Adapter.from_pretrained(tmp_path / "a.tar.xz")


def test_several_xz_streams_are_one(tmp_path, packed):
    whole = packed("tar").read_bytes()
    (tmp_path / "a.tar.xz").write_bytes(lzma.compress(whole[:1000]) + bytes(4) + lzma.compress(whole[1000:]))
    assert Adapter.from_pretrained(tmp_path / "a.tar.xz").hash == adapter().hash


@pytest.mark.parametrize("data", [b"", b"PK", b"not an archive at all" * 100, b"\x1f\x8b" + bytes(50), b"BZh9" + bytes(50)])
@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_what_is_no_archive_is_damaged(tmp_path, data, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    with pytest.raises(AdapterCorrupt, match="the archive"):
        Adapter.from_pretrained(path)


def test_an_archive_without_an_adapter_says_so(tmp_path):
    with pytest.raises(AdapterCorrupt, match=r"a\.zip: no adapter_config\.json; the folder holds readme\.txt"):
        Adapter.from_pretrained(zip_of(tmp_path / "a.zip", [("readme.txt", b"x")]))


def test_an_archive_with_several_adapters_lists_them(tmp_path):
    members = [(f"{name}/adapter_config.json", b"{}") for name in ("b", "a", "c/d")]
    with pytest.raises(AdapterUnsupported, match=r"a\.tar: 3 folders in it hold adapters.* a, b, c/d; "):
        Adapter.from_pretrained(tar_of(tmp_path / "a.tar", members))


def test_an_error_about_a_file_inside_names_the_archive_and_not_the_temporary_folder(tmp_path, temporary):
    archive = zip_of(tmp_path / "a.zip", [("top/adapter_config.json", b"{")])
    with pytest.raises(AdapterCorrupt) as caught:
        Adapter.from_pretrained(archive)
    assert f"{archive}/top" in str(caught.value)
    assert str(temporary) not in str(caught.value)


def test_the_unpacked_folder_is_private_and_gone_after_an_exception(packed):
    seen = []

    def use():
        with unpack(packed("zip")) as folder:
            seen.extend([folder, stat.S_IMODE(folder.stat().st_mode), [path.name for path in folder.iterdir()]])
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert seen[1:] == [0o700, ["top"]]
    assert not seen[0].exists()
