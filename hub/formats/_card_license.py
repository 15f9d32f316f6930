"""The license in a model card: ids of the model hub, or `license: other` with a `license_name`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraweave.errors import InvalidLicense
from loraweave.hub.license_terms import license_of_all
from loraweave.hub.licenses import LISTED, RENAMED, UNLISTED, canonical

_ID_OF = {canonical(name): name for name in sorted(LISTED | UNLISTED | set(RENAMED))}


def license_fields(license: str) -> dict[str, str]:
    """What the front matter says for a license: an id of the model hub where there is one, else `other` and the name."""
    try:
        known = canonical(license)
    except InvalidLicense:
        return {"license": "other", "license_name": license}
    if known in _ID_OF:
        return {"license": _ID_OF[known]}
    return {"license": "other", "license_name": known.removeprefix("LicenseRef-")}


def license_of_fields(matter: Mapping[str, Any]) -> str:
    """The license that front matter states, or an empty text; the name where it is `other`, and of a list all together."""
    listed = matter.get("license")
    if isinstance(listed, list):
        return license_of_all(_named(one, matter) for one in listed) or ""
    return _named(listed, matter)


def _named(stated: object, matter: Mapping[str, Any]) -> str:
    if not isinstance(stated, str):
        return ""
    name = matter.get("license_name")
    if stated.strip().casefold() != "other" or not isinstance(name, str) or not name.strip():
        return stated
    try:
        return canonical(name)
    except InvalidLicense:
        pass
    try:
        return canonical(f"LicenseRef-{name.strip()}")
    except InvalidLicense:
        return name
