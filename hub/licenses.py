"""Licenses as SPDX expressions: checked when given, read leniently from cards, compared, and joined for a merged work.

The model hub's ids are mostly SPDX ids in lower case. Those that are not are in a table; an id that SPDX does not list
becomes `LicenseRef-<id>`, as SPDX provides. No list says which licenses permit commercial use, because texts such as Llama's
or RAIL permit it up to a size or for some purposes only: name the licenses that you accept instead.

A merge is one work, derived from all its parents. A license that demands the same terms for the whole, or adds what others
forbid, leaves only some licenses for it: parents fit together if all of them leave one. The table of these demands follows
the FSF's list of licenses and its matrix of the GNU licenses (https://www.gnu.org/licenses/license-list.html,
https://www.gnu.org/licenses/gpl-faq.html#AllCompatibility), and Creative Commons' chart and compatible licenses
(https://creativecommons.org/faq/, https://creativecommons.org/compatiblelicenses/). A license outside the table, a
`LicenseRef` text and an unstated license demand nothing here.
"""

import difflib
import itertools
import re
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from loraweave.common.checks import one_or_many
from loraweave.errors import InvalidLicense

# ids of the model hub that SPDX spells differently
RENAMED = {
    "c-uda": "C-UDA-1.0",
    "lgpl-lr": "LGPLLR",
    "odbl": "ODbL-1.0",
    "odc-by": "ODC-By-1.0",
    "openrail++": "LicenseRef-openrail-plus-plus",
    "pddl": "PDDL-1.0",
}

# ids of the model hub for texts that SPDX does not list, or that leave the version open
_UNLISTED = """
apple-amlr apple-ascl bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd cc creativeml-openrail-m
deepfloyd-if-license fair-noncommercial-research-license gemma gfdl gpl grok2-community h-research intel-research lgpl llama2
llama3 llama3.1 llama3.2 llama3.3 llama4 openmdw-1.0 openrail other
"""
UNLISTED = frozenset(_UNLISTED.split())

# ids of the model hub that are those of SPDX in lower case
_LISTED = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 lppl-1.3c mit
mpl-2.0 ms-pl ncsa ofl-1.1 osl-3.0 postgresql unlicense wtfpl zlib
"""
LISTED = frozenset(_LISTED.split())

# SPDX keeps the bare ids of these families as deprecated names of "-only"
_BARE_GNU = re.compile(r"((?:A|L)?GPL-\d\.\d)(\+?)")

# the value of an id in `evaluate`: whether it is accepted, or the licenses that the whole may be under
_T = TypeVar("_T", bool, frozenset[str])

_WORDS = re.compile(r"\(|\)|[^\s()]+")
_MAX_CHARACTERS = 1_000
_MAX_GROUPS = 50


def canonical(text: str) -> str:
    """Return a license, an SPDX expression or an id of the model hub, as an SPDX expression in its usual spelling.

    Raises InvalidLicense, with the nearest ids, for anything else: name your own license `LicenseRef-<name>`.
    """
    wanted = text.strip()
    folded = wanted.casefold()
    if folded in RENAMED:
        return RENAMED[folded]
    if folded in UNLISTED:
        return _reference(folded)
    try:
        if len(wanted) > _MAX_CHARACTERS or wanted.count("(") > _MAX_GROUPS:
            raise InvalidLicenseExpression(
                f"{len(wanted)} characters with {wanted.count('(')} groups; the limits are {_MAX_CHARACTERS} and "
                f"{_MAX_GROUPS}"
            )
        return " ".join(map(_current, str(canonicalize_license_expression(wanted)).split(" ")))
    except InvalidLicenseExpression as error:
        raise InvalidLicense(
            f"the license {wanted[:80]!r} is not an SPDX expression ({str(error)[:120]}); {_nearest(folded)} A text "
            f"that SPDX does not list gets a name of its own, such as {_reference(wanted[:40])!r}"
        ) from error


def of_card(text: str, who: str) -> str | None:
    """Return the license that a card states, or None for "unknown".

    Cards hold anything: a text that is not an SPDX expression is kept as `LicenseRef-<text>`, with a warning.
    """
    if text.strip().casefold() in ("", "unknown"):
        return None
    try:
        return canonical(text)
    except InvalidLicense as error:
        kept = _reference(text.strip()[:100])
        warnings.warn(f"{who}: its card says so, and it is stored as {kept!r}: {error}", stacklevel=3)
        return kept


def is_accepted(license: str | None, wanted: Collection[str] | str) -> bool:
    """Return True if a work under `license` can be used by someone who accepts the licenses in `wanted`.

    One alternative of an OR is enough, an AND needs all its terms; `+` and WITH only add to what an id permits.
    Raises InvalidLicense for a wanted license that is not an SPDX expression.
    """
    folded = frozenset(canonical(one).casefold() for one in one_or_many(wanted))
    return license is not None and _accepted(license, folded)


def as_spdx(license: str) -> str:
    """Return the license as an SPDX expression; any other text becomes `LicenseRef-<text>`."""
    try:
        return canonical(license)
    except InvalidLicense:
        return _reference(license[:100])


def evaluate(expression: str, of_id: Callable[[str, str | None], _T]) -> _T:
    """Evaluate an SPDX expression, with `of_id(id, exception)` for each id in lower case, | for OR and & for AND."""
    words = deque(_WORDS.findall(expression.casefold()))

    def alternatives() -> _T:
        value = joint_terms()
        while words and words[0] == "or":
            words.popleft()
            value = value | joint_terms()
        return value

    def joint_terms() -> _T:
        value = one()
        while words and words[0] == "and":
            words.popleft()
            value = value & one()
        return value

    def one() -> _T:
        word = words.popleft()
        if word == "(":
            value = alternatives()
            words.popleft()
            return value
        if words and words[0] == "with":
            words.popleft()
            return of_id(word, words.popleft())
        return of_id(word, None)

    return alternatives()


@lru_cache(maxsize=10_000)
def _accepted(license: str, wanted: frozenset[str]) -> bool:
    expression = as_spdx(license).casefold()

    def is_wanted(id: str, exception: str | None) -> bool:
        ways = {id, id.removesuffix("+")}
        if id.endswith("-or-later"):
            ways.add(id.replace("-or-later", "-only"))
        if exception is not None:
            ways |= {f"{way} with {exception}" for way in ways}
        return not ways.isdisjoint(wanted)

    return expression in wanted or evaluate(expression, is_wanted)


def _current(word: str) -> str:
    bare = _BARE_GNU.fullmatch(word)
    return word if bare is None else f"{bare[1]}{'-or-later' if bare[2] else '-only'}"


def _reference(text: str) -> str:
    return "LicenseRef-" + (re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "unnamed")


def _nearest(folded: str) -> str:
    stripped = re.sub("licen[cs]e", "", folded).strip(" -")
    close = difflib.get_close_matches(stripped, sorted({*LISTED, *UNLISTED, *RENAMED}), n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "https://spdx.org/licenses lists the ids."


UNKNOWN, SEVERAL = "LicenseRef-unknown", "LicenseRef-several"

_GPL3 = frozenset({"gpl-3.0", "agpl-3.0"})
_GPL = _GPL3 | {"gpl-2.0"}
_VERSIONS = ("1.0", "2.0", "2.5", "3.0", "4.0")
_BY_SA = frozenset(f"cc-by-sa-{version}" for version in _VERSIONS)
_NONCOMMERCIAL = frozenset({"noncommercial", *(f"cc-by-nc-sa-{version}" for version in _VERSIONS)})
_ANY = _GPL | {"lgpl-2.1", "lgpl-3.0", "other"} | _BY_SA | _NONCOMMERCIAL

# license: the licenses that the whole may then be under
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
    """Return the license of a work made of adapters, given as (name, card); None if no card states one.

    Raises InvalidLicense, unless `allowed`, if the licenses exclude each other or one of them permits no derived work.
    """
    licenses = [(name, stated_license(card.get("license"))) for name, card in parents]
    if all(license is None for _, license in licenses):
        return None
    if not allowed:
        require_one_work(licenses)
    return license_of_all(license for _, license in licenses)


def require_one_work(licenses: Iterable[tuple[str, str | None]]) -> None:
    """Check that adapters, given as (name, license or None if unknown), can be made into one work.

    Raises InvalidLicense, naming a license that permits no derived work, or a pair that excludes each other, or all.
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
    """Return the SPDX expression that joins these licenses by AND, sorted; None if no license is known.

    An unknown license among known ones is `LicenseRef-unknown`; a joint expression above the limit is `LicenseRef-several`.
    """
    parts: set[str] = set()
    for license in licenses:
        expression = stated_license(license)
        if expression is None:
            parts.add(UNKNOWN)
        elif " OR " in expression:
            parts.add(expression)
        else:
            parts.update(expression.split(" AND "))
    if parts <= {UNKNOWN}:
        return None
    several = len(parts) > 1
    joined = " AND ".join(sorted((f"({part})" if several and " OR " in part else part for part in parts), key=str.casefold))
    return joined if len(joined) <= _MAX_CHARACTERS else SEVERAL


def stated_license(license: object) -> str | None:
    """Return a card's license as an SPDX expression; None if it is missing, not text, or "unknown"."""
    if not isinstance(license, str) or license.strip().casefold() in ("", "unknown"):
        return None
    return as_spdx(license)


@lru_cache(maxsize=10_000)
def _whole(license: str) -> frozenset[str]:
    """Return the licenses that are possible for a work derived from a work under this license."""
    return evaluate(as_spdx(license), _of_id)


def _of_id(license: str, exception: str | None) -> frozenset[str]:
    # an exception permits more, and each something else
    if exception is not None:
        return _ANY
    creative = _CC.fullmatch(license)
    if creative is None:
        return _WHOLE.get(license, _ANY)
    noncommercial, kind, version, _ = creative.groups()
    if kind == "-nd":
        return frozenset()
    if kind == "-sa":
        # a later version may be chosen, and from BY-SA the GPL 3, by way of BY-SA 4.0
        later = frozenset(f"cc-by{noncommercial or ''}-sa-{candidate}" for candidate in _VERSIONS if candidate >= version)
        return later if noncommercial else later | _GPL3
    return _NONCOMMERCIAL if noncommercial else _ANY
