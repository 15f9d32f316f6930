"""Turns what a remote store raises into the hub's own errors, once, at the room's edge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from loraweave.errors import HubError, HubReadOnly

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


@contextmanager
def remote_errors(place: str, doing: str, *, writing: bool = False) -> Iterator[None]:
    """Raises a leaf of HubError for any failure inside but FileNotFoundError. `place` is a URL, `doing` a verb.

    Stores raise what the library below them does, which has no common root.
    """
    try:
        yield
    except (HubError, FileNotFoundError):
        raise
    except Exception as error:
        shown = f"{doing} {without_credentials(place)}: {type(error).__name__}: {without_credentials(str(error))}"
        if isinstance(error, PermissionError) and writing:
            raise HubReadOnly(f"{shown}; these credentials may not write there, reading may still work") from error
        raise HubError(
            f"{shown}; nothing was changed. Is the store reachable, and are its credentials in the environment?"
        ) from error


def without_credentials(text: str) -> str:
    """The text with user names and passwords cut out of the URLs in it."""
    return _CREDENTIALS.sub("", text)
