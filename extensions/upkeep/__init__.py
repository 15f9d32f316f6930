"""How is a hub kept in order? By versions and a quarantine in the shell, and a lost catalogue is made anew from its files.

`loraweave hub history`, `rollback` and `prune` are for versions, `quarantine` and `release` for adapters that are put aside;
in Python these are methods of a hub. `rebuild` reads every blob and every row of the old catalogue that is intact, and puts
a new catalogue in its place, all or nothing. It costs the time to read all adapters; nothing is deleted.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.upkeep.from_blobs import rebuild
else:
    __getattr__ = lazy(__name__, {f"{__name__}.from_blobs": "rebuild"})

__all__ = ["rebuild"]
