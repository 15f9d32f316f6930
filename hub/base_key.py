"""The key of a base model at hand."""

from __future__ import annotations

from torch import nn

from loraweave.hub.fingerprint import fingerprint
from loraweave.types import BaseKey


def base_key(model: nn.Module, *, weights: bool = True) -> BaseKey:
    """The model's id, the commit that it was loaded from where transformers knows it, and its fingerprint.

    Without `weights` no parameter is looked at, and the key has no fingerprint.
    """
    config = getattr(model, "config", None)
    revision = getattr(config, "_commit_hash", None)
    own_print = fingerprint(model) if weights else None
    return BaseKey(str(getattr(model, "name_or_path", "") or ""), revision or None, own_print)
