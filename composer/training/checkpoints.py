"""Adapters that a training has finished, in its checkpoint folder."""

from __future__ import annotations

import logging
from pathlib import Path

from loraweave.errors import LoraweaveError
from loraweave.hub.adapter import Adapter

logger = logging.getLogger(__name__)


def save_adapter(folder: Path, key: str, adapter: Adapter) -> None:
    adapter.save_pretrained(folder / "finished" / key)


def load_adapter(folder: Path, key: str) -> Adapter | None:
    """The finished adapter of that key, or None; a damaged folder counts as none and is said."""
    path = folder / "finished" / key
    if not path.is_dir():
        return None
    try:
        return Adapter.from_pretrained(path)
    except LoraweaveError as error:
        logger.warning("the finished adapter %s is damaged (%s); it is trained again", path, error)
        return None
