"""Adapter folders as zip and tar files, sound and spoiled: hostile entries, false sizes, bombs, and broken bytes."""

import io
import tarfile
import zipfile

import mutations

SUFFIXES = [".zip", ".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"]
NAMES = [
    "../stranger", "/tmp/stranger", "a/../../stranger", "..\\stranger", "C:\\stranger", "", ".", "a//b", "\0", "x" * 3_000,
    "a\nb", "adapter_config.json", "ADAPTER_CONFIG.JSON", "deep/" * 200 + "x", "stranger/", "\u202ex", "CON",
]  # fmt: skip
KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"Z"]


def archive(rng, files):
    """(suffix, bytes) of an archive of the files, to which up to two hostile things have been done."""
    suffix = rng.choice(SUFFIXES)
    entries = [(name, content) for name, content in files.items() if isinstance(content, bytes)]
    num_hostile = rng.choice([0, 1, 1, 2])
    if num_hostile and rng.random() < 0.5:
        entries.insert(rng.randint(0, len(entries)), (rng.choice(NAMES), rng.choice([b"", b"x", b"\0" * 3_000_000])))
        num_hostile -= 1
    raw = _zip(rng, entries) if suffix == ".zip" else _tar(rng, entries, suffix)
    spoiled = {"archive": raw}
    for _ in range(num_hostile):
        rng.choice([mutations.flipped, mutations.flipped, mutations.cut_off, mutations.spliced, mutations.extended])(
            rng, spoiled
        )
    return suffix, spoiled["archive"]


def _zip(rng, entries):
    file = io.BytesIO()
    method = rng.choice(
        [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    )
    with zipfile.ZipFile(file, "w", method) as made:
        for name, content in entries:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            if rng.random() < 0.03:
                # the upper half of the attributes is Unix's mode: a link, a device
                entry.external_attr = rng.choice([0o120777, 0o020666, 0o010666]) << 16
            made.writestr(entry, content)
    return file.getvalue()


def _tar(rng, entries, suffix):
    file = io.BytesIO()
    kind = {".tar": "", ".tar.bz2": "bz2", ".tar.xz": "xz"}.get(suffix, "gz")
    form = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=file, mode=f"w:{kind}", format=form) as made:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if rng.random() < 0.05:
                entry.type, entry.linkname, entry.size = rng.choice(KINDS), rng.choice(NAMES), 0
            if rng.random() < 0.02:
                entry.pax_headers = {
                    rng.choice(["path", "size", "GNU.sparse.size", "comment"]): rng.choice(["9" * 30, "-1", "../x"])
                }
            try:
                made.addfile(entry, io.BytesIO(content))
            except ValueError:
                # the form has no room for the name
                continue
    return file.getvalue()
