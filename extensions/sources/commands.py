"""`loraweave hub add-tree`: store every adapter below a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from loraweave.extend.commands import (
    DEFAULT_HUB,
    AnomaliesOption,
    BlobsOption,
    HubOption,
    JsonOption,
    ManyTagsOption,
    WorkersOption,
    note,
    print_json,
    print_rows,
)

hub = typer.Typer()


@hub.command("add-tree", epilog="Example: loraweave hub add-tree examples/pool --tag pool --report added.json")
def add_tree(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Searched with all folders below it.")],
    prefix: Annotated[str, typer.Option(help="What names begin with; the path below FOLDER follows.")] = "",
    tag: ManyTagsOption = None,
    license: Annotated[str | None, typer.Option(help="SPDX id, for those whose card has none.")] = None,
    anomalies: AnomaliesOption = "report",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only find and name them.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="JSON", dir_okay=False, help="Write the report here too.")] = None,
    workers: WorkersOption = None,
    hub: HubOption = DEFAULT_HUB,
    blobs: BlobsOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List every adapter with its state, not only those that were refused.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Store every adapter below a folder; run again, it goes on, and reads only what was changed."""
    import loraweave as lw
    from loraweave.extensions.sources import trees

    with lw.Hub(hub, blobs=blobs) as opened:
        tree_report = trees.add_tree(
            opened,
            folder,
            prefix=prefix,
            tags=tag or (),
            license=license,
            anomalies=anomalies,
            dry_run=dry_run,
            n_jobs=workers,
            progress=sys.stderr.isatty(),
        )
    if report is not None:
        report.write_text(json.dumps(tree_report.to_json(), indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(tree_report.to_json())
        return
    if everything or dry_run:
        entries = tree_report.entries
        print_rows(("path", "state", "name", "why"), [(entry.path, entry.state, entry.name, entry.why) for entry in entries])
    elif refused := tree_report.of("refused"):
        print_rows(("path", "refused because"), [(entry.path, entry.why) for entry in refused])
    note(", ".join(f"{count} {state}" for state, count in tree_report.counts().items()))
