"""Adapters on the model hub for a base model: those whose cards name it, with figures to choose by."""

import fnmatch
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from loraweave import AdapterNotFound, InvalidLicense, WeightingError
from loraweave.extend import tracked
from loraweave.extend.formats import license_of_fields
from loraweave.extend.hubs import Repository, canonical, is_accepted, model_hub_client
from loraweave.extend.models import says_nothing

# the most listed repositories that are examined
MAX_LISTED = 10_000
WEIGHTS = ("adapter_model*.safetensors", "pytorch_lora_weights.safetensors", "adapters.safetensors")
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Found(Repository):
    """An adapter on the model hub at one commit, which `Hub.add` takes; `size_bytes` is that of its safetensors.

    All fields are as its owner or the model hub states them: nothing was downloaded. `license` is SPDX, None if unknown.
    """

    base_model: str
    license: str | None
    downloads: int
    likes: int
    size_bytes: int
    tags: tuple[str, ...]


def discover(
    base: Any,
    *,
    query: str | None = None,
    license: Collection[str] | str | None = None,
    max_bytes: int | None = None,
    min_downloads: int = 0,
    min_likes: int = 0,
    limit: int = 20,
    token: str | None = None,
    progress: bool = False,
) -> list[Found]:
    """Return the adapters on the model hub for a base model (an id or a model), most downloads first; `Hub.add` takes each.

    They are those whose cards name it as their base (`base_model:adapter:`), that have safetensors under a name of
    adapters, and whose id contains `query`. `license` lists what is accepted, as in `Hub.records`; `max_bytes` bounds their
    safetensors. Nothing is downloaded. Each is pinned to one commit, which `add` reads, under all its rules for foreign
    files. Raises AdapterNotFound for a base without an id, SourceUnavailable if the model hub does not answer.
    """
    model_id = base if isinstance(base, str) else str(getattr(base, "name_or_path", "") or "")
    if says_nothing(model_id):
        raise AdapterNotFound(
            f"{model_id!r} is not the id of a base model on the model hub, which lists adapters by ids: give one, such as "
            "'HuggingFaceTB/SmolLM2-135M-Instruct'"
        )
    for name, value in (("limit", limit), ("max_bytes", 1 if max_bytes is None else max_bytes)):
        if value < 1:
            raise WeightingError(f"{name} is {value}: give at least 1")
    adapters: list[Found] = []
    with model_hub_client(model_id, token) as api:
        for info in tracked(_listed(api, model_id, query), "asking the model hub", total=None, shown=progress):
            if (info.downloads or 0) < min_downloads or (info.likes or 0) < min_likes:
                continue
            stated = _license(info.tags or ())
            if license is not None and not is_accepted(stated, license):
                continue
            # the list has no sizes
            files = api.model_info(info.id, revision=info.sha, files_metadata=True).siblings or ()
            sizes = [file.size or 0 for file in files if any(fnmatch.fnmatch(file.rfilename, glob) for glob in WEIGHTS)]
            if not sizes or (max_bytes is not None and sum(sizes) > max_bytes):
                continue
            figures = info.downloads or 0, info.likes or 0, sum(sizes), tuple(map(str, info.tags or ()))
            adapters.append(Found(info.id, info.sha, model_id, stated, *figures))
            if len(adapters) == limit:
                break
    return adapters


def _listed(api: Any, model_id: str, query: str | None) -> Iterator[Any]:
    """Yield `api`'s listings of adapters for `model_id`, most downloads first, with safetensors, a valid id and a commit."""
    listed = api.list_models(filter=f"base_model:adapter:{model_id}", search=query, sort="downloads", full=True)
    for info in islice(listed, MAX_LISTED):
        names = [file.rfilename for file in info.siblings or ()]
        has_weights = any(fnmatch.fnmatch(name, glob) for name in names for glob in WEIGHTS)
        if has_weights and _ID.fullmatch(str(info.id)) and _COMMIT.fullmatch(str(info.sha)):
            yield info


def _license(tags: Collection[str]) -> str | None:
    stated = [tag.removeprefix("license:") for tag in map(str, tags) if tag.startswith("license:")]
    with suppress(InvalidLicense):
        return canonical(license_of_fields({"license": stated})) if stated and stated != ["other"] else None
    return None
