"""The key of a base model at hand."""

from __future__ import annotations

from torch import nn

from loraweave.hub.fingerprint import fingerprint
from loraweave.types import BaseKey


def base_key(model: nn.Module) -> BaseKey:
    """The model's id, the commit that it was loaded from where transformers knows it, and its fingerprint."""
    config = getattr(model, "config", None)
    revision = getattr(config, "_commit_hash", None)
    return BaseKey(str(getattr(model, "name_or_path", "") or ""), revision or None, fingerprint(model))
