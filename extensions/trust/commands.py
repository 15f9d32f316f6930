"""`loraweave hub sign`: sign adapters of a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraweave.extend.commands import DEFAULT_HUB, HubOption, note, open_hub

hub = typer.Typer()


@hub.command(epilog="Example: loraweave hub sign key.pem passive   (openssl genpkey -algorithm ed25519 -out key.pem)")
def sign(
    key: Annotated[Path, typer.Argument(metavar="PEM", exists=True, dir_okay=False, help="An Ed25519 private key.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Adapters; all by default.")] = None,
    hub: HubOption = DEFAULT_HUB,
) -> None:
    """Vouch for adapters: sign their weights, base, license and card. `hub verify --signed-by` checks it."""
    from loraweave.extensions.trust import signatures

    with open_hub(hub) as opened:
        note(f"signed {len(signatures.sign(opened, key, names or None))} adapters")
