"""Puts a folder into a repository of the model hub, with a named error and the way out where that does not work."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from loraweave.errors import AdapterNotFound, HubError, HubReadOnly, SourceUnavailable
from loraweave.hub.intake.model_hub import ERRORS, reason_of, status_of


def upload(folder: Path, repository: str, *, token: str | None, private: bool | None, message: str) -> str:
    """Commits the folder's files to `owner/name`, which is made where there is none; returns the last commit's id.

    `private` counts when it is made; None is what the owner's settings say. Files of before stay there. Raises HubReadOnly
    where the token, or the one of `hf auth login`, may not write, AdapterNotFound for an id of another form,
    SourceUnavailable for what may work later; a token is in none of their messages.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except ERRORS as error:
        raise _named(error, repository, token) from error
    return str(made.oid)


def _named(error: BaseException, repository: str, token: str | None) -> HubError:
    reason, status = reason_of(error, token), status_of(error)
    if isinstance(error, HFValidationError):
        return AdapterNotFound(f"{repository!r} is no id of a repository ({reason}); it has the form owner/name")
    if status in (401, 403):
        return HubReadOnly(
            f"the model hub lets this writer put nothing into {repository!r} ({reason}); pass a token with the right to "
            "write as token=, or log in with `hf auth login`, and check the owner's name"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return SourceUnavailable(f"nothing can be put into {repository!r} in offline mode (HF_HUB_OFFLINE); go online")
    return SourceUnavailable(
        f"the model hub did not take the files for {repository!r} ({reason}); run it again, or keep the folder that "
        "save_pretrained() writes"
    )
