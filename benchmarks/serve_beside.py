"""What formulas cost a server beside its own base: ours, a stock vLLM and llama.cpp, eight answers at once.

    LORAWEAVE_ENGINE_VLLM=/path/to/python python -m benchmarks serve_beside [--engines ours,vllm,llama] [--gguf base.gguf]

Each engine is a server in a process of its own with one thread, asked over HTTP for eight answers of equal length at once:
all of the base, each of another adapter, each of another mixture of four. Its processor time, that of its children among
it, is divided by that of its base in the same round; the engines take turns within a round, and every prompt is new.
vLLM has no mixtures. llama.cpp gets the strengths of its loaded adapters with each request, and reads the GGUF that the
base's package ships, which is quantised, unless --gguf names another.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

import loraweave as lw
from benchmarks._models import base_model
from benchmarks._run import Run, Table, console
from benchmarks._served import Served, llama_cpp, serving, vllm
from benchmarks._timing import Gate, ratios, require

app = typer.Typer()

ROWS, NUM_TOKENS, NUM_WORDS, NUM_MIXED = 8, 24, 12, 4
BASE = "base"
WAYS = {"adapters": "eight adapters", "mixtures": "eight mixtures of four"}

# {adapter: weight} of one row
Mixture = Mapping[str, float]


@dataclass(frozen=True)
class Engine:
    """A server, how a request under a mixture is written, and whether it may be of several adapters."""

    served: Served
    asks: Callable[[Mixture], dict[str, Any]]
    mixes: bool = True

    def ask(self, threads: ThreadPoolExecutor, mixtures: list[Mixture], prompts: list[str]) -> tuple[float, list[str]]:
        """Processor time of one answer under each mixture, asked at once, and their texts. RuntimeError for a refusal."""
        fixed = {"max_tokens": NUM_TOKENS, "temperature": 0}
        bodies = [{"prompt": prompt, **fixed, **self.asks(each)} for each, prompt in zip(mixtures, prompts, strict=True)]
        before = self.served.cpu_seconds()
        answers = list(threads.map(lambda body: self.served.post("/v1/completions", body), bodies))
        seconds = self.served.cpu_seconds() - before
        for status, body in answers:
            if status != 200 or body["usage"]["completion_tokens"] != NUM_TOKENS:
                raise RuntimeError(f"{status}: {str(body)[:500]}")
        return seconds, [body["choices"][0]["text"] for _, body in answers]


@app.command()
def main(
    context: typer.Context,
    engines: Annotated[str, typer.Option(help="those to ask, of ours, vllm and llama")] = "ours,vllm,llama",
    gguf: Annotated[Path | None, typer.Option(help="llama.cpp's base model")] = None,
) -> None:
    """Processor time of servers under eight adapters and eight mixtures, each beside its own base."""
    run: Run = context.obj
    generator = random.Random(run.seed)
    names = [path.name for path in run.adapters()][:ROWS]
    drawn = [sorted(generator.sample(names, NUM_MIXED)) for _ in names]
    mixtures: list[Mixture] = [{name: round(generator.uniform(0.1, 0.6), 2) for name in each} for each in drawn]
    rows: dict[str, list[Mixture]] = {"base": [{}] * ROWS, "adapters": [{name: 1.0} for name in names], "mixtures": mixtures}
    inputs = [str(row["input"]) for task in run.entries() for row in run.rows(task) if "input" in row]
    words = " ".join(inputs).split()
    taken: dict[str, dict[str, list[float]]] = {engine: {way: [] for way in rows} for engine in engines.split(",")}
    busy, rounds = [], run.rounds or 12

    def prompts() -> list[str]:
        return [f"Input: {' '.join(generator.choices(words, k=NUM_WORDS))}\nOutput:" for _ in range(ROWS)]

    with ThreadPoolExecutor(ROWS) as threads, running(run, names, list(taken), gguf) as servers:
        for name, server in servers.items():
            same = prompts()
            told = [server.ask(threads, rows[way], same)[1] for way in rows if server.mixes or way != "mixtures"]
            for way, texts in zip(WAYS, told[1:], strict=False):
                differing = sum(text != other for text, other in zip(texts, told[0], strict=True))
                require([Gate(f"{name}, {WAYS[way]}: answers equal to the base's, of {ROWS}", ROWS - differing, ROWS / 2)])
        for number in track(range(rounds), "rounds", console=console, disable=not console.is_terminal):
            busy.append(os.getloadavg()[0])
            for name in turned(list(servers), number):
                for way in turned([way for way in rows if servers[name].mixes or way != "mixtures"], number):
                    taken[name][way].append(servers[name].ask(threads, rows[way], prompts())[0])
    load = f"load {min(busy):.1f} to {max(busy):.1f}"
    title = f"{ROWS} answers of {NUM_TOKENS} tokens at once, {rounds} rounds, processor time of one thread, {load}"
    table = Table(title, ("engine", "seconds for the base", *(cell for way in WAYS for cell in (WAYS[way], "25-75 %"))))
    for name, of_ways in taken.items():
        measured = {way: seconds for way, seconds in of_ways.items() if seconds}
        found = {ratio.name: ratio for ratio in ratios(measured, reference="base")}
        cells = [cell for way in WAYS for cell in shown(found.get(way))]
        table.add(name, f"{statistics.median(of_ways['base']):.2f}", *cells)
    run.show(table)


def turned(names: list[str], number: int) -> list[str]:
    first = number % len(names)
    return names[first:] + names[:first]


def shown(ratio: Any) -> tuple[str, str]:
    return ("none", "") if ratio is None else (f"{ratio.median:.2f}", f"{ratio.low:.2f}-{ratio.high:.2f}")


@contextmanager
def running(run: Run, names: list[str], engines: list[str], gguf: Path | None) -> Iterator[dict[str, Engine]]:
    """The engines by name, over a base whose answers do not end before their length."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, tokenizer = base_model()
        # of a token that is never chosen
        model.generation_config.eos_token_id = model.config.vocab_size - 1
        model.save_pretrained(root / "base")
        tokenizer.save_pretrained(root / "base")
        folders = {name: run.pool / name for name in names}
        found = {}
        for engine in engines:
            if engine == "ours":
                hub = stack.enter_context(run.hub(without=[path.name for path in run.adapters() if path.name not in names]))
                served = stack.enter_context(serving(Path(str(hub.path)), root / "base"))
                found[engine] = Engine(served, ours)
            elif engine == "vllm":
                python = os.environ.get("LORAWEAVE_ENGINE_VLLM")
                if not python:
                    raise typer.BadParameter(
                        "name a Python with vLLM in $LORAWEAVE_ENGINE_VLLM, or leave it out of --engines"
                    )
                served = stack.enter_context(vllm(python, root / "base", folders, slots=ROWS, max_rank=8))
                found[engine] = Engine(served, in_vllm, mixes=False)
            elif engine == "llama":
                written = [root / "gguf" / name / "adapter.gguf" for name in names]
                for folder, path in zip(folders.values(), written, strict=True):
                    lw.Adapter.from_pretrained(folder).export(path.parent, target="gguf")
                served = stack.enter_context(llama_cpp(str(gguf or ""), written))
                found[engine] = Engine(served, in_llama_cpp(names))
            else:
                raise typer.BadParameter(f"--engines are ours, vllm and llama, not {engine!r}")
        yield found


def ours(mixture: Mixture) -> dict[str, Any]:
    return {"model": " + ".join(f"{weight}*{name}" for name, weight in mixture.items()) or BASE}


def in_vllm(mixture: Mixture) -> dict[str, Any]:
    """vLLM has an adapter for each row, as it is, or none."""
    return {"model": next(iter(mixture), "org/base"), "ignore_eos": True}


def in_llama_cpp(names: list[str]) -> Callable[[Mixture], dict[str, Any]]:
    def asks(mixture: Mixture) -> dict[str, Any]:
        scales = [{"id": number, "scale": mixture.get(name, 0.0)} for number, name in enumerate(names)]
        return {"model": BASE, "lora": scales, "ignore_eos": True}

    return asks
