"""Where adapters and base models come from: a local folder, or a repository of the model hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from loraweave.errors import AdapterNotFound
from loraweave.hub.archives import archive_suffix, unpacked

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model*.safetensors*",
    "pytorch_lora_weights.safetensors",
    "adapters.safetensors",
    "compeft.*",
    "loraweave.json",
    "README.md",
)


@contextmanager
def opened_source(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] = ADAPTER_FILES,
) -> Iterator[Path]:
    """The adapter's folder for as long as it is read; an archive is unpacked for the while."""
    archive = Path(source)
    if archive_suffix(archive) and archive.is_file():
        with unpacked(archive) as folder:
            yield folder
    else:
        yield local_folder(
            source, revision=revision, token=token, local_files_only=local_files_only, allow_patterns=allow_patterns
        )


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
    folder = Path(source)
    if str(source) and (_is_folder(folder) or _is_weights(folder)):
        return folder
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise AdapterNotFound(f"no folder {str(source)!r}, and it has not the form owner/name of a model hub repository")
    try:
        path = snapshot_download(
            str(source),
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(allow_patterns),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise AdapterNotFound(
            f"no folder {str(source)!r}, and the model hub gave no repository of that id{at} ({reason}); "
            "download it first, or pass the path of a local folder"
        ) from error
    return Path(path)


def repository_commit(source: str | Path, folder: Path) -> str | None:
    """The commit of the repository `source` whose snapshot `folder` is; None where the source is a folder itself."""
    commit = folder.name
    is_snapshot = folder.parent.name == "snapshots" and len(commit) == 40 and not set(commit) - set("0123456789abcdef")
    return commit if is_snapshot and not _is_folder(Path(source)) else None


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
        return path.suffix == ".safetensors" and path.is_file()
    except OSError:
        return False
