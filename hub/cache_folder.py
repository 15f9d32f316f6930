"""The folder for what can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The one folder outside the environment that loraweave writes: $LORAWEAVE_CACHE, else ~/.cache/loraweave."""
    own = os.environ.get("LORAWEAVE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraweave"
