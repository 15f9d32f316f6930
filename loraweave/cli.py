"""The command line. Thin: every command calls the public API, and imports what is heavy only when it runs."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraweave import __version__
from loraweave._application import INTERRUPTED, Application, one_line, quiet_libraries
from loraweave._inputs import (
    ADAPTER_FILE,
    COMPOSITION_FILE,
    is_given,
    load_model,
    open_hub,
    read_labels,
    read_named_weights,
    read_options,
    read_pool,
    read_rows,
    recorded_base,
    require_free,
)
from loraweave._printing import note, print_json, print_rows, print_table, progress_to_stderr
from loraweave.cli_encoder import ENCODER_EXAMPLE, train_encoder
from loraweave.cli_explain import EXPLAIN_EXAMPLE, explain
from loraweave.cli_hub import DEFAULT_HUB, AllowLicensesOption, HubOption, JsonOption, hub
from loraweave.cli_merge import MERGE_EXAMPLE, merge
from loraweave.cli_quarantine import QUARANTINE_EXAMPLE, RELEASE_EXAMPLE, quarantine, release
from loraweave.cli_tree import TREE_EXAMPLE, add_tree
from loraweave.cli_versions import versions

if TYPE_CHECKING:
    import loraweave as lw

BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Base model: a folder or hub id; the embedded one by default.")
]
OptionOption = Annotated[
    list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="A setting of the method; may be repeated.")
]
InstructionOption = Annotated[str | None, typer.Option(help="What the task asks for; from the rows when they agree on one.")]
LabelsOption = Annotated[str | None, typer.Option(metavar="A,B", help="The only possible answers, separated by commas.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
NUM_SAMPLES = 20

app = typer.Typer(
    cls=Application,
    help="Find stored LoRA adapters, weigh them, and compose them into new skills.",
    epilog="Start with: loraweave demo",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
hub.command("add-tree", epilog=TREE_EXAMPLE)(add_tree)
hub.command(epilog=QUARANTINE_EXAMPLE)(quarantine)
hub.command(epilog=RELEASE_EXAMPLE)(release)
hub.command("train-encoder", epilog=ENCODER_EXAMPLE)(train_encoder)
hub.add_typer(versions)
app.add_typer(hub, name="hub")
app.command(epilog=MERGE_EXAMPLE)(merge)
app.command(epilog=EXPLAIN_EXAMPLE)(explain)


def main() -> None:
    """The entry point of the command `loraweave`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a name that the terminal's encoding lacks must not end the command
        sys.stdout.reconfigure(errors="replace")
    if "--debug" not in sys.argv:
        quiet_libraries()
    try:
        app(prog_name="loraweave")
    except KeyboardInterrupt:
        # outside of a command, for instance while modules are loaded
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"loraweave {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works after any command.")] = False,
) -> None:
    progress_to_stderr()


@app.command(epilog="Example: loraweave demo --task plural_upper --budget 20")
def demo(
    task: Annotated[str, typer.Option(help="A task that no adapter of the pool was trained for.")] = "pick_verb_5",
    pool: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of adapter folders; examples/pool by default."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder of tasks with MANIFEST.json; examples/data by default."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="How many adapters to choose from.")] = 20,
    budget: Annotated[int, typer.Option(min=1, help="How many mixtures the search tries.")] = 40,
    seed: SeedOption = 0,
    num_test: Annotated[int, typer.Option(min=1, help="How many test inputs to answer.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Compose stored adapters for a task nobody trained, and compare with the base model."""
    from loraweave.demo import run

    run(pool=pool, data=data, task=task, k=k, budget=budget, seed=seed, num_test=num_test, as_json=as_json)


@app.command(
    epilog="Example: loraweave compose --pool examples/pool --examples examples/data/unseen/pick_color_5.jsonl "
    "--num-examples 5 --out composed"
)
def compose(
    context: typer.Context,
    examples: Annotated[
        Path, typer.Option(metavar="JSONL|CSV", exists=True, dir_okay=False, help='Lines {"input": "...", "target": "..."}.')
    ],
    base: BaseOption = None,
    hub: HubOption = DEFAULT_HUB,
    pool: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder of adapter folders, used whole, not a hub.")
    ] = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows; all by default.")] = None,
    split: Annotated[str, typer.Option(help='Of rows with a field "split", those of this one.')] = "train",
    instruction: InstructionOption = None,
    labels: LabelsOption = None,
    method: Annotated[
        str,
        typer.Option(
            help="How to weigh: auto, base, best_single, or one of `names('routers')`: a search (lorahub, gradient, ...), "
            "or a router, which weighs every token by itself (arrow, spectr, ...)."
        ),
    ] = "auto",
    k: Annotated[int, typer.Option(min=1, help="How many adapters of the hub to choose from.")] = 20,
    budget: Annotated[int, typer.Option(min=1, help="How many mixtures the search tries.")] = 40,
    weight: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="For --method manual; may be repeated.")
    ] = None,
    option: OptionOption = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FOLDER", file_okay=False, help="Keep the search here, to go on if interrupted.")
    ] = None,
    prune: Annotated[
        float | None, typer.Option(min=0.0, metavar="NATS", help="Then leave adapters out while the loss rises by less.")
    ] = None,
    tune: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Then train the merge on, on the examples.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Then cut every layer to this rank.")] = None,
    seed: SeedOption = 0,
    allow_licenses: AllowLicensesOption = False,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the composition goes.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the mixture of stored adapters that solves a task given by a few examples."""
    given = ("model", "tokenizer", "hub_or_pool", "task")
    reserved = (*given, "method", "k", "budget", "seed", "weights", "checkpoint", "progress", "allow_licenses")
    options = read_options(option or (), reserved=reserved)
    if weight:
        options["weights"] = read_named_weights(weight)
    wanted = read_labels(labels)
    if pool is not None and is_given(context, "hub"):
        raise typer.BadParameter("--pool and --hub both name adapters to choose from; leave one out")
    if out is not None:
        require_free(out, COMPOSITION_FILE)
    rows = read_rows(examples, split=split)
    import loraweave as lw
    from loraweave.composer.compose.compose import check_arguments
    from loraweave.composer.compose.settings import routes

    asked = rows.instruction if instruction is None else instruction
    task = lw.Task(rows.examples()[:num_examples], instruction=asked, labels=wanted)
    source = open_hub(hub) if pool is None else read_pool(pool)
    arguments = {"method": method, "k": k, "budget": budget, "seed": seed, "checkpoint": checkpoint, **options}
    arguments["allow_licenses"] = allow_licenses
    check_arguments(source, task, **arguments)
    if routes(method) and not prune is tune is rank is None:
        raise typer.BadParameter(f"--prune, --tune and --rank change weights, but {method!r} is a router: leave them out")
    model, tokenizer = load_model(base)
    composed = lw.compose(model, tokenizer, source, task, **arguments, progress=sys.stderr.isatty())
    shown = sys.stderr.isatty()
    if prune is not None and not composed.is_base:
        composed = composed.prune(prune, progress=shown)
    if tune is not None:
        composed = composed.tune(tune, progress=shown)
    if rank is not None and not composed.is_base:
        composed = composed.cut(rank)
    if out is not None:
        composed.save_pretrained(out)
    if as_json:
        router = None if composed.router is None else method
        told = {"weights": composed.mean_weights, "router": router, "license": composed.license}
        print_json({**told, "report": composed.report.to_json(), "out": out})
        return
    print_table(composed.report.table())
    if composed.router is None:
        _print_weights(composed)
    else:
        note(f"router {method!r} weighs every adapter for each token and layer: `loraweave explain` shows what counted")
    if out is not None:
        more = ", `loraweave export` makes a PEFT folder of it" if composed.router is None else ""
        note(f"saved to {out}, license: {composed.license or 'unknown'}; `loraweave eval {out} FILE.jsonl` scores it{more}")


def _print_weights(composed: lw.Composition) -> None:
    weights = composed.mean_weights
    heading = "weight" if composed.by_layer is None else "mean weight over layers"
    by_size = sorted(weights, key=lambda name: abs(weights[name]), reverse=True)
    print_rows(("adapter", heading), [(name, weights[name]) for name in by_size])


@app.command("eval", epilog="Example: loraweave eval composed examples/data/unseen/pick_color_5.jsonl --json")
def evaluate(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A composition's or an adapter's folder.")],
    rows: Annotated[
        Path, typer.Argument(metavar="JSONL|CSV", exists=True, dir_okay=False, help="Rows with input and target.")
    ],
    base: BaseOption = None,
    split: Annotated[str, typer.Option(help='Of rows with a field "split", those of this one.')] = "test",
    instruction: InstructionOption = None,
    labels: LabelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a composition or an adapter on rows with known answers; a composition brings its own task along."""
    composed = (folder / COMPOSITION_FILE).is_file()
    if composed and (instruction is not None or labels is not None):
        raise typer.BadParameter("a composition has its task's instruction and labels; leave --instruction and --labels out")
    wanted = read_labels(labels)
    read = read_rows(rows, split=split)
    import loraweave as lw

    if composed:
        recorded = recorded_base(folder)
        model, tokenizer = load_model(base or recorded)
        result: Mapping[str, Any] = lw.Composition.from_pretrained(folder, model, tokenizer).evaluate(read.accepted())
    else:
        asked = read.instruction if instruction is None else instruction
        task = lw.Task(read.examples(), instruction=asked, labels=wanted)
        result = _evaluate_adapter(lw.Adapter.from_pretrained(folder), base, task, read.accepted())
    if as_json:
        print_json(result)
        return
    interval = f"{result['low']:.3f} to {result['high']:.3f}"
    print_rows(
        ("score", "95 % interval", "loss", "rows"), [(f"{result['value']:.3f}", interval, result["loss"], result["count"])]
    )


@app.command(epilog="Example: loraweave train antonym.jsonl plural.jsonl --out trained --rank 8 --steps 60")
def train(
    files: Annotated[
        list[Path], typer.Argument(metavar="JSONL|CSV", exists=True, dir_okay=False, help="One file, one task, one adapter.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", file_okay=False, help="Gets a PEFT folder for each file.")],
    base: BaseOption = None,
    instruction: Annotated[
        list[str] | None, typer.Option(help="What a task asks for: once for each file, in order; from the rows by default.")
    ] = None,
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
        typer.Option(min=1, help="Stop after so many evaluations, 10 steps apart, without a lower held-out loss."),
    ] = None,
    seed: SeedOption = 0,
    samples: Annotated[int, typer.Option(min=0, help="Sample inputs kept in each card, which searches read.")] = NUM_SAMPLES,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FOLDER", file_okay=False, help="Where work is kept; OUT/.checkpoint by default.")
    ] = None,
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

    asked = instruction or [rows.instruction for rows in read.values()]
    tasks = {
        name: lw.Task(rows.examples(), instruction=text) for (name, rows), text in zip(read.items(), asked, strict=True)
    }
    model, tokenizer = load_model(base)
    trained = lw.train_adapters(
        model,
        tokenizer,
        tasks,
        rank=rank,
        steps=steps,
        jobs_per_batch=jobs,
        seed=seed,
        lr=lr,
        batch_size=batch_size,
        held_out=held_out,
        patience=patience,
        checkpoint=checkpoint or out / ".checkpoint",
        progress=sys.stderr.isatty(),
    )
    results = []
    for name, adapter in trained.items():
        inputs = [text for text, _ in tasks[name].examples][:samples]
        card = {**adapter.card, "description": tasks[name].instruction, "examples": inputs}
        folder = replace(adapter, card=card).save_pretrained(out / name)
        results.append({"name": name, "rows": len(tasks[name].examples), "rank": adapter.rank, "out": str(folder)})
    if as_json:
        print_json(results)
    else:
        print_rows(("name", "rows", "rank", "folder"), [tuple(result.values()) for result in results])


@app.command(epilog="Example: loraweave export composed --target vllm --max-rank 16 --out composed-vllm")
def export(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A composition's or an adapter's folder.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the PEFT folder goes.")],
    target: Annotated[str, typer.Option(help="What will read it: peft or vllm.")] = "peft",
    max_rank: Annotated[int | None, typer.Option(min=1, help="Cut every layer to this rank; exact by default.")] = None,
    base: BaseOption = None,
    allow_licenses: AllowLicensesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a composition or an adapter as one PEFT folder that peft or a server reads, and tell the server's flags."""
    require_free(out, ADAPTER_FILE)
    import loraweave as lw
    from loraweave.hub.export import require_target

    require_target(target)
    exported: lw.Composition | lw.Adapter
    if (folder / COMPOSITION_FILE).is_file() or not (folder / ADAPTER_FILE).is_file():
        recorded = recorded_base(folder)
        model, tokenizer = load_model(base or recorded)
        exported = lw.Composition.from_pretrained(folder, model, tokenizer)
    else:
        exported = lw.Adapter.from_pretrained(folder)
    report = exported.export(out, target=target, max_rank=max_rank, allow_licenses=allow_licenses)
    if as_json:
        print_json(report.to_json())
        return
    for line in str(report).splitlines():
        typer.echo(one_line(line))


def _evaluate_adapter(adapter: Any, base: str | None, task: Any, pairs: Any) -> dict[str, Any]:
    import loraweave as lw
    from loraweave.composer.model.scoring import evaluate

    model, tokenizer = load_model(base or adapter.base_model or None)
    with lw.Composer(model, [adapter]).activate({adapter.name: 1.0}):
        score = evaluate(model, tokenizer, task, pairs)
    return {"value": score.value, "low": score.low, "high": score.high, "loss": score.loss, "count": score.count}
