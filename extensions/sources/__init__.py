"""Where do adapters come from, beside folders and repositories? Trees of folders, zips, tars, and searches of the model hub.

`hub.add` reads an archive once this is installed: it is unpacked into a private folder, and hostile entries are refused.
`add_tree` adds every adapter below a folder, and goes on where it was interrupted. `discover` lists what the model hub has
for a base model, and `hub.add` takes each. An archive costs the time and the room of its files, a list a request for each
adapter in it, a second walk over a tree the time to look at its files.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.sources.on_model_hub import Found, discover
    from loraweave.extensions.sources.trees import TreeReport, add_tree
else:
    __getattr__ = lazy(__name__, {f"{__name__}.on_model_hub": "Found discover", f"{__name__}.trees": "TreeReport add_tree"})

__all__ = ["Found", "TreeReport", "add_tree", "discover"]
