"""Licenses as SPDX expressions: checked when they are given, read leniently from cards, compared by what they permit.

The model hub's ids are mostly SPDX ids in lower case. Those that are not stand in a table; what SPDX does not list becomes
`LicenseRef-<id>`, as SPDX provides. No list says which licenses permit commercial use, because texts such as Llama's or RAIL
permit it up to a size or for some purposes only: name the licenses that you accept instead.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import TypeVar

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from loraweave.errors import InvalidLicense
from loraweave.hub.intake.fields import one_or_many

# ids of the model hub that SPDX spells otherwise
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

# what an id stands for: whether it is accepted, or what it permits
_T = TypeVar("_T", bool, frozenset[str])

_WORDS = re.compile(r"\(|\)|[^\s()]+")
_MAX_CHARACTERS = 1_000
_MAX_GROUPS = 50


def canonical(text: str) -> str:
    """The license as an SPDX expression in its usual spelling; ids of the model hub are taken too.

    InvalidLicense, with the nearest ids, for anything else: a name of one's own is given as `LicenseRef-<name>`.
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
    """The license that a card states, None for "unknown".

    Cards hold anything: a text that is not an SPDX expression is kept as `LicenseRef-<text>`, with a warning.
    """
    if not text.strip() or text.strip().casefold() == "unknown":
        return None
    try:
        return canonical(text)
    except InvalidLicense as error:
        kept = _reference(text.strip()[:100])
        warnings.warn(f"{who}: its card says so, and it is stored as {kept!r}: {error}", stacklevel=3)
        return kept


def is_accepted(license: str | None, wanted: Collection[str] | str) -> bool:
    """Whether someone who accepts the wanted licenses can use a work under this one.

    Of alternatives (OR) one is enough, of joint terms (AND) all are needed; `+` and WITH only add to what an id permits.
    InvalidLicense for a wish that is no SPDX expression.
    """
    folded = frozenset(canonical(one).casefold() for one in one_or_many(wanted))
    return license is not None and _accepted(license, folded)


def as_spdx(license: str) -> str:
    """The license as an SPDX expression; any other text of an old row or a card becomes `LicenseRef-<text>`."""
    try:
        return canonical(license)
    except InvalidLicense:
        return _reference(license[:100])


def evaluate(expression: str, of_id: Callable[[str, str | None], _T]) -> _T:
    """An SPDX expression with `of_id(id, exception)`, ids in lower case, for each license: OR is |, AND is &."""
    return _any_of(_WORDS.findall(expression.casefold()), of_id)[0]


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


def _any_of(words: list[str], of_id: Callable[[str, str | None], _T]) -> tuple[_T, list[str]]:
    """(what the alternatives come to, what follows them)."""
    found, rest = _all_of(words, of_id)
    while rest and rest[0] == "or":
        other, rest = _all_of(rest[1:], of_id)
        found = found | other
    return found, rest


def _all_of(words: list[str], of_id: Callable[[str, str | None], _T]) -> tuple[_T, list[str]]:
    found, rest = _one(words, of_id)
    while rest and rest[0] == "and":
        other, rest = _one(rest[1:], of_id)
        found = found & other
    return found, rest


def _one(words: list[str], of_id: Callable[[str, str | None], _T]) -> tuple[_T, list[str]]:
    if words[0] == "(":
        found, rest = _any_of(words[1:], of_id)
        return found, rest[1:]
    rest = words[1:]
    if rest and rest[0] == "with":
        return of_id(words[0], rest[1]), rest[2:]
    return of_id(words[0], None), rest


def _current(word: str) -> str:
    bare = _BARE_GNU.fullmatch(word)
    if bare is None:
        return word
    return f"{bare[1]}{'-or-later' if bare[2] else '-only'}"


def _reference(text: str) -> str:
    return "LicenseRef-" + (re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "unnamed")


def _nearest(folded: str) -> str:
    asked = re.sub("licen[cs]e", "", folded).strip(" -")
    close = difflib.get_close_matches(asked, sorted({*LISTED, *UNLISTED, *RENAMED}), n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "https://spdx.org/licenses lists the ids."
