"""Which licenses can be under one adapter: what each demands of the license of the whole.

A merge is one work, derived from all its parents. A license that demands the same terms for the whole, or adds what others
forbid, leaves some licenses for it: parents fit together where one is left by all of them. The table is of what is known:
the FSF's list of licenses and its matrix of the GNU licenses
(https://www.gnu.org/licenses/license-list.html, https://www.gnu.org/licenses/gpl-faq.html#AllCompatibility), and Creative
Commons' chart and compatible licenses (https://creativecommons.org/faq/, https://creativecommons.org/compatiblelicenses/).
A license that it lacks, a text of one's own and a license that nobody stated demand nothing here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from loraweave.errors import InvalidLicense
from loraweave.hub.intake.licenses import as_spdx, evaluate

UNKNOWN, SEVERAL = "LicenseRef-unknown", "LicenseRef-several"
_MAX_CHARACTERS = 1_000

_GPL3 = frozenset({"gpl-3.0", "agpl-3.0"})
_GPL = _GPL3 | {"gpl-2.0"}
_VERSIONS = ("1.0", "2.0", "2.5", "3.0", "4.0")
_BY_SA = frozenset(f"cc-by-sa-{version}" for version in _VERSIONS)
_NONCOMMERCIAL = frozenset({"noncommercial", *(f"cc-by-nc-sa-{version}" for version in _VERSIONS)})
_ANY = _GPL | {"lgpl-2.1", "lgpl-3.0", "other"} | _BY_SA | _NONCOMMERCIAL

# license: those that the whole may then be under
_WHOLE = {
    "gpl-2.0-only": frozenset({"gpl-2.0"}),
    "gpl-2.0-or-later": _GPL,
    "gpl-3.0-only": _GPL3,
    "gpl-3.0-or-later": _GPL3,
    "licenseref-gpl": _GPL,
    "agpl-3.0-only": frozenset({"agpl-3.0"}),
    "agpl-3.0-or-later": frozenset({"agpl-3.0"}),
    "lgpl-2.1-only": _GPL | {"lgpl-2.1"},
    "lgpl-2.1-or-later": _GPL | {"lgpl-2.1", "lgpl-3.0"},
    "lgpl-3.0-only": _GPL3 | {"lgpl-3.0"},
    "lgpl-3.0-or-later": _GPL3 | {"lgpl-3.0"},
    "apache-2.0": _ANY - {"gpl-2.0"},
    **dict.fromkeys(("afl-3.0", "epl-1.0", "ms-pl", "odbl-1.0", "osl-3.0"), _ANY - _GPL),
}

_CC = re.compile(r"cc-by(-nc)?(-sa|-nd)?-(\d\.\d)(-[a-z]+)?")


def license_of_work(parents: Iterable[tuple[str, Mapping[str, Any]]], *, allowed: bool) -> str | None:
    """The license of a work made of adapters, given as (name, card); None if no card states one.

    Raises InvalidLicense where their licenses exclude each other, or any derived work, unless that is `allowed`.
    """
    licenses = [(name, stated_license(card.get("license"))) for name, card in parents]
    if not allowed:
        require_one_work(licenses)
    return license_of_all(license for _, license in licenses)


def require_one_work(licenses: Iterable[tuple[str, str | None]]) -> None:
    """Raises InvalidLicense where adapters of these licenses, as (name, license), cannot be made into one; None is unknown.

    It names the one that permits no derived work, or two that exclude each other, or else all.
    """
    known = [(f"adapter {name!r}", as_spdx(license), _whole(license)) for name, license in licenses if license is not None]
    if not known or frozenset.intersection(*(whole for *_, whole in known)):
        return
    way_out = (
        "leave one out, or pass allow_licenses=True to merge(), compose() or export() where you have other rights to them "
        "(docs/identity.md has the table)"
    )
    for who, license, whole in known:
        if not whole:
            raise InvalidLicense(f"{who} is under {license}, which permits no work derived from it: {way_out}")
    for (one, license, whole), (other, its, of_its) in itertools.combinations(known, 2):
        if whole.isdisjoint(of_its):
            raise InvalidLicense(
                f"{one} is under {license} and {other} under {its}: no license of a work made of both keeps to these two; "
                f"{way_out}"
            )
    everything = ", ".join(sorted({license for _, license, _ in known}))
    raise InvalidLicense(f"no license of one adapter keeps to all of {everything}: {way_out}")


def license_of_all(licenses: Iterable[str | None]) -> str | None:
    """The SPDX expression that binds to all of these: sorted, joined by AND; None where none is known.

    An unknown one among known ones is `LicenseRef-unknown`; more than an expression may hold are
    `LicenseRef-several`.
    """
    parts: set[str] = set()
    for license in licenses:
        found = stated_license(license)
        if found is None:
            parts.add(UNKNOWN)
        elif " OR " in found:
            parts.add(found)
        else:
            parts.update(found.split(" AND "))
    if parts <= {UNKNOWN}:
        return None
    several = len(parts) > 1
    joined = " AND ".join(sorted((f"({part})" if several and " OR " in part else part for part in parts), key=str.casefold))
    return joined if len(joined) <= _MAX_CHARACTERS else SEVERAL


def stated_license(license: object) -> str | None:
    """What a card states as its license in the spelling of SPDX; None for nothing, no text, and "unknown"."""
    if not isinstance(license, str) or license.strip().casefold() in ("", "unknown"):
        return None
    return as_spdx(license)


@lru_cache(maxsize=10_000)
def _whole(license: str) -> frozenset[str]:
    """The licenses that a work derived from something under this one may be under."""
    return evaluate(as_spdx(license), _of_id)


def _of_id(license: str, exception: str | None) -> frozenset[str]:
    # an exception permits more, and each its own
    if exception is not None:
        return _ANY
    creative = _CC.fullmatch(license)
    if creative is None:
        return _WHOLE.get(license, _ANY)
    noncommercial, kind, version, _ = creative.groups()
    if kind == "-nd":
        return frozenset()
    if kind == "-sa":
        # a later version may be taken, and from 4.0 of BY-SA the GPL 3
        later = frozenset(f"cc-by{noncommercial or ''}-sa-{each}" for each in _VERSIONS if each >= version)
        return later if noncommercial else later | _GPL3
    return _NONCOMMERCIAL if noncommercial else _ANY
