"""Where adapters and base models come from: a local folder, or a repository of the model hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from loraweave.errors import AdapterNotFound
from loraweave.hub.archives import archive_suffix, unpacked
from loraweave.hub.model_hub import download

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model*.safetensors*",
    "pytorch_lora_weights.safetensors",
    "adapters.safetensors",
    "compeft.*",
    "loraweave.json",
    "README.md",
)


@dataclass(frozen=True)
class OpenedSource:
    """A folder to read, and where it came from: of a repository its id, the commit, and the revision asked for."""

    folder: Path
    origin: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def opened_source(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] = ADAPTER_FILES,
) -> Iterator[OpenedSource]:
    """The adapter's folder for as long as it is read; an archive is unpacked for the while."""
    archive = Path(source)
    if archive_suffix(archive) and archive.is_file():
        with unpacked(archive) as folder:
            yield OpenedSource(folder)
    else:
        yield _located(source, revision, token, local_files_only, allow_patterns)


def name_of(source: str | Path) -> str:
    """The last part of a path or id, without the suffix of an archive or of a file of weights."""
    last = str(source).rstrip("/").rsplit("/", 1)[-1]
    return last.removesuffix(archive_suffix(last)).removesuffix(".safetensors") or last


def local_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] = ADAPTER_FILES,
) -> Path:
    """The folder or safetensors file named by `source`, or the downloaded snapshot of the repository `owner/name`.

    Only the files needed are downloaded.

    Raises AdapterNotFound when neither exists, with what was tried. A token never appears in a message.
    """
    return _located(source, revision, token, local_files_only, allow_patterns).folder


def _located(
    source: str | Path, revision: str | None, token: str | None, local_files_only: bool, allow_patterns: Sequence[str]
) -> OpenedSource:
    folder = Path(source)
    if str(source) and (_is_folder(folder) or _is_weights(folder)):
        return OpenedSource(folder)
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise AdapterNotFound(f"no folder {str(source)!r}, and it has not the form owner/name of a model hub repository")
    found = download(
        source, revision=revision, token=token, local_files_only=local_files_only, allow_patterns=allow_patterns
    )
    return OpenedSource(found.folder, {"repository": source, "revision": found.commit, "asked": revision or "main"})


def without_secrets(source: str | Path) -> str:
    """The source as text, an address without user name, password and query, where tokens may stand."""
    text = str(source)
    if "://" not in text:
        return text
    parts = urlsplit(text)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # a name longer than the file system takes
        return False


def _is_weights(path: Path) -> bool:
    try:
        return path.suffix in (".safetensors", ".bin", ".ckpt", ".pt", ".pth") and path.is_file()
    except OSError:
        return False
