"""Sources of adapters and base models: a local folder, or a repository of the model hub; and uploads to the model hub.

An error of the model hub's client becomes a named one with the way out, without any token.
"""

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import loraweave.registry as registry
from loraweave.common.files import as_path
from loraweave.errors import AdapterNotFound, AdapterUnsupported, HubError, HubFull, HubReadOnly, SourceUnavailable
from loraweave.hub.formats._files import BESIDE

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

MAX_TRIES = 4
MAX_WAIT_S = 30.0

# the client's transport raises no OSError, and its library is not a dependency of ours
_TRANSPORT: tuple[type[Exception], ...] = tuple(
    kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception
)
_ERRORS: tuple[type[Exception], ...] = (*_TRANSPORT, HFValidationError, OSError, ValueError)
_TOKEN = re.compile(r"hf_\w{4,}|api_org_\w{4,}")

_logger = logging.getLogger(__name__)


def adapter_folders(folder: Path) -> list[Path]:
    """Return the folders of PEFT adapters directly in `folder`, in the order of their names."""
    return sorted(path.parent for path in folder.glob("*/adapter_config.json"))


@dataclass(frozen=True)
class Repository:
    """A repository of the model hub at one commit, which `Hub.add` takes."""

    repository: str
    commit: str

    def __str__(self) -> str:
        return self.repository


@dataclass(frozen=True)
class OpenedSource:
    """A folder to read, and its origin: for a repository its id, the commit, and the revision asked for."""

    folder: Path
    origin: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def open_source(
    source: str | Path | Repository,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] = ADAPTER_FILES,
) -> Iterator[OpenedSource]:
    """Yield the local folder or file of `source`; an unpacked archive is deleted when the block ends.

    A source that is not a local path is a repository `owner/name` or `owner/name/file` of the model hub, whose needed files
    are downloaded. Raises AdapterNotFound if neither exists, AdapterUnsupported for a repository without a file that can
    hold an adapter. A token never appears in a message.
    """
    wanted: dict[str, Any] = {"token": token, "local_files_only": local_files_only, "allow_patterns": allow_patterns}
    if isinstance(source, Repository):
        # a repository, even if there is a folder of that name
        yield _downloaded(source.repository, "", revision=revision or source.commit, **wanted)
        return
    # reading a folder imports torch, which finding one can do without
    from loraweave.hub.formats._reading import part_of

    path = as_path(source, "an adapter's source", SourceUnavailable)
    packed = next((kind for kind in _packed_kinds() if kind.suffix(path)), None)
    if packed is not None and path.is_file():
        with packed.unpack(path) as folder:
            yield OpenedSource(folder)
    elif str(source) and (_is_there(path) or part_of(path) is not None):
        yield OpenedSource(path)
    else:
        repository, file = _repository_and_file(source)
        yield _downloaded(repository, file, revision=revision, **wanted)


def find_folder(source: str | Path, what: str, allow_patterns: Sequence[str], **wanted: Any) -> Path:
    """Return the folder at `source`, or download `owner/name`; `what` names its content in errors (AdapterNotFound).

    `wanted` has the `revision`, `token` and `local_files_only` of a download.
    """
    path = as_path(source, f"the folder of {what}", AdapterNotFound)
    if path.is_dir():
        return path
    parts = str(source).split("/")
    if isinstance(source, Path) or len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        raise AdapterNotFound(f"no folder {str(source)!r} with {what}; save_pretrained() writes one")
    return download(str(source), **wanted, allow_patterns=allow_patterns)[0]


def name_of(source: str | Path | Repository) -> str:
    """Return the last part of a path or id, without the suffix of an archive or of a file of weights."""
    last = str(source).rstrip("/").rsplit("/", 1)[-1]
    return last.removesuffix(packed_suffix(last)).removesuffix(".safetensors") or last


def packed_suffix(path: str | Path) -> str:
    """Return the suffix of an archive that an entry of the registry `sources` unpacks; "" for any other name."""
    return next((suffix for kind in _packed_kinds() if (suffix := kind.suffix(path))), "")


def without_secrets(source: str | Path) -> str:
    """Return the source as text; a URL without its user name, password and query, which may hold secrets."""
    text = str(source)
    if "://" not in text:
        return text
    parts = urlsplit(text)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _packed_kinds() -> list[Any]:
    """Return the entries of the registry `sources`, which know archives by `suffix(path)` and `unpack(path)` them."""
    return [registry.get("sources", name) for name in registry.names("sources")]


def _downloaded(
    repository: str, file: str, *, revision: str | None, allow_patterns: Sequence[str], **wanted: Any
) -> OpenedSource:
    """Download a repository's adapter, or only `file` if that is not empty, and return the opened source."""
    patterns = [file, README] if file else allow_patterns
    folder, commit = download(repository, revision=revision, **wanted, allow_patterns=patterns)
    if file and not _is_there(folder / file):
        raise AdapterNotFound(
            f"the repository {repository!r} of the model hub has no file {file!r}; see its list of files there"
        )
    if not file and not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        raise AdapterUnsupported(
            f"the repository {repository!r} of the model hub has no weights under a name that adapters usually have; give a "
            f"LoRA file by its own, as in {repository + '/file.safetensors'!r}, or allow_pickle=True if it has only pickles "
            "such as adapter_model.bin"
        )
    location = f"{repository}/{file}" if file else repository
    return OpenedSource(folder / file, {"repository": location, "revision": commit, "asked": revision or "main"})


def _repository_and_file(source: str | Path) -> tuple[str, str]:
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


def _is_there(path: Path) -> bool:
    """Return True if the path is a folder or a file of weights."""
    try:
        return path.is_dir() or (path.suffix in _WEIGHTS and path.is_file())
    except OSError:
        # a name longer than the file system takes
        return False


def download(
    repository: str, *, revision: str | None, token: str | None, local_files_only: bool, allow_patterns: Sequence[str]
) -> tuple[Path, str]:
    """Return the folder with the files of `owner/name` that match a pattern, and its commit ("" if unknown).

    Only missing files are downloaded, and an interrupted download resumes. A limit of requests is waited out up to three
    times. Raises AdapterNotFound if the repository is missing or not permitted, SourceUnavailable if a later try may work,
    and HubFull; no message has a token.
    """
    for number in range(1, MAX_TRIES + 1):
        try:
            folder = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    token=token,
                    local_files_only=local_files_only,
                    allow_patterns=list(allow_patterns),
                )
            )
            return folder, folder.name if folder.parent.name == "snapshots" else ""
        except _ERRORS as error:
            if _status_of(error) != 429 or number == MAX_TRIES:
                raise _download_error(error, repository, revision, token, local_files_only) from error
            # the wait that the hub asks for, else 1, 2, 4 seconds
            retry_after = next((response.headers.get("Retry-After", "") for response in _responses(error)), "")
            wait_s = min(float(retry_after) if retry_after.isdigit() else 2.0 ** (number - 1), MAX_WAIT_S)
        _logger.warning("the model hub limits requests; asking for %s again in %.0f s", repository, wait_s)
        time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _download_error(
    error: BaseException, repository: str, revision: str | None, token: str | None, local_files_only: bool
) -> HubError:
    """Return the error to raise for a failed download, which names the source and says what to do."""
    who = f"the repository {repository!r}" + (f" at revision {revision!r}" if revision else "")
    reason, status = _reason_of(error, token), _status_of(error)
    if _has(error, GatedRepoError) or status == 403:
        return AdapterNotFound(
            f"{who} of the model hub is gated ({reason}); accept its terms on its page there, and pass the token of "
            "that account as token=, or log in with `hf auth login`"
        )
    if _has(error, RevisionNotFoundError):
        return AdapterNotFound(
            f"{who} is not on the model hub ({reason}); a branch or tag can be moved or deleted there: leave revision "
            "out for the newest, or give a commit"
        )
    if _has(error, RepositoryNotFoundError) or status in (401, 404):
        return AdapterNotFound(
            f"no folder {repository!r}, and the model hub gave no repository of that id to this reader ({reason}); "
            "check the spelling, pass token= if it is private, or pass the path of a local folder"
        )
    if type(error).__name__ == "IncompleteSnapshotError":
        return SourceUnavailable(
            f"of {who} only a part was downloaded, and the rest cannot be asked for ({reason}); go online and run this "
            "again: it goes on where it stopped"
        )
    if local_files_only or _has(error, OfflineModeIsEnabled):
        mode = "local_files_only=True" if local_files_only else "offline mode (HF_HUB_OFFLINE)"
        return AdapterNotFound(
            f"no folder {repository!r}, and {who} was never downloaded, which {mode} forbids to do now; "
            "download it first, or pass the path of a local folder"
        )
    if status == 429:
        return SourceUnavailable(
            f"the model hub limits how often it is asked, and refused {who} {MAX_TRIES} times ({reason}); wait some "
            "minutes, or pass a token, whose limit is higher"
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return HubFull(f"no room to download {who} ({reason}); free some, or set HF_HOME to a folder with room")
    if status is not None or _has(error, LocalEntryNotFoundError) or not isinstance(error, OSError | ValueError):
        return SourceUnavailable(
            f"no folder {repository!r}, and the model hub cannot be reached for {who}, or broke off ({reason}); "
            "run it again, which goes on where it stopped, or pass the path of a local folder"
        )
    return AdapterNotFound(
        f"no folder {repository!r}, and the model hub gave no repository of that id ({reason}); "
        "download it first, or pass the path of a local folder"
    )


def _reason_of(error: BaseException, token: str | None) -> str:
    """Return the error's class and first line, with tokens replaced by ***."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _has(error: BaseException, kind: type[BaseException]) -> bool:
    return any(isinstance(cause, kind) for cause in _chain(error))


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, which the client may have wrapped, or None."""
    return next((response.status_code for response in _responses(error)), None)


def _responses(error: BaseException) -> Iterator[Any]:
    return (response for cause in _chain(error) if (response := getattr(cause, "response", None)) is not None)


@contextmanager
def model_hub_client(base: str, token: str | None) -> Iterator[HfApi]:
    """Yield a client that lists the model hub's adapters for `base`. Raises SourceUnavailable if the hub does not answer."""
    try:
        yield HfApi(token=token)
    except _ERRORS as error:
        if _has(error, OfflineModeIsEnabled):
            why = f"the model hub's adapters for {base!r} cannot be listed in offline mode (HF_HUB_OFFLINE)"
        else:
            reason = _reason_of(error, token)
            why = f"the model hub did not list its adapters for {base!r} ({reason}); go online, or run it again later"
        raise SourceUnavailable(why) from error


def push(write: Callable[[Path], object], repository: str, *, token: str | None, private: bool | None, message: str) -> str:
    """Call `write` with the path of a temporary folder, upload the folder it writes, and return the commit's id."""
    with TemporaryDirectory() as place:
        write(Path(place) / "files")
        return upload(Path(place) / "files", repository, token=token, private=private, message=message)


def upload(folder: Path, repository: str, *, token: str | None, private: bool | None, message: str) -> str:
    """Commit the folder's files to `owner/name`, which is created if missing; return the last commit's id.

    `private` applies to a new repository; None follows the owner's settings. Files already there stay. Raises HubReadOnly if
    the token, or the one of `hf auth login`, may not write, AdapterNotFound for an id of another form, SourceUnavailable if
    a later try may work; no message has a token.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except _ERRORS as error:
        raise _name_error(error, repository, token) from error
    return str(made.oid)


def _name_error(error: BaseException, repository: str, token: str | None) -> HubError:
    reason, status = _reason_of(error, token), _status_of(error)
    if _has(error, HFValidationError):
        return AdapterNotFound(f"{repository!r} is not the id of a repository ({reason}); it has the form owner/name")
    if status in (401, 403):
        return HubReadOnly(
            f"the model hub lets this writer put nothing into {repository!r} ({reason}); pass a token with the right to "
            "write as token=, or log in with `hf auth login`, and check the owner's name"
        )
    if _has(error, OfflineModeIsEnabled):
        return SourceUnavailable(f"nothing can be put into {repository!r} in offline mode (HF_HUB_OFFLINE); go online")
    return SourceUnavailable(
        f"the model hub did not take the files for {repository!r} ({reason}); run it again, or keep the folder that "
        "save_pretrained() writes"
    )
