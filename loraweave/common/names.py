"""Rules for adapter names: free text that fits on one line. A name never becomes a path or a module key; a digest does."""

import difflib
import hashlib
import unicodedata
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from itertools import islice

from loraweave.errors import InvalidName, UnknownExpert

MAX_NAME_CHARACTERS = 200

# control characters, lone surrogates, and the two characters that Unicode breaks lines at
_REFUSED_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}


def checked_name(name: object) -> str:
    """Return the name in Unicode form NFC, so that ways of typing it are one. Raises InvalidName if a rule forbids it."""
    if not isinstance(name, str):
        raise InvalidName(f"an adapter's name is text, not {type(name).__name__} {_short(name)}")
    normal = unicodedata.normalize("NFC", name)
    if not normal:
        raise InvalidName("an adapter's name must have at least one character, and this one is empty")
    if len(normal) > MAX_NAME_CHARACTERS:
        raise InvalidName(
            f"an adapter's name has at most {MAX_NAME_CHARACTERS} characters, not {len(normal)}: {_short(name)}"
        )
    if normal != normal.strip():
        raise InvalidName(
            f"an adapter's name neither begins nor ends with a space: {_short(name)}; try {_short(name.strip())}"
        )
    for position, character in enumerate(normal):
        if unicodedata.category(character) in _REFUSED_CATEGORIES:
            raise InvalidName(
                f"an adapter's name has no control characters, line breaks or lone surrogates, but character "
                f"{position + 1} of {_short(name)} is U+{ord(character):04X}"
            )
    return normal


def near_misses(name: str, known: Iterable[str]) -> list[str]:
    """Return at most three names of `known` that `name` may stand for, the nearest first, ignoring case."""
    by_folded: dict[str, list[str]] = {}
    for other in known:
        by_folded.setdefault(other.casefold(), []).append(other)
    close = difflib.get_close_matches(str(name).casefold(), by_folded, n=3)
    return [other for folded in close for other in by_folded[folded]][:3]


def _short(value: object) -> str:
    # ascii, so that a message with a lone surrogate can be printed
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(text: str) -> str:
    """Replace every character that a terminal would not show by a space, one for one."""
    return "".join(character if character.isprintable() else " " for character in text)


def text_digest(text: str) -> str:
    """Return the sha256 of a text, in hexadecimal, which stands for the text in a path, a database row or a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def now() -> str:
    """Return the current time in UTC, as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# how many names an error message lists: a pool may have thousands
NUM_SHOWN = 8


def unknown_expert(name: object, known: Collection[str]) -> UnknownExpert:
    """Make the error to raise for `name`, which is not among `known`."""
    close = near_misses(str(name), known)
    hint = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
    shown = ", ".join(map(repr, islice(known, NUM_SHOWN)))
    more = f" and {len(known) - NUM_SHOWN} more" if len(known) > NUM_SHOWN else ""
    return UnknownExpert(f"no expert {name!r} in the pool{hint}; it has {shown}{more}")
