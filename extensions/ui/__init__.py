"""Which adapters has a hub, and what do they do together? A page in a browser, for this machine alone.

`make_ui_server` makes its server, `make_ui` the application; `loraweave ui` runs it in a shell. It needs `loraweave[serve]`,
memory for a map of the hub, and the base model from when something is first tried on it.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.ui.app import make_ui, make_ui_server
else:
    __getattr__ = lazy(__name__, {f"{__name__}.app": "make_ui make_ui_server"})

__all__ = ["make_ui", "make_ui_server"]
