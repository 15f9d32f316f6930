"""`loraweave hub`: adapters on disk, under names. Only add, search, verify and bind need torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

import loraweave.registry as registry
from loraweave.cli._application import (
    DEFAULT_HUB,
    AnomaliesOption,
    BaseOption,
    BlobsOption,
    HubOption,
    JsonOption,
    ManyTagsOption,
    WorkersOption,
    answer,
    app,
    composition_row,
    note,
    plain,
    print_json,
    print_rows,
    record_row,
    show_rows,
)
from loraweave.cli._inputs import load_model, open_hub
from loraweave.common.rows import read_rows
from loraweave.errors import HubCorrupt
from loraweave.hub.compositions import StoredComposition

# the most characters of a field that `show` prints
MAX_CELL = 400
# the number of sample inputs that `show` prints without --all
NUM_EXAMPLES = 3
NamesArgument = Annotated[list[str], typer.Argument(metavar="NAME", help="Adapters of the hub.")]
NameArgument = Annotated[str, typer.Argument(help="An adapter of the hub.")]

hub = typer.Typer(help="Keep adapters under names, list them and search them.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(hub, name="hub")


@hub.command(epilog="Example: loraweave hub add examples/pool/* --tag pool")
def add(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE", help="Folders, LoRA files, zips, tars, or owner/name on the model hub.")
    ],
    name: Annotated[str | None, typer.Option(help="The name to store it under; the adapter's own by default.")] = None,
    description: Annotated[str, typer.Option(help="What the adapter does; searches read it.")] = "",
    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="JSONL|CSV",
            exists=True,
            dir_okay=False,
            help='Sample inputs, {"input": ..., "target": ...} a line; searched too.',
        ),
    ] = None,
    tag: ManyTagsOption = None,
    license: Annotated[str | None, typer.Option(help="SPDX expression, for instance Apache-2.0.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="A language code; may be given several times.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make it the next version where the name stands for another adapter.")
    ] = False,
    base_model: Annotated[str | None, typer.Option(help="The base model, where the adapter does not say it.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights that are only in a .bin, by torch's safe loader.")
    ] = False,
    anomalies: AnomaliesOption = "report",
    hub: HubOption = DEFAULT_HUB,
    blobs: BlobsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store adapters; makes the hub if there is none. What is not given comes from the adapter's card."""
    if len(sources) > 1 and (name or description or examples):
        raise typer.BadParameter("--name, --description and --examples belong to one adapter; add the adapters one by one")
    samples = [] if examples is None else _samples(examples)
    settings: dict[str, Any] = {"name": name, "description": description, "examples": samples, "tags": tag or ()}
    settings |= {"license": license, "base_model": base_model, "language": language or (), "replace": replace}
    settings |= {"allow_pickle": allow_pickle, "anomalies": anomalies}
    import loraweave as lw

    stored: list[dict[str, Any]] = []
    with lw.Hub(hub, blobs=blobs) as opened:
        for source in sources:
            record = opened.add(source, **settings)
            if isinstance(record, StoredComposition):
                stored.append(composition_row(record))
                note(
                    f"kept the mixture {record.name!r} with its adapters; formulas and the server know it as @{record.name}"
                )
                continue
            stored.append(record_row(record))
            base = record.base_model or "a base that it does not name"
            version = f" as version {record.version}" if record.version > 1 else ""
            note(f"added {record.name!r}{version}, rank {record.rank}, for {base}")
            for anomaly in record.anomalies:
                note(f"{record.name!r}: {anomaly.kind}: {anomaly.detail}")
            if record.quarantined:
                note(f"{record.name!r} is in quarantine; `loraweave hub release` takes it out")
    if as_json:
        print_json(stored)


@hub.command("list", epilog="Example: loraweave hub list --tag pool --json")
def list_(
    base_model: Annotated[str | None, typer.Option(help="Only adapters of this base model.")] = None,
    license: Annotated[list[str] | None, typer.Option(help="A license that you accept; may be given several times.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only with this tag; all of them when given several times.")] = None,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """List the adapters of a hub in order of addition."""
    with open_hub(hub) as opened:
        records = opened.records(base_model=base_model, license=license or None, tags=tag or ())
    rows = [(r.name, r.rank, r.base_model, r.license or "", ", ".join(r.tags), _kilobytes(r.size_bytes)) for r in records]
    show_rows(as_json, list(map(record_row, records)), ("name", "rank", "base model", "license", "tags", "kB"), rows)


@hub.command(epilog='Example: loraweave hub search "is this review positive?" --k 3')
def search(
    query: Annotated[str, typer.Argument(help="A description of the task, or one of its inputs.")],
    k: Annotated[int, typer.Option(min=1, help="How many to show at most.")] = 5,
    base_model: Annotated[str | None, typer.Option(help="Only adapters of this base model.")] = None,
    license: Annotated[list[str] | None, typer.Option(help="Only under this license; may be given several times.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only with this tag; all of them when given several times.")] = None,
    min_score: Annotated[float | None, typer.Option(min=-1, max=1, help="Leave out what fits worse than this.")] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="An encoder of hub train-encoder, or the name of an embedder.")
    ] = None,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Find the adapters that fit a text, with the reason for each."""
    import loraweave as lw

    with open_hub(hub) as opened:
        # the query may be a description, which the index compares with descriptions too
        candidates = lw.Retriever(opened, embedder=encoder or "sentence", keys=()).candidates(
            query, k=k, base_model=base_model, license=license or None, tags=tag or (), min_score=min_score
        )
    if not candidates and not as_json:
        note("nothing fits: the base model is the answer")
    value = [{**record_row(c.record), "score": c.score, "evidence": c.evidence} for c in candidates]
    show_rows(as_json, value, ("name", "score", "evidence"), [(c.name, c.score, c.evidence) for c in candidates])


@hub.command(epilog="Example: loraweave hub show antonym --json")
def show(
    name: NameArgument,
    everything: Annotated[bool, typer.Option("--all", help="Also the card, all inputs, versions and hashes.")] = False,
    hub: HubOption = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Show what one adapter does and what it is for."""
    with open_hub(hub) as opened:
        *older, record = opened.history(name)
    anomalies = [vars(anomaly) for anomaly in record.anomalies]
    state = {"anomalies": plain(anomalies), "quarantined": record.quarantined}
    fields = {**record_row(record), **state, "examples": plain(record.examples), "card": plain(record.card)}
    fields["versions"] = [{"version": r.version, "created": r.created, "hash": r.hash} for r in (*older, record)]
    if as_json:
        fields["fingerprint"] = record.fingerprint.to_json() if record.fingerprint else None
        print_json(fields)
        return
    if not everything:
        inputs = [repr(str(example)) for example in record.examples[:NUM_EXAMPLES]]
        more = [f"and {len(record.examples) - NUM_EXAMPLES} more"] if len(record.examples) > NUM_EXAMPLES else []
        wrong = [f"{it.kind}: {it.detail}" for it in record.anomalies] + ["in quarantine"] * record.quarantined
        listed = {"tags": record.tags, "target modules": record.target_modules, "sample inputs": (*inputs, *more)}
        texts: dict[str, Any] = {"name": record.name, "description": record.description, "base model": record.base_model}
        texts |= {"rank": record.rank, "license": record.license, "kB": _kilobytes(record.size_bytes)}
        texts |= {"version": f"{record.version}, of {record.created}", "source": record.source and record.source.location}
        texts |= {what: ", ".join(parts) for what, parts in listed.items()} | {"looks wrong": "; ".join(wrong)}
        print_rows(("field", "value"), [(what, _brief(str(text))) for what, text in texts.items() if text])
        note(f"`loraweave hub show {shlex.quote(name)} --all` has the card, hashes and versions too")
        return
    if record.fingerprint:
        # the samples are for comparing, not for reading
        fields["fingerprint"] = f"shapes {record.fingerprint.shapes}, {len(record.fingerprint.samples)} sampled weights"
    shown = {key: value if isinstance(value, str | int) else json.dumps(value) for key, value in fields.items() if value}
    # as text: a rank among texts is no column of numbers
    print_rows(("field", "value"), [(key, _brief(str(value))) for key, value in shown.items()])


def _brief(text: str) -> str:
    """Shorten a text to fit a table; a card can have a megabyte."""
    return text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]} ... ({len(text)} characters; --json has all)"


@hub.command(epilog="Example: loraweave hub remove antonym")
def remove(names: NamesArgument, hub: HubOption = DEFAULT_HUB) -> None:
    """Take adapters out of the catalogue; `gc` then frees their files."""
    with open_hub(hub) as opened:
        # all or none: a misspelt name is told before anything goes
        for name in names:
            opened.record(name)
        for name in dict.fromkeys(names):
            opened.remove(name)
            note(f"removed {name!r}; `loraweave hub gc` frees its files")


@hub.command(epilog="Example: loraweave hub verify --hub adapters")
def verify(
    hub: HubOption = DEFAULT_HUB,
    signed_by: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A public key, a PEM file or hexadecimal, that must have signed; may be repeated."),
    ] = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every row and every file; exit status 1 when something is damaged, or not signed as it has to be."""
    with open_hub(hub) as opened:
        also = registry.get("checks", "signed_by")(signed_by) if signed_by else None
        report = opened.verify(also=also, n_jobs=workers)
    if as_json:
        print_json({"ok": report.ok, "problems": report.problems, "intact": report.intact, "orphans": report.orphans})
    else:
        if report.problems:
            print_rows(("problem",), [(problem,) for problem in report.problems])
        note(f"{len(report.intact)} adapters are whole; {len(report.orphans)} files belong to none (hub gc deletes them)")
    if not report.ok:
        raise HubCorrupt(
            f"the hub {hub} has {len(report.problems)} problems; add the adapters again from a source you trust"
        )


@hub.command(epilog="Example: loraweave hub gc --hub adapters")
def gc(hub: HubOption = DEFAULT_HUB, as_json: JsonOption = False) -> None:
    """Delete the files that no adapter of the catalogue needs."""
    with open_hub(hub) as opened:
        freed_bytes = opened.gc()
    answer(as_json, {"freed_bytes": freed_bytes}, f"freed {_kilobytes(freed_bytes)} kB")


@hub.command(epilog="Example: loraweave hub bind antonym --base path/to/model")
def bind(names: NamesArgument, base: BaseOption = None, hub: HubOption = DEFAULT_HUB, as_json: JsonOption = False) -> None:
    """Check adapters against their base model and store its revision and fingerprint with them."""
    with open_hub(hub) as opened:
        # a misspelt name is told before a model is loaded
        for name in names:
            opened.record(name)
        model, _ = load_model(base)
        records = [opened.bind(name, model) for name in dict.fromkeys(names)]
    told = (f"{record.name!r} fits {record.base_model!r}, whose fingerprint it has now" for record in records)
    answer(as_json, [record_row(record) for record in records], *told)


def _samples(path: Path) -> list[str] | list[tuple[str, str]]:
    """Read a file of rows; return (input, first target) of each row if all have targets, else the inputs alone."""
    read = read_rows(path, targets="any", one_split=False)
    if all(row.targets for row in read):
        return [(row.input, row.targets[0]) for row in read]
    return [row.input for row in read]


def _kilobytes(size_bytes: int) -> int:
    return -(-size_bytes // 1000)
