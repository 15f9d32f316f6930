"""How is a hub saved whose catalogue is damaged or lost? It is made anew from the files of its adapters.

`rebuild` reads every blob and every row of the old catalogue that is intact, and writes a new catalogue in its place, all or
nothing. It costs the time to read all adapters; nothing is deleted.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.upkeep.from_blobs import rebuild
else:
    __getattr__ = lazy(__name__, {f"{__name__}.from_blobs": "rebuild"})

__all__ = ["rebuild"]
