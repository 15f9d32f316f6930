"""`loraweave ui`: a hub in a browser."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from typing import Annotated

import typer

from loraweave import PackageMissing
from loraweave.extend.commands import DEFAULT_HUB, BaseOption, DtypeOption, HubOption, load_model, open_hub, require_dtype

app = typer.Typer()


@app.command(epilog="Example: loraweave ui --hub adapters   (it prints the address, and opens it where there is a display)")
def ui(
    hub: HubOption = DEFAULT_HUB,
    base: BaseOption = None,
    dtype: DtypeOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8001,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser; the address is printed.")] = False,
) -> None:
    """Look at a hub in a browser: search, maps, sliders, and which adapter counts where. Only this machine reaches it."""
    # the base is loaded when the page first needs it
    require_dtype(dtype)
    try:
        from loraweave.extensions.ui.app import make_ui_server
    except ModuleNotFoundError as error:
        raise PackageMissing(
            f"the page needs packages that are not installed ({error}): pip install 'loraweave[serve]'"
        ) from error

    with open_hub(hub) as opened:
        ready = (lambda address: None) if no_open or not has_display() else show
        make_ui_server(opened, lambda: load_model(base, dtype), port=port, base=base, ready=ready).run()


def has_display() -> bool:
    """Return True if the command runs at a terminal, with a display that a browser can open on."""
    screen = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return sys.stderr.isatty() and screen


def show(address: str) -> None:
    """Open the address in the user's browser, in a thread, since some browsers return only when they are closed."""
    threading.Thread(target=webbrowser.open, args=(address,), name="loraweave-browser", daemon=True).start()
