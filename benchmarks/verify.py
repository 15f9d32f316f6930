"""Seeded faults that `verify_server` names, and sound probes that it takes for faults, in a real server.

    python -m benchmarks verify                                            our own
    python -m benchmarks verify --engine vllm --python ENV/bin/python      vLLM on CPU, in an environment of its own
    python -m benchmarks verify --engine llama                             llama.cpp (xllamacpp), over its own HTTP

One server has an adapter for every fault of `_faults.py`, beside sound ones; another has sound ones alone. No time is
measured.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import loraweave as lw
from benchmarks._faults import FAULTS, full_adapter, write_faulty, write_sound
from benchmarks._models import base_model
from benchmarks._run import Run, Table, console
from benchmarks._served import llama_cpp, serving, vllm
from loraweave.extensions.verify import verify_server
from loraweave.extensions.verify.verify import BEYOND
from loraweave.hub.base import head_size

app = typer.Typer()

# of 8 ranks each; vLLM's largest is that of two adapters at once
FAULTY, OTHER, OLDER, MAX_RANK = "passive", "negation", "antonym", 16
SOUND = ("past_tense", "plural", "number_words", "uppercase", "synonym", "country_capital")


@app.command()
def main(
    context: typer.Context,
    engine: Annotated[str, typer.Option(help="ours, vllm or llama")] = "ours",
    python: Annotated[str, typer.Option(help="the interpreter of the engine's environment")] = sys.executable,
    gguf: Annotated[Path | None, typer.Option(help="the base for llama.cpp; the embedded one's own file by default")] = None,
    slots: Annotated[int, typer.Option(help="adapters of one of vLLM's batches, while faults are looked for")] = 24,
    sound: Annotated[int, typer.Option(help="sound probes at least")] = 1000,
    only: Annotated[str | None, typer.Option(help="faults, or sound")] = None,
) -> None:
    """Counts of faults named, of sound probes and of false alarms."""
    run: Run = context.obj
    model, tokenizer = base_model()
    table = Table(f"verify_server and {engine}", ("what", "right", "of", "requests"))
    with tempfile.TemporaryDirectory() as root, lw.Hub(Path(root) / "hub") as hub:
        parts = write_all(run, model, Path(root), hub)
        where = str(gguf or "") if engine == "llama" else python
        options = {"model": model, "tokenizer": tokenizer, "progress": False}
        if only != "sound":
            with served(engine, where, {**parts["faults"], **parts["beside"]}, slots, model, tokenizer) as url:
                report = verify_server(url, hub, **options)
            console.print(str(report), markup=False)
            named = {name: right(report, name, said) for name, said in parts["said"].items()}
            table.add("faults named", str(sum(named.values())), str(len(named)), str(report.requests))
            for name in (*parts["beside"], "base"):
                table.add(f"{name}, sound, beside them", *counted(report, name), "")
            console.print(f"not named: {[name for name, is_right in named.items() if not is_right]}", markup=False)
        if only != "faults":
            alarms = probes = requests = 0
            with served(engine, where, parts["sound"], len(parts["sound"]) + 1, model, tokenizer) as url:
                while probes < sound:
                    report = verify_server(url, hub, num_probes=6, **options)
                    alarms += sum(finding.probes for finding in report.faults)
                    probes += sum(finding.probes for finding in report.findings)
                    requests += report.requests
                    console.print(str(report), markup=False)
            table.add("sound probes without alarm", str(probes - alarms), str(probes), str(requests))
    run.show(table)


def write_all(run: Run, model: Any, root: Path, hub: lw.Hub) -> dict[str, Any]:
    """Folders of all adapters, and what has to be said of the faulty; the hub gets all as they should be."""
    folders = {path.name: path for path in run.adapters()}
    sound: dict[str, Path] = {}
    for number, name in enumerate((FAULTY, OTHER, OLDER, *SOUND)):
        adapter = lw.Adapter.from_pretrained(folders[name])
        (root / "sound").mkdir(exist_ok=True)
        sound[name] = write_sound(full_adapter(model, adapter, number), root / "sound" / name)
        if name != OLDER:
            add(hub, sound[name], name, adapter)
    head, last = head_size(model.config), model.config.num_hidden_layers - 1
    assert head is not None
    faults, said = {}, {}
    card = lw.Adapter.from_pretrained(folders[FAULTY])
    for fault in FAULTS:
        faults[fault] = root / "faults" / fault
        faults[fault].parent.mkdir(exist_ok=True)
        said[fault] = write_faulty(fault, sound[FAULTY], sound[OTHER], sound[OLDER], faults[fault], head=head, last=last)
        add(hub, sound[OLDER], fault, card)
        add(hub, sound[FAULTY], fault, card)
    beside = {name: sound[name] for name in (FAULTY, OTHER)}
    del sound[OLDER]
    return {"faults": faults, "said": said, "beside": beside, "sound": sound}


def add(hub: lw.Hub, folder: Path, name: str, card: lw.Adapter) -> None:
    """The folder under that name, with the sample inputs of the example pool's adapter."""
    fields = {"description": card.card["description"], "examples": card.card["examples"]}
    hub.add(folder, name=name, replace=name in hub, **fields)


def right(report: Any, name: str, said: str) -> bool:
    """Whether every finding about a name says that, and nothing else."""
    verdicts = [finding.verdict for finding in report.findings if finding.asked == name]
    plain = all(not verdict.startswith(BEYOND) and " / " not in verdict for verdict in verdicts)
    return bool(verdicts) and plain and all(said in verdict for verdict in verdicts)


def counted(report: Any, name: str) -> tuple[str, str]:
    own = [finding for finding in report.findings if finding.asked == name or (name == "base" and "/" in finding.asked)]
    return str(sum(finding.probes for finding in own if finding.ok)), str(sum(finding.probes for finding in own))


@contextmanager
def served(engine: str, where: str, folders: Mapping[str, Path], slots: int, model: Any, tokenizer: Any) -> Iterator[str]:
    """The URL of a server that has these adapters; `where` is vLLM's interpreter, or llama.cpp's base."""
    with tempfile.TemporaryDirectory() as root:
        if engine == "ours":
            with lw.Hub(Path(root) / "served") as hub:
                for name, folder in folders.items():
                    hub.add(folder, name=name)
                with serving(Path(root) / "served", None) as server:
                    yield server.url
        elif engine == "vllm":
            model.save_pretrained(root)
            tokenizer.save_pretrained(root)
            with vllm(where, Path(root), folders, slots=slots, max_rank=MAX_RANK) as server:
                yield server.url
        elif engine == "llama":
            written = [Path(root) / name / "adapter.gguf" for name in folders]
            for folder, path in zip(folders.values(), written, strict=True):
                lw.Adapter.from_pretrained(folder).export(path.parent, target="gguf")
            with llama_cpp(where, written, cache_mib=0) as server:
                yield server.url
        else:
            raise typer.BadParameter(f"--engine is ours, vllm or llama, not {engine!r}")
