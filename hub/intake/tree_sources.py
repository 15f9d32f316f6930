"""Finding the adapters in a tree of folders by their files, without reading what they hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from loraweave.hub.formats._reading import is_adapter
from loraweave.hub.formats.peft import Peft
from loraweave.hub.intake.archives import archive_suffix

# version control keeps thousands of folders and no adapter of its own
_PASSED_OVER = (".git",)


def tree_sources(root: Path, unread: Callable[[OSError], None]) -> list[Path]:
    """Every folder at or below `root` that is an adapter, every LoRA file and archive, sorted; links are not followed.

    `unread` is called with the error of a folder that cannot be listed.
    """
    found = []
    for path, folders, files in os.walk(root, onerror=unread):
        folders[:] = [name for name in folders if name not in _PASSED_OVER]
        here = Path(path)
        files_of_weights = [here / name for name in files if name.endswith(".safetensors")]
        # of a folder of LoRA files each is an adapter, and keeps its name when another comes
        loras = [] if Peft.recognises(here) else [file for file in files_of_weights if _is_plain(file) and is_adapter(file)]
        if loras:
            found += loras
        elif is_adapter(here):
            found.append(here)
        found += [here / name for name in files if archive_suffix(name) and _is_plain(here / name)]
    return sorted(found, key=lambda source: source.relative_to(root).parts)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
