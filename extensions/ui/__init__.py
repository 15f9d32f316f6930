"""Which adapters has a hub, and what do they do together? A page in a browser, for this machine alone.

`make_ui_server` makes its server, `make_ui` the application; `loraweave ui` runs it in a shell. It needs `loraweave[serve]`,
memory for a map of the hub, and the base model from when something is first tried on it.
"""

from loraweave.extend import face

_MODULES = {"app": "make_ui make_ui_server"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
