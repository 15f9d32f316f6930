"""Downloads from the model hub and uploads to it: the commit of each, and named errors with the way out."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

from loraweave.errors import AdapterNotFound, HubError, HubFull, HubReadOnly, SourceUnavailable

MAX_TRIES = 4
MAX_WAIT_S = 30.0

# the client's transport raises no OSError, and its library is not a dependency of ours
_TRANSPORT: tuple[type[Exception], ...] = tuple(
    kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception
)
ERRORS: tuple[type[Exception], ...] = (*_TRANSPORT, HFValidationError, OSError, ValueError)
_TOKEN = re.compile(r"hf_\w{4,}|api_org_\w{4,}")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A downloaded repository: its folder, and the commit that a branch or tag stood for ("" if unknown)."""

    folder: Path
    commit: str


def download(
    repository: str, *, revision: str | None, token: str | None, local_files_only: bool, allow_patterns: Sequence[str]
) -> Snapshot:
    """Return the cached files of `owner/name` that match a pattern, after downloading those that are missing.

    An interrupted download resumes. A limit of requests is waited out up to three times. Raises AdapterNotFound if the
    repository is missing or not permitted, SourceUnavailable if a later try may work, and HubFull; no message has a token.
    """
    for number in range(1, MAX_TRIES + 1):
        try:
            path = snapshot_download(
                repository,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(allow_patterns),
            )
            folder = Path(path)
            return Snapshot(folder, folder.name if folder.parent.name == "snapshots" else "")
        except ERRORS as error:
            if status_of(error) != 429 or number == MAX_TRIES:
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
    """Return the error to raise for a failed download, with what was asked for and the way out."""
    who = f"the repository {repository!r}" + (f" at revision {revision!r}" if revision else "")
    reason, status = reason_of(error, token), status_of(error)
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


def reason_of(error: BaseException, token: str | None) -> str:
    """Return the first line of the error without any token that the call could have used."""
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


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, which the client may have wrapped, or None."""
    return next((response.status_code for response in _responses(error)), None)


def _responses(error: BaseException) -> Iterator[Any]:
    return (response for cause in _chain(error) if (response := getattr(cause, "response", None)) is not None)


def listing_error(error: BaseException, base: str, token: str | None) -> HubError:
    """Return the error to raise if the model hub did not list its adapters for a base model."""
    if _has(error, OfflineModeIsEnabled):
        return SourceUnavailable(f"the model hub's adapters for {base!r} cannot be listed in offline mode (HF_HUB_OFFLINE)")
    return SourceUnavailable(
        f"the model hub did not list its adapters for {base!r} ({reason_of(error, token)}); go online, or run it again later"
    )


def push(write: Callable[[Path], object], repository: str, *, token: str | None, private: bool | None, message: str) -> str:
    """Call `write` with a temporary folder to write, `upload` that folder, and return the commit's id."""
    with TemporaryDirectory() as place:
        write(Path(place) / "files")
        return upload(Path(place) / "files", repository, token=token, private=private, message=message)


def upload(folder: Path, repository: str, *, token: str | None, private: bool | None, message: str) -> str:
    """Commit the folder's files to `owner/name`, which is created if missing; return the last commit's id.

    `private` counts when it is created; None follows the owner's settings. Older files stay there. Raises HubReadOnly if the
    token, or the one of `hf auth login`, may not write, AdapterNotFound for an id of another form, SourceUnavailable if a
    later try may work; no message has a token.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except ERRORS as error:
        raise _name_error(error, repository, token) from error
    return str(made.oid)


def _name_error(error: BaseException, repository: str, token: str | None) -> HubError:
    reason, status = reason_of(error, token), status_of(error)
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
