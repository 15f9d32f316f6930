"""`loraweave merge`: adapters in, one adapter out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loraweave.cli._flags import (
    DEFAULT_HUB,
    AllowLicensesOption,
    ExactRankOption,
    HubOption,
    JsonOption,
    OptionOption,
    SeedOption,
)
from loraweave.cli._inputs import ADAPTER_FILE, read_adapter, read_options, read_weights, require_free
from loraweave.cli._printing import note, print_json, print_rows, print_table

MERGE_EXAMPLE = "Example: loraweave merge trained/antonym trained/plural --weights 0.7,-0.4 --rank 8 --out merged"
# arguments of lw.merge that are flags here, or cannot be given as text
RESERVED = ("method", "rank", "name", "seed", "adapters", "weights", "heads", "statistics", "progress", "allow_licenses")


def show_methods(asked: bool) -> None:
    """Prints the merge methods with their options, and ends the program."""
    if not asked:
        return
    from loraweave import registry
    from loraweave.composer.merge.method_call import MethodCall

    rows = []
    for name in registry.names("methods"):
        says = sys.modules[registry.get("methods", name).__module__].__doc__ or ""
        rows.append((name, ", ".join(MethodCall(name).own_options) or "-", says.splitlines()[0]))
    print_rows(("method", "options", "what it gives"), rows)
    raise typer.Exit


def merge(
    sources: Annotated[list[str], typer.Argument(metavar="ADAPTER", help="Adapter folders, or names in the hub.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the merged PEFT folder goes.")],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="A number for each adapter; equal shares of 1 by default.")
    ] = None,
    method: Annotated[str, typer.Option(help="A merge method; --list-methods shows them all.")] = "linear",
    list_methods: Annotated[
        bool,
        typer.Option("--list-methods", callback=show_methods, is_eager=True, help="Show all methods and options."),
    ] = False,
    option: OptionOption = None,
    rank: ExactRankOption = None,
    heads: Annotated[
        str, typer.Option(help="What becomes of trained heads: error, first (the first adapter's) or average.")
    ] = "error",
    name: Annotated[str | None, typer.Option(help="The merged adapter's name; the folder's by default.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw each adapter's share of every layer: .png, .svg or .pdf.")
    ] = None,
    seed: SeedOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Write over the adapter that --out holds.")] = False,
    allow_licenses: AllowLicensesOption = False,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Combine adapters into one, without a model."""
    numbers = read_weights(weights, len(sources))
    options = read_options(option or (), reserved=RESERVED)
    require_free(out, ADAPTER_FILE, replace=force)
    import loraweave as lw

    adapters = [read_adapter(source, hub) for source in sources]
    called = name or out.resolve().name
    merged = lw.merge(
        adapters,
        numbers,
        method=method,
        rank=rank,
        name=called,
        seed=seed,
        heads=heads,
        allow_licenses=allow_licenses,
        **options,
    )
    license = merged.card.get("license")
    merged.save_pretrained(out)
    if plot is not None:
        merged.report.plot(plot)
    if as_json:
        used = [{"name": adapter.name, "weight": weight} for adapter, weight in zip(adapters, numbers, strict=True)]
        told = {"out": out, "name": merged.name, "method": method, "license": license, "adapters": used}
        # norms and cosines of a layer are in the order of the parents, which is that of their content
        print_json(told | {"parents": merged.report.names, "layers": merged.report.to_json()})
        return
    print_table(merged.report.table())
    note(f"saved {merged.name!r} to {out}; license: {license or 'unknown'}")
