"""`loraweave hub quarantine` and `release`: putting adapters aside and taking them back."""

from __future__ import annotations

from typing import Annotated

import typer

from loraweave._inputs import open_hub
from loraweave._printing import note, print_json, print_rows, record_row
from loraweave.cli_hub import DEFAULT_HUB, HubOption, JsonOption

QUARANTINE_EXAMPLE = "Example: loraweave hub quarantine antonym"
RELEASE_EXAMPLE = "Example: loraweave hub release antonym"


def quarantine(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Adapters of the hub.")] = None,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Put adapters aside, so that nothing finds or reads them; without a name, list those that are."""
    with open_hub(hub) as opened:
        # all or none: a misspelt name is told before anything changes
        for name in names or ():
            opened.record(name)
        for name in names or ():
            opened.quarantine(name)
            note(f"{name!r} is in quarantine; `loraweave hub release` takes it back")
        held = opened.records(quarantined=True)
    if as_json:
        print_json([record_row(record) for record in held])
    elif not names:
        print_rows(("name", "what was found"), [(r.name, "; ".join(a.detail for a in r.anomalies)) for r in held])


def release(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Adapters in quarantine.")],
    hub: HubOption = DEFAULT_HUB,
) -> None:
    """Take adapters out of quarantine."""
    with open_hub(hub) as opened:
        for name in names:
            opened.record(name)
        for name in names:
            opened.release(name)
            note(f"released {name!r}")
