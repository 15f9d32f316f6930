"""`loraweave load`: load a formula into a running server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loraweave.extend.commands import DEFAULT_HUB, HubOption, open_hub, print_json

app = typer.Typer()


@app.command(epilog='Example: loraweave load "1.1*passive + 0.9*negation" --into sglang --url http://127.0.0.1:30000')
def load(
    formula: Annotated[str, typer.Argument(help="What to load, such as 0.7*a + 0.3*b.")],
    into: Annotated[str, typer.Option(help="The engine: sglang or lorax.")],
    url: Annotated[str, typer.Option(help="Where it runs; it sees the folders under the same path.")],
    hub: HubOption = DEFAULT_HUB,
    folders: Annotated[Path, typer.Option(help="Where the folders of formulas lie; none is removed.")] = Path("served"),
    max_rank: Annotated[int, typer.Option(min=1, help="The server's largest rank.")] = 64,
    max_error: Annotated[float, typer.Option(min=0, help="What a cut to that rank may change of the update.")] = 1e-3,
) -> None:
    """Write a formula as a folder, load it into a running server, and print the fields of requests for it as JSON."""
    from loraweave.extensions.engines import loading
    from loraweave.extensions.engines.folders import Folders

    loading.require_engine(into)
    with open_hub(hub) as opened:
        made = Folders(opened, folders.absolute(), max_rank=max_rank, max_error=max_error, max_bytes=sys.maxsize)
        try:
            folder = made.hold(formula)
            fields = loading.load(folder, url, engine=into)
        finally:
            made.close()
    print_json({"formula": folder.canonical, "relative_error": folder.relative_error, "request": fields})
