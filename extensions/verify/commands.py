"""`loraweave verify`: tell which weights answer at a server."""

from __future__ import annotations

from typing import Annotated

import typer

from loraweave.extend.commands import DEFAULT_HUB, BaseOption, HubOption, JsonOption, note, open_hub, print_json, print_table

app = typer.Typer()


@app.command(epilog="Example: loraweave verify http://127.0.0.1:8000 --hub adapters")
def verify(
    url: Annotated[str, typer.Argument(help="Where the server answers: ours, vLLM's, llama.cpp's, or one like them.")],
    names: Annotated[list[str] | None, typer.Argument(help="Adapters or formulas; all that server and hub have.")] = None,
    hub: HubOption = DEFAULT_HUB,
    base: BaseOption = None,
    base_name: Annotated[
        str | None, typer.Option(help="What the server calls the base, where it does not say so itself.")
    ] = None,
    probes: Annotated[int, typer.Option(min=1, max=6, help="Prompts for each name, each asked two or three times.")] = 3,
    width: Annotated[int, typer.Option(min=1, help="Requests at once, when names are mixed.")] = 8,
    reload: Annotated[
        bool, typer.Option("--reload", help="Also unload and load each adapter, where the server can; changes the server.")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORAWEAVE_API_KEY", help="The bearer token that the server wants.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a server for each of its adapters and say which weights answered; exit status 1 on any fault."""
    from loraweave.extensions.verify.verify import verify_server

    with open_hub(hub) as opened:
        report = verify_server(
            url,
            opened,
            names or None,
            base=base,
            base_name=base_name,
            num_probes=probes,
            width=width,
            reload=reload,
            api_key=api_key,
        )
    if as_json:
        print_json(report.to_json())
    else:
        print_table(report.table())
        for text in report.notes:
            note(text)
    if not report.ok:
        raise typer.Exit(1)
