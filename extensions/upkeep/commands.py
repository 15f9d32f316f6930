"""`loraweave hub history`, `rollback` and `prune`: versions; `hub quarantine` and `release`: adapters that are put aside."""

from __future__ import annotations

from typing import Annotated

import typer

from loraweave.extend import (
    DEFAULT_HUB,
    HubOption,
    JsonOption,
    note,
    open_hub,
    print_json,
    print_rows,
    record_row,
    show_rows,
)

NameArgument = Annotated[str, typer.Argument(help="An adapter of the hub.")]

hub = typer.Typer()


@hub.command(epilog="Example: loraweave hub history antonym")
def history(name: NameArgument, hub: HubOption = DEFAULT_HUB, as_json: JsonOption = False) -> None:
    """List the versions of an adapter, oldest first; the last one is in use."""
    with open_hub(hub) as opened:
        records = opened.history(name)
    rows = [
        (r.version, r.created, r.hash[:12], f"back to {r.restored}" if r.restored else "", r.description) for r in records
    ]
    show_rows(as_json, list(map(record_row, records)), ("version", "created", "hash", "rollback", "description"), rows)


@hub.command(epilog="Example: loraweave hub rollback antonym 1")
def rollback(
    name: NameArgument,
    version: Annotated[int, typer.Argument(help="The version to go back to; `hub history` lists them.")],
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Bring an earlier version back, as a new one: nothing of the history is lost."""
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
