"""`loraweave compose`, `eval`, `export`, `serve` and `hub save-composition`."""

from __future__ import annotations

import atexit
import importlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraweave import registry
from loraweave.cli._application import (
    DEFAULT_HUB,
    AllowLicensesOption,
    BaseOption,
    DtypeOption,
    ExactRankOption,
    HubOption,
    InstructionOption,
    JsonOption,
    LabelsOption,
    OptionOption,
    SeedOption,
    SystemOption,
    WorkersOption,
    answer,
    app,
    composition_row,
    note,
    one_line,
    print_json,
    print_rows,
    print_table,
    show_rows,
)
from loraweave.cli._inputs import (
    ADAPTER_FILE,
    COMPOSITION_FILE,
    STDIN,
    Rows,
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
    require_one_adapter,
)
from loraweave.cli.hub import hub
from loraweave.errors import PackageMissing

if TYPE_CHECKING:
    import loraweave as lw

# how many weights are shown at most, and their least share of the largest
MAX_WEIGHTS, COUNTING_SHARE = 10, 0.05


@app.command(
    epilog="Example: loraweave compose --pool examples/pool --examples examples/data/unseen/pick_color_5.jsonl "
    "--num-examples 5 --out composed"
)
def compose(
    context: typer.Context,
    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="JSONL|CSV|-",
            help='Lines {"input": "...", "target": "..."}; - reads such lines from a pipe, or asks for examples. Without it '
            "the --instruction alone says which adapters of the hub answer.",
        ),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = None,
    hub: HubOption = DEFAULT_HUB,
    pool: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder of adapter folders, used whole, not a hub.")
    ] = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="Use only the first rows; all by default.")] = None,
    split: Annotated[str, typer.Option(help='Of rows with a field "split", those of this one.')] = "train",
    instruction: InstructionOption = None,
    system: SystemOption = None,
    labels: LabelsOption = None,
    method: Annotated[
        str,
        typer.Option(
            help="How to weigh: auto, base, best_single, or one of `names('routers')`: a search (lorahub, gradient, ...), "
            "or a router, which weighs every token by itself (arrow, phatgoose, ...)."
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
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the mixture of stored adapters that solves a task given by a few examples, or by an instruction."""
    if examples is None and not instruction:
        raise typer.BadParameter("give --examples, or an --instruction, or better both")
    # typer's own check takes - for a file
    if examples not in (None, STDIN) and not examples.is_file():
        raise typer.BadParameter(f"--examples: file {str(examples)!r} does not exist")
    fixed = ("model", "tokenizer", "hub_or_pool", "task")
    reserved = (*fixed, "method", "k", "budget", "seed", "weights", "checkpoint", "n_jobs", "progress", "allow_licenses")
    options = read_options(option or (), reserved=reserved)
    if weight:
        options["weights"] = read_named_weights(weight)
    wanted = read_labels(labels)
    if pool is not None and is_given(context, "hub"):
        raise typer.BadParameter("--pool and --hub both name adapters to choose from; leave one out")
    if out is not None:
        require_free(out, COMPOSITION_FILE)
    rows = Rows(()) if examples is None else read_rows(examples, split=split, most=num_examples)
    from loraweave.composer.compose.compose import ComposeCall

    task = rows.task(instruction, system, labels=wanted)
    source = open_hub(hub) if pool is None else read_pool(pool)
    arguments = {"method": method, "k": k, "budget": budget, "seed": seed, "checkpoint": checkpoint, **options}
    arguments["allow_licenses"] = allow_licenses
    call = ComposeCall(source, task, arguments)
    if not prune is tune is rank is None:
        _require_changeable(method, budget)
    note("loading the base model")
    model, tokenizer = load_model(base, dtype)
    composed = call(model, tokenizer, n_jobs=workers)
    if prune is not None and not composed.is_base:
        composed = composed.prune(prune)
    if tune is not None:
        composed = composed.tune(tune)
    if rank is not None and not composed.is_base:
        composed = composed.cut(rank)
    if out is not None:
        composed.save_pretrained(out)
    _show(composed, method, budget, out, as_json)


def _require_changeable(method: str, budget: int) -> None:
    """Raise BadParameter for a method whose result --prune, --tune and --rank cannot change."""
    from loraweave.composer.compose.settings import routes
    from loraweave.composer.compose.ways import TRAINS_FROM

    if routes(method):
        raise typer.BadParameter(f"--prune, --tune and --rank change weights, but {method!r} is a router: leave them out")
    if method == "auto" and budget >= TRAINS_FROM:
        raise typer.BadParameter(
            "--prune, --tune and --rank change one adapter, and auto averages two: pass --method gradient or few_shot"
        )


def _show(composed: lw.Composition, method: str, budget: int, out: Path | None, as_json: bool) -> None:
    if as_json:
        router = None if composed.router is None else method
        told = {"weights": composed.mean_weights, "router": router, "license": composed.license}
        print_json({**told, "report": composed.report.to_json(), "out": out})
        return
    chosen = f"chosen: {composed.report.chosen} ({composed.report.reason})"
    if composed.report.rows:
        print_table(composed.report.table())
        limit = f" (--budget {budget})" if any(row.losses for row in composed.report.rows) else ""
        note(f"made {composed.report.spending}{limit}")
    else:
        note(chosen)
    if composed.router is None:
        by_size = sorted(composed.mean_weights.items(), key=lambda item: -abs(item[1]))
        counting = [item for item in by_size if abs(item[1]) >= COUNTING_SHARE * abs(by_size[0][1])][:MAX_WEIGHTS]
        of_members = "mean weight over layers and members" if composed.members else "mean weight over layers"
        heading = "weight" if composed.by_layer is None and not composed.members else of_members
        print_rows(("adapter", heading), counting)
        if rest := by_size[len(counting) :]:
            note(f"{len(rest)} more adapters have weights of at most {abs(rest[0][1]):.2g}; --json shows all")
    else:
        note(f"router {method!r} weighs every adapter for each token and layer: `loraweave explain` shows what counted")
    if out is not None:
        more = "" if composed.router or composed.steps else ", `loraweave export` makes a PEFT folder of it"
        if composed.members:
            more = ", `loraweave export` makes a PEFT folder of each member"
        note(f"saved to {out}, license: {composed.license or 'unknown'}; `loraweave eval {out} FILE.jsonl` scores it{more}")


@app.command("eval", epilog="Example: loraweave eval composed examples/data/unseen/pick_color_5.jsonl --json")
def evaluate(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A composition's or an adapter's folder.")],
    rows: Annotated[
        Path | None, typer.Argument(metavar="JSONL|CSV", exists=True, dir_okay=False, help="Rows with input and target.")
    ] = None,
    harness: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Instead of rows, a task of lm_eval; may be repeated.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder with tasks for --harness, as YAML.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many documents of a task of --harness count.")] = None,
    base: BaseOption = None,
    dtype: DtypeOption = None,
    split: Annotated[str, typer.Option(help='Of rows with a field "split", those of this one.')] = "test",
    instruction: InstructionOption = None,
    system: SystemOption = None,
    labels: LabelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a composition or an adapter on rows with known answers; a composition brings its own task along."""
    composed = (folder / COMPOSITION_FILE).is_file()
    if composed and not instruction is system is labels is None:
        raise typer.BadParameter(
            "a composition has its task's instruction, system and labels; leave --instruction, --system and --labels out"
        )
    if (rows is None) == (harness is None):
        raise typer.BadParameter("give either a file of rows, or --harness TASK")
    asks_harness = next(iter(registry.brought("harness").values()), None)
    if harness is not None and asks_harness is None:
        raise typer.BadParameter("--harness: none of the extensions that are installed asks lm_eval's tasks")
    wanted = read_labels(labels)
    read = None if rows is None else read_rows(rows, split=split)
    import loraweave as lw

    adapter = None if composed else lw.Adapter.from_pretrained(folder)
    task = None if read is None or composed else read.task(instruction, system, labels=wanted)
    recorded = recorded_base(folder) if adapter is None else adapter.base_model
    model, tokenizer = load_model(base or recorded or None, dtype)
    what = lw.Composition.from_pretrained(folder, model, tokenizer) if adapter is None else adapter
    if read is None:
        ask: Any = importlib.import_module(str(asks_harness)).evaluate_harness
        report = ask(what, harness, model=model, tokenizer=tokenizer, include_path=include_path, limit=limit)
        heads = ("task", "metric", "value", "95 % interval", "standard error")
        show_rows(as_json, dict(report["results"]), heads, _harness_rows(report))
        return
    if isinstance(what, lw.Composition):
        result: Mapping[str, Any] = what.evaluate(read.accepted())
    else:
        from loraweave.composer.model.scoring import evaluate

        assert task is not None
        with lw.Composer(model, [what]).activate({what.name: 1.0}):
            score = evaluate(model, tokenizer, task, read.accepted())
        result = {name: getattr(score, name) for name in ("value", "low", "high", "loss", "count")}
    row = (f"{result['value']:.3f}", f"{result['low']:.3f} to {result['high']:.3f}", result["loss"], result["count"])
    show_rows(as_json, result, ("score", "95 % interval", "loss", "rows"), [row])


def _harness_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, Any]]:
    """Return (task, metric, value, interval, standard error) of lm_eval's results; only shares of answers have intervals."""
    from loraweave.retrieval.fusion import wilson

    rows = []
    for name, figures in report["results"].items():
        count = report.get("n-samples", {}).get(name, {}).get("effective", 0)
        for metric, value in figures.items():
            if not isinstance(value, float) or "_stderr," in metric:
                continue
            # lm_eval joins a metric and its filter by a comma, and has the standard error as one more metric
            error, interval = figures.get(metric.replace(",", "_stderr,", 1)), "-"
            # items are each right or wrong where their mean alone explains the error
            if count and isinstance(error, float) and abs(error**2 * (count - 1) - value * (1 - value)) < 1e-6:
                interval = "{:.3f} to {:.3f}".format(*wilson(value, count))
            rows.append((name, metric.partition(",")[0], f"{value:.4f}", interval, error))
    return rows


@app.command(epilog="Example: loraweave export composed --target peft --max-rank 16 --out smaller")
def export(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A composition's or an adapter's folder.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the folder goes.")],
    target: Annotated[str, typer.Option(help=f"What will read it: {', '.join(registry.names('targets'))}.")] = "peft",
    max_rank: ExactRankOption = None,
    base: BaseOption = None,
    allow_licenses: AllowLicensesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a composition or an adapter as a folder for another program, and tell how that is started."""
    import loraweave as lw
    from loraweave.composer.compose.report import SavedRecipe
    from loraweave.hub.adapter import exporting

    file = exporting(target).require_target(target).file
    options: dict[str, Any] = {"target": target, "max_rank": max_rank, "allow_licenses": allow_licenses}
    if (folder / COMPOSITION_FILE).is_file() or not (folder / ADAPTER_FILE).is_file():
        recipe = SavedRecipe.read(folder)
        averages = recipe.parts == "members"
        parts = (*(f"member-{number}" for number, _ in enumerate(recipe.part_names)), "merged")
        for place in [out / part for part in parts] if averages else [out]:
            require_free(place, ADAPTER_FILE, file)
        if not averages:
            limit = [] if max_rank is None else ["--max-rank", str(max_rank)]
            require_one_adapter(folder, "export", "--target", target, *limit, "--out", str(out))
        composed = lw.Composition.from_pretrained(folder, *load_model(base or recipe.base_model or None))
        if averages:
            reports, notes = exporting(target, "averages").export_members(composed, folder, out, **options)
        else:
            reports, notes = {"": composed.export(out, **options)}, []
    else:
        require_free(out, ADAPTER_FILE, file)
        reports, notes = {"": lw.Adapter.from_pretrained(folder).export(out, base=base, **options)}, []
    if as_json:
        told = {name: report.to_json() for name, report in reports.items()}
        print_json(told.get("", told))
    for line in [] if as_json else [line for report in reports.values() for line in str(report).splitlines()]:
        typer.echo(one_line(line))
    for text in notes:
        note(text)


@app.command(epilog='Example: loraweave serve --hub adapters   (a client then asks for model "1.1*passive + 0.9*negation")')
def serve(
    hub: HubOption = DEFAULT_HUB,
    base: BaseOption = None,
    dtype: DtypeOption = None,
    host: Annotated[str, typer.Option(help="Where to listen; other machines need --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORAWEAVE_API_KEY", help="What clients must send as their bearer token.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(dir_okay=False, help="JSON file of several keys, each with its name and limits.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda; by default where loaded.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers that run in one batch.")] = 8,
    cache_tokens: Annotated[int, typer.Option(min=1, help="Keys and values that the batch keeps at most.")] = 32_768,
    prefix_bytes: Annotated[int, typer.Option(min=0, help="Bytes of prompts that are not read twice.")] = 1 << 28,
    waiting: Annotated[int, typer.Option(min=1, help="Answers that wait; more are refused with 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of one answer at most.")] = 1024,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600.0,
    token_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds that a token of a running answer may take; more answers wait.")
    ] = None,
    memory_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes for caches, adapters and merges; by default 3/4 of what is free.")
    ] = None,
    prompt_characters: Annotated[
        int | None, typer.Option(min=1, help="Characters of one prompt; 16 for each token of the context by default.")
    ] = None,
    connections: Annotated[int, typer.Option(min=1, help="Connections at once.")] = 512,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that answers may go on once the server is to stop.")] = 10.0,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="How the log's lines, one for each request among them, are written.")
    ] = "text",
    adapters: Annotated[int, typer.Option(min=1, help="Adapters of one formula at most.")] = 16,
    loaded: Annotated[int, typer.Option(min=1, help="Adapters, and formulas with theirs, that stay in memory unused.")] = 64,
    merges: Annotated[bool, typer.Option(help="Whether formulas may have merges by a method, such as ties(a, b).")] = True,
    batch_invariant: Annotated[bool, typer.Option("--batch-invariant", help="Equal bits in any batch; slower.")] = False,
) -> None:
    """Serve every formula over a hub to OpenAI clients, requests with different mixtures in one batch."""
    try:
        import uvicorn  # noqa: F401

        from loraweave.serving.app import make_server
        from loraweave.serving.limits import Limits
    except ModuleNotFoundError as error:
        raise PackageMissing(f"serving needs more packages ({error}): pip install 'loraweave[serve]'") from error

    limits = Limits(
        rows=rows,
        cache_tokens=cache_tokens,
        prefix_bytes=prefix_bytes,
        waiting=waiting,
        new_tokens=max_tokens,
        seconds=deadline,
        token_seconds=float("inf") if token_seconds is None else token_seconds,
        memory_bytes=memory_bytes or 0,
        prompt_characters=prompt_characters or 0,
        connections=connections,
        grace=grace,
        adapters=adapters,
        loaded=loaded,
        merges=merges,
        batch_invariant=batch_invariant,
    )
    with open_hub(hub) as opened:
        model, tokenizer = load_model(base, dtype)
        if device is not None:
            model.to(device)
        # an empty variable, which is no option's value, is refused like an empty key
        api_key = os.environ.get("LORAWEAVE_API_KEY") if api_key is None else api_key
        settings: dict[str, Any] = {"host": host, "port": port, "limits": limits, "api_key": api_key, "key_file": key_file}
        make_server(opened, model, tokenizer, log_format=log_format, **settings).run()
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("loraweave-")]
    for thread in workers:
        thread.join(timeout=1)
    if any(thread.is_alive() for thread in workers):
        # Python would wait for a merge that has begun
        atexit._run_exitfuncs()
        os._exit(0)


@hub.command("save-composition", epilog='Example: loraweave hub save-composition careful "0.7*antonym - 0.3*negation"')
def save_composition(
    name: Annotated[str, typer.Argument(help="Its name; a formula says @NAME.")],
    composition: Annotated[
        str, typer.Argument(metavar="FOLDER|FORMULA", help="A folder of compose --out or of a router, or a formula.")
    ],
    replace: Annotated[bool, typer.Option("--replace", help="In place of another composition of that name.")] = False,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Keep a composition with its report, a router with its adapters, or a formula, whose adapters the hub must have."""
    import loraweave as lw
    from loraweave.hub.compositions import SavesFolder
    from loraweave.routers.tokens._saved import is_saved_router

    with open_hub(hub) as opened:
        kept: Path | SavesFolder = Path(composition)
        if (Path(composition) / COMPOSITION_FILE).is_file():
            from loraweave.composer.compose.report import SavedRecipe

            # a damaged folder is told now, not by who reads it
            SavedRecipe.read(composition)
        elif is_saved_router(Path(composition)):
            kept = lw.router(Path(composition))
        else:
            kept = lw.parse(composition)
            kept.adapters(opened)
        stored = opened.save_composition(name, kept, replace=replace)
    told = f"saved {stored.name!r}; formulas and `loraweave merge` know it as @{stored.name}"
    answer(as_json, composition_row(stored), told)
