"""`loraweave hub add-tree`: all adapters below a folder at once, with a report of what was refused and why."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from loraweave._printing import note, plain, print_json, print_rows
from loraweave.cli_hub import DEFAULT_HUB, AnomaliesOption, BlobsOption, HubOption, JsonOption

TREE_EXAMPLE = "Example: loraweave hub add-tree examples/pool --tag pool --report added.json"


def add_tree(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Searched with all folders below it.")],
    prefix: Annotated[str, typer.Option(help="What names begin with; the path below FOLDER follows.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="A tag; may be given several times.")] = None,
    license: Annotated[str | None, typer.Option(help="SPDX id, for those whose card has none.")] = None,
    anomalies: AnomaliesOption = "report",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only find and name them.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="JSON", dir_okay=False, help="Write the report here too.")] = None,
    hub: HubOption = DEFAULT_HUB,
    blobs: BlobsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store every adapter below a folder; run again, it goes on, and reads only what was changed."""
    import loraweave as lw
    from loraweave.hub.intake.add_tree import add_tree

    with lw.Hub(hub, blobs=blobs) as opened:
        found = add_tree(
            opened,
            folder,
            prefix=prefix,
            tags=tag or (),
            license=license,
            anomalies=anomalies,
            dry_run=dry_run,
            progress=sys.stderr.isatty(),
        )
    if report is not None:
        report.write_text(json.dumps(plain(found.to_json()), indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(found.to_json())
        return
    # what is there already is no news
    rows = [(entry.path, entry.state, entry.name, entry.why) for entry in found.entries if entry.state != "present"]
    if rows:
        print_rows(("path", "state", "name", "why"), rows)
    note(", ".join(f"{count} {state}" for state, count in found.counts().items()))
