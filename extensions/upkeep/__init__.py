"""How is a hub kept in order? By versions and a quarantine in the shell, and a lost catalogue is made anew from its files.

`loraweave hub history`, `rollback` and `prune` are for versions, `quarantine` and `release` for adapters that are put aside;
in Python these are methods of a hub. `rebuild` reads every blob and every row of the old catalogue that is intact, and puts
a new catalogue in its place, all or nothing. It costs the time to read all adapters; nothing is deleted.
"""

from loraweave.extend import face

_MODULES = {"from_blobs": "rebuild"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
