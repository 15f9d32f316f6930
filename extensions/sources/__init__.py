"""Where do adapters come from, beside folders and repositories? Zips and tars, and the model hub's list for a base.

`hub.add` reads an archive once this is installed: it is unpacked into a private folder, and hostile entries are refused.
`discover` lists what the model hub has for a base model, and `hub.add` takes each. An archive costs the time and the room of
its files; a list costs a request for each adapter in it.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.sources.on_model_hub import Found, discover
else:
    __getattr__ = lazy(__name__, {f"{__name__}.on_model_hub": "Found discover"})

__all__ = ["Found", "discover"]
