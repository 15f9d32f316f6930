"""`loraweave hub history`, `rollback`, `prune` (versions), `quarantine`, `release` (adapters put aside), `compositions`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraweave.extend.commands import (
    DEFAULT_HUB,
    HubOption,
    JsonOption,
    composition_row,
    note,
    open_hub,
    print_json,
    print_rows,
    record_row,
)

NameArgument = Annotated[str, typer.Argument(help="An adapter of the hub.")]
CompositionArgument = Annotated[str, typer.Argument(help="A composition of the hub, without the @.")]

hub = typer.Typer()


@hub.command(epilog="Example: loraweave hub history antonym")
def history(name: NameArgument, hub: HubOption = DEFAULT_HUB, as_json: JsonOption = False) -> None:
    """List the versions of an adapter, oldest first; the last one is in use."""
    with open_hub(hub) as opened:
        records = opened.history(name)
    rows = [
        (r.version, r.created, r.hash[:12], f"back to {r.restored}" if r.restored else "", r.description) for r in records
    ]
    columns = ("version", "created", "hash", "rollback", "description")
    print_json(list(map(record_row, records))) if as_json else print_rows(columns, rows)


@hub.command(epilog="Example: loraweave hub rollback antonym 1")
def rollback(
    name: NameArgument,
    version: Annotated[int, typer.Argument(help="The version to go back to; `hub history` lists them.")],
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Bring an earlier version back as a new version; the history is kept."""
    with open_hub(hub) as opened:
        record = opened.rollback(name, version)
    told = f"{record.name!r} is at version {record.version}, with the content of version {record.restored or version}"
    print_json(record_row(record)) if as_json else note(told)


@hub.command(epilog="Example: loraweave hub prune antonym --keep 3")
def prune(
    name: NameArgument,
    keep: Annotated[int, typer.Option(min=1, help="How many versions stay, the newest ones.")] = 1,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Forget old versions of an adapter; `gc` then frees their files."""
    with open_hub(hub) as opened:
        num_forgotten = opened.prune(name, keep=keep)
    told = f"{num_forgotten} versions of {name!r} are forgotten; `loraweave hub gc` frees their files"
    print_json({"forgotten": num_forgotten}) if as_json else note(told)


@hub.command(epilog="Example: loraweave hub quarantine antonym")
def quarantine(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Adapters of the hub.")] = None,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Put adapters aside, so that no search finds and no call reads them; without a name, list those put aside."""
    with open_hub(hub) as opened:
        # all or none: a misspelt name is an error before anything changes
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


@hub.command(epilog="Example: loraweave hub release antonym")
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


@hub.command("compositions", epilog="Example: loraweave hub compositions --json")
def list_compositions(hub: HubOption = DEFAULT_HUB, as_json: JsonOption = False) -> None:
    """List the compositions that a hub keeps."""
    with open_hub(hub) as opened:
        rows = [composition_row(stored) for stored in opened.compositions()]
    shown = [(row["name"], row["created"], row["formula"] or f"composed: {row['chosen']}") for row in rows]
    print_json(rows) if as_json else print_rows(("name", "created", "what"), shown)


@hub.command("write-composition", epilog="Example: loraweave hub write-composition support-bot composed")
def write_composition(
    name: CompositionArgument,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where its folder goes; eval, explain and export read it.")],
    hub: HubOption = DEFAULT_HUB,
) -> None:
    """Write a stored composition as the folder that it was saved from."""
    with open_hub(hub) as opened:
        opened.composition(name).write(out)
    note(f"wrote {name!r} to {out}")


@hub.command("remove-composition", epilog="Example: loraweave hub remove-composition support-bot")
def remove_composition(name: CompositionArgument, hub: HubOption = DEFAULT_HUB) -> None:
    """Take a composition out of the hub; `gc` then frees its files."""
    with open_hub(hub) as opened:
        opened.remove_composition(name)
    note(f"removed {name!r}; `loraweave hub gc` frees its files")
