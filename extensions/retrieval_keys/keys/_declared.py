"""The base class of keys with options."""

from __future__ import annotations

from typing import ClassVar

from loraweave import LoraweaveError, RetrievalError
from loraweave.extend import Declared


class DeclaredKey(Declared):
    """A key whose options are checked against their annotations; RetrievalError for a value outside its kind."""

    noun: ClassVar[str] = "key"
    error: ClassVar[type[LoraweaveError]] = RetrievalError
