"""`loraweave ui`: a hub in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from loraweave import PackageMissing
from loraweave.extend.commands import DEFAULT_HUB, BaseOption, DtypeOption, HubOption, load_model, open_hub, require_dtype

app = typer.Typer()


@app.command(epilog="Example: loraweave ui --hub adapters   (then open the address that it prints)")
def ui(
    hub: HubOption = DEFAULT_HUB,
    base: BaseOption = None,
    dtype: DtypeOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8001,
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
        make_ui_server(opened, lambda: load_model(base, dtype), port=port).run()
