"""Sources of adapters and base models: a local folder, or a repository of the model hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from loraweave.common.files import as_path
from loraweave.errors import AdapterNotFound, AdapterUnsupported, SourceUnavailable
from loraweave.hub.formats._files import BESIDE
from loraweave.hub.sources.archives import archive_suffix, unpack
from loraweave.hub.sources.discover import Found
from loraweave.hub.sources.model_hub import download

README = "README.md"
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model*.safetensors*",
    "loraweave.json",
    # never opened: a folder that has it is refused
    BESIDE,
    README,
)
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


def adapter_folders(folder: Path) -> list[Path]:
    """Return the folders of PEFT adapters directly in `folder`, in the order of their names."""
    return sorted(path.parent for path in folder.glob("*/adapter_config.json"))


@dataclass(frozen=True)
class OpenedSource:
    """A folder to read, and its origin: for a repository its id, the commit, and the revision asked for."""

    folder: Path
    origin: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def open_source(
    source: str | Path | Found,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] = ADAPTER_FILES,
) -> Iterator[OpenedSource]:
    """Yield the folder or file of `source` while it is read; an archive is unpacked for that time.

    Else it is a repository `owner/name` or `owner/name/file` of the model hub, of which the files needed are downloaded.
    Raises AdapterNotFound if neither exists, with what was tried, AdapterUnsupported for a repository without a file in
    which adapters are kept. A token never appears in a message.
    """
    if isinstance(source, Found):
        # a repository, even if there is a folder of that name
        yield _download(source.repository, "", revision or source.commit, token, local_files_only, allow_patterns)
        return
    # reading a folder imports torch, which finding one can do without
    from loraweave.hub.formats._reading import part_of

    path = as_path(source, "an adapter's source", SourceUnavailable)
    if archive_suffix(path) and path.is_file():
        with unpack(path) as folder:
            yield OpenedSource(folder)
    elif str(source) and (_is_there(path) or part_of(path) is not None):
        yield OpenedSource(path)
    else:
        repository, file = _repository(source)
        yield _download(repository, file, revision, token, local_files_only, allow_patterns)


def find_folder(
    source: str | Path,
    what: str,
    allow_patterns: Sequence[str],
    *,
    revision: str | None,
    token: str | None,
    local_files_only: bool,
) -> Path:
    """Return the local folder of `what`, or the download of `owner/name`. Raises AdapterNotFound if it is neither."""
    path = as_path(source, f"the folder of {what}", AdapterNotFound)
    if path.is_dir():
        return path
    parts = str(source).split("/")
    if isinstance(source, Path) or len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        raise AdapterNotFound(f"no folder {str(source)!r} with {what}; save_pretrained() writes one")
    wanted = {"revision": revision, "token": token, "local_files_only": local_files_only}
    return download(str(source), **wanted, allow_patterns=allow_patterns).folder  # type: ignore[arg-type]


def name_of(source: str | Path | Found) -> str:
    """Return the last part of a path or id, without the suffix of an archive or of a file of weights."""
    last = str(source).rstrip("/").rsplit("/", 1)[-1]
    return last.removesuffix(archive_suffix(last)).removesuffix(".safetensors") or last


def _download(
    repository: str,
    file: str,
    revision: str | None,
    token: str | None,
    local_files_only: bool,
    allow_patterns: Sequence[str],
) -> OpenedSource:
    """Download the repository, or its one file `file` if that is not empty."""
    wanted = {"revision": revision, "token": token, "local_files_only": local_files_only}
    patterns = [file, README] if file else allow_patterns
    snapshot = download(repository, **wanted, allow_patterns=patterns)  # type: ignore[arg-type]
    if file and not _is_there(snapshot.folder / file):
        raise AdapterNotFound(
            f"the repository {repository!r} of the model hub has no file {file!r}; see its list of files there"
        )
    if not file and not any(path.suffix in _WEIGHTS for path in snapshot.folder.iterdir()):
        raise AdapterUnsupported(
            f"the repository {repository!r} of the model hub has no weights under a name that adapters usually have; give a "
            f"LoRA file by its own, as in {repository + '/file.safetensors'!r}, or allow_pickle=True if it has only pickles "
            "such as adapter_model.bin"
        )
    origin = {
        "repository": f"{repository}/{file}" if file else repository,
        "revision": snapshot.commit,
        "asked": revision or "main",
    }
    return OpenedSource(snapshot.folder / file, origin)


def _repository(source: str | Path) -> tuple[str, str]:
    """Return `owner/name` and the file ("" for all) of a repository. Raises AdapterNotFound for another form."""
    text = str(source)
    parts = text.split("/")
    file = "/".join(parts[2:])
    well_formed = len(parts) >= 2 and not {"", ".", ".."}.intersection(parts) and not text.startswith("~")
    if isinstance(source, Path) or not well_formed or (file and Path(file).suffix not in _WEIGHTS):
        raise AdapterNotFound(
            f"no folder {text!r}, and it does not have the form owner/name of a model hub repository, or "
            "owner/name/file.safetensors of a file there"
        )
    return "/".join(parts[:2]), file


def without_secrets(source: str | Path) -> str:
    """Return the source as text, an address without user name, password and query, which may have tokens."""
    text = str(source)
    if "://" not in text:
        return text
    parts = urlsplit(text)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _is_there(path: Path) -> bool:
    """Return whether the path is a folder or a file of weights."""
    try:
        return path.is_dir() or (path.suffix in _WEIGHTS and path.is_file())
    except OSError:
        # a name longer than the file system takes
        return False
