"""Where do adapters come from, beside folders and repositories? Trees of folders, zips, tars, and searches of the model hub.

`hub.add` reads an archive once this is installed: it is unpacked into a private folder, and hostile entries are refused.
`add_tree` adds every adapter below a folder, and goes on where it was interrupted. `discover` lists what the model hub has
for a base model, and `hub.add` takes each. An archive costs the time and the room of its files, a list a request for each
adapter in it, a second walk over a tree the time to look at its files.
"""

from loraweave.extend import face

_MODULES = {"on_model_hub": "Found discover", "trees": "TreeReport add_tree"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
