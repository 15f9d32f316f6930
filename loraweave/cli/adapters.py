"""`loraweave merge` and `train`: adapters or rows in, and adapters out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from loraweave.cli._application import (
    DEFAULT_HUB,
    AllowLicensesOption,
    BaseOption,
    DtypeOption,
    ExactRankOption,
    HubOption,
    JsonOption,
    OptionOption,
    SeedOption,
    SystemOption,
    WorkersOption,
    app,
    note,
    print_json,
    print_rows,
    print_table,
)
from loraweave.cli._inputs import (
    ADAPTER_FILE,
    is_recipe,
    load_model,
    merge_recipe,
    open_hub,
    read_adapter,
    read_formula,
    read_options,
    read_rows,
    read_weights,
    require_free,
)

# arguments of lw.merge that are flags here, or cannot be given as text
RESERVED = ("method", "rank", "name", "seed", "adapters", "weights", "heads", "statistics", "progress", "allow_licenses")
NUM_SAMPLES = 20


def show_methods(asked: bool) -> None:
    """Print the merge methods with their options, and end the program."""
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


@app.command(epilog="Example: loraweave merge trained/antonym trained/plural --weights 0.7,-0.4 --rank 8 --out merged")
def merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER",
            help="Adapter folders, or names in the hub; or one formula over it, '0.7*a + 0.3*ties(b, c)', or FILE.yaml.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the merged PEFT folder goes.")],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="A number for each adapter; equal shares of 1 by default.")
    ] = None,
    method: Annotated[str, typer.Option(help="A merge method; --list-methods shows them all.")] = "linear",
    list_methods: Annotated[
        bool, typer.Option("--list-methods", callback=show_methods, is_eager=True, help="Show all methods and options.")
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
    """Combine adapters into one, by a method, a formula or a recipe in YAML, without a model."""
    numbers = read_weights(weights, sources)
    options = read_options(option or (), reserved=RESERVED)
    require_free(out, ADAPTER_FILE, replace=force)
    import loraweave as lw

    rules: dict[str, Any] = {"rank": rank, "name": name or out.resolve().name, "heads": heads}
    rules["allow_licenses"] = allow_licenses
    recipe = is_recipe(sources)
    formula = None if recipe else read_formula(sources, hub)
    if (recipe or formula is not None) and (weights is not None or option or method != "linear" or (seed and not recipe)):
        raise typer.BadParameter(
            "a formula or recipe has weights, methods and options in it, and a formula seeds: leave --weights, --method, "
            "--option and --seed out"
        )
    dtype = "float32"
    if recipe:
        merged, dtype = merge_recipe(Path(sources[0]), hub, seed, rules)
    elif formula is not None:
        with open_hub(hub) as opened:
            merged = formula.merge(opened, **rules)
    else:
        adapters = [read_adapter(source, hub) for source in sources]
        merged = lw.merge(adapters, numbers, method=method, seed=seed, **rules, **options)
    license = merged.card.get("license")
    import torch

    merged.save_pretrained(out, dtype=getattr(torch, dtype))
    if plot is not None:
        merged.report.plot(plot)
    if as_json:
        told = {"out": out, "name": merged.name, "method": method, "license": license}
        if recipe:
            told |= {"recipe": sources[0], "method": merged.report.method, "dtype": dtype}
        elif formula is not None:
            told |= {"formula": formula.canonical, "method": merged.report.method}
        else:
            used = zip(adapters, numbers, strict=True)
            told["adapters"] = [{"name": adapter.name, "weight": weight} for adapter, weight in used]
        # norms and cosines of a layer are in the order of the parents, which is that of their content
        print_json(told | {"parents": merged.report.names, "layers": merged.report.to_json()})
        return
    print_table(merged.report.table())
    note(f"saved {merged.name!r} to {out}; license: {license or 'unknown'}")


@app.command(epilog="Example: loraweave train antonym.jsonl plural.jsonl --out trained --rank 8 --steps 60")
def train(
    files: Annotated[
        list[Path], typer.Argument(metavar="JSONL|CSV", exists=True, dir_okay=False, help="One file, one task, one adapter.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", file_okay=False, help="Gets a PEFT folder for each file.")],
    base: BaseOption = None,
    dtype: DtypeOption = None,
    instruction: Annotated[
        list[str] | None, typer.Option(help="What a task asks for: once for each file, in order; from the rows by default.")
    ] = None,
    system: SystemOption = None,
    split: Annotated[str, typer.Option(help='Of rows with a field "split", those of this one.')] = "train",
    rank: Annotated[int, typer.Option(min=1, help="The adapters' rank.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps for each adapter.")] = 60,
    lr: Annotated[float, typer.Option(min=0.0, help="The highest learning rate.")] = 3e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of each task in a step.")] = 8,
    jobs: Annotated[int, typer.Option(min=1, help="How many adapters are trained at once, at most.")] = 4,
    held_out: Annotated[
        float | None, typer.Option(help="Share of the rows that is not trained on but tells which factors are the best.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many evaluations, 10 steps apart, without a lower held-out loss."),
    ] = None,
    seed: SeedOption = 0,
    samples: Annotated[int, typer.Option(min=0, help="Sample inputs kept in each card, which searches read.")] = NUM_SAMPLES,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FOLDER", file_okay=False, help="Where work is kept; OUT/.checkpoint by default.")
    ] = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter for each file. After an interruption the same command goes on where it stopped."""
    names = [path.stem for path in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise typer.BadParameter(f"two files would make the adapter {twice[0]!r}; rename one")
    if instruction and len(instruction) != len(files):
        raise typer.BadParameter(f"--instruction is given {len(instruction)} times for {len(files)} files; once for each")
    for name in names:
        require_free(out / name, ADAPTER_FILE)
    read = {path.stem: read_rows(path, split=split) for path in files}
    import loraweave as lw

    instructions = dict(zip(read, instruction or (), strict=False))
    tasks = {name: rows.task(instructions.get(name), system) for name, rows in read.items()}
    model, tokenizer = load_model(base, dtype)
    settings: dict[str, Any] = {"rank": rank, "steps": steps, "lr": lr, "batch_size": batch_size, "jobs_per_batch": jobs}
    settings |= {"held_out": held_out, "patience": patience, "seed": seed, "checkpoint": checkpoint or out / ".checkpoint"}
    trained = lw.train_adapters(model, tokenizer, tasks, n_jobs=workers, **settings)
    results = []
    for name, adapter in trained.items():
        inputs = [str(prompt) for prompt, _ in tasks[name].examples][:samples]
        card = {**adapter.card, "description": tasks[name].instruction or tasks[name].system, "examples": inputs}
        folder = replace(adapter, card=card).save_pretrained(out / name)
        results.append({"name": name, "rows": len(tasks[name].examples), "rank": adapter.rank, "out": str(folder)})
    if as_json:
        print_json(results)
    else:
        print_rows(("name", "rows", "rank", "folder"), [tuple(result.values()) for result in results])
