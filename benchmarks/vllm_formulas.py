"""A stock vLLM asked for many formulas: is every answer the stated one, and what does a new formula cost?

    LORAWEAVE_ENGINE_VLLM=/path/to/python python -m benchmarks vllm-formulas [--mixtures 40] [--clients 4] [--slots 8]

That Python has vLLM and loraweave; the server that it starts has room for `slots` adapters and, on disk, for as many
folders. The clients ask at once: for formulas that nobody asked for before, one for a formula of before, one for the
base. The first token's log-probabilities, of the 20 tokens that vLLM names, are compared with those of the live mixture:
more than 1e-3 apart is wrong. (Both are fp32, and some mixtures amplify rounding: for one of them the live answer was
8e-5 from float64's, and vLLM's 2.5e-4.) Then, by turns, a new formula and vLLM's own dynamic load of a folder that lies
there are timed to their first token, in seconds of wall-clock time on a server with nothing else to do. `--url` takes a
server that runs already, over a hub with the adapters of --pool.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import loraweave as lw
from benchmarks import _served
from benchmarks._models import base_model
from benchmarks._run import Run, Table

app = typer.Typer()

BASE = "base-model"
PROMPT = "Input: The judge thanked the doctor.\nOutput:"
NUM_LOGPROBS = 20
LIMIT, WRONG = 1e-4, 1e-3
RANK = 32
# the largest folder that three adapters of rank 8 become
FOLDER_BYTES = 5_700_000


@app.command()
def main(
    context: typer.Context,
    mixtures: Annotated[int, typer.Option(help="distinct formulas")] = 40,
    clients: Annotated[int, typer.Option(help="that ask at the same time, one of them for the base")] = 4,
    slots: Annotated[int, typer.Option(help="adapters that the server has room for")] = 8,
    loads: Annotated[int, typer.Option(help="new formulas and dynamic loads to time")] = 10,
    url: Annotated[str, typer.Option(help="of a server that runs, whose base is called base-model")] = "",
) -> None:
    """Answers of vLLM under formulas beside the live mixtures, and the first request of a new one beside a dynamic load."""
    run: Run = context.obj
    model, tokenizer = base_model()
    generator = random.Random(run.seed)
    with run.hub() as hub:
        names = [record.name for record in hub.records()]
        asked = list(dict.fromkeys(draw(generator, names) for _ in range(2 * (mixtures + loads))))[: mixtures + loads]
        engine = lw.Composer(model, hub.pool(names), tokenizer=tokenizer)
        with running(url, hub, model, tokenizer, slots) as server:
            found = compare(server, engine, generator, asked[:mixtures], clients)
            new, plain = timed(server, hub, asked[mixtures:]) if loads else ([], [])
    table = Table(f"{mixtures} distinct formulas, {clients} clients, room for {slots}, seed {run.seed}", ("what", "found"))
    table.add("answers under formulas, and of the base beside them", f"{len(found.formulas)}, {len(found.bases)}")
    table.add("wrong", str(found.wrong))
    table.add("largest difference of a log-probability from the live one", f"{max(found.formulas):.1e}")
    table.add("and of the base", f"{max(found.bases):.1e}")
    table.add("answers under formulas above 1e-4", str(sum(each > LIMIT for each in found.formulas)))
    table.add("smallest difference from a live answer of another", f"{found.from_others:.1e}")
    if loads:
        table.add("first answer of a new formula, median seconds", f"{statistics.median(new):.2f}")
        table.add("first answer after a dynamic load", f"{statistics.median(plain):.2f}")
        table.add("ratio of both", f"{statistics.median(new) / statistics.median(plain):.2f}")
    run.show(table)
    if found.wrong:
        raise typer.Exit(1)


def draw(generator: random.Random, names: list[str]) -> str:
    """A sum of one to three adapters, whose ranks fit the server."""
    chosen = generator.sample(names, generator.choice([1, 2, 2, 3]))
    terms = [(round(generator.uniform(-0.3, 1.0), 2) or 0.5, name) for name in chosen]
    return " ".join(f"{'-' if weight < 0 else '+'} {abs(weight)}*{name}" for weight, name in terms).removeprefix("+ ")


@dataclass
class Found:
    """Differences of log-probabilities from the live ones: the largest of each answer, and from answers of others."""

    formulas: list[float] = field(default_factory=list)
    bases: list[float] = field(default_factory=list)
    from_others: float = float("inf")

    @property
    def wrong(self) -> int:
        return sum(not each <= WRONG for each in (*self.formulas, *self.bases))


def compare(server: str, engine: Any, generator: random.Random, asked: list[str], clients: int) -> Found:
    """What every answer differs by."""
    found = Found()
    with ThreadPoolExecutor(clients) as threads:
        for start in range(0, len(asked), clients - 2):
            wave = asked[start : start + clients - 2]
            together = [*wave, generator.choice(asked[: start + 1]), BASE]
            generator.shuffle(together)
            served = list(threads.map(lambda name: logprobs(server, name), together))
            live = live_logprobs(engine, together)
            for name, answer in zip(together, served, strict=True):
                for other, own_V in zip(together, live, strict=True):
                    difference = max(abs(own_V[token].item() - value) for token, value in answer.items())
                    if other != name:
                        found.from_others = min(found.from_others, difference)
                    elif name == BASE:
                        found.bases.append(difference)
                    else:
                        found.formulas.append(difference)
            if start % 100 < clients - 2:
                print(f"{start + len(wave)} formulas, largest difference {max(found.formulas):.1e}", flush=True)
    return found


@torch.no_grad()
def live_logprobs(engine: Any, names: list[str]) -> torch.Tensor:
    """[rows, vocabulary] of the first token, each row under its formula."""
    inputs = engine.tokenizer([PROMPT] * len(names), return_tensors="pt")
    rows = [{} if name == BASE else lw.parse(name).mixture() for name in names]
    with engine.activate(rows):
        return engine.model(**inputs).logits[:, -1].log_softmax(-1)


def timed(server: str, hub: lw.Hub, asked: list[str]) -> tuple[list[float], list[float]]:
    """Seconds to the first answer of new formulas, and of folders that vLLM loads by its own call; by turns."""
    new, plain = [], []
    with tempfile.TemporaryDirectory() as root:
        for number, name in enumerate(asked):
            before = time.perf_counter()
            logprobs(server, name)
            new.append(time.perf_counter() - before)
            folder = Path(root) / str(number)
            lw.parse(f"0.5*({name})").merge(hub, progress=False).export(folder, target="vllm", max_rank=RANK)
            before = time.perf_counter()
            post(f"{server}/v1/load_lora_adapter", {"lora_name": f"plain-{number}", "lora_path": str(folder)})
            logprobs(server, f"plain-{number}")
            plain.append(time.perf_counter() - before)
            # the server frees its slot only when others take it
            post(f"{server}/v1/unload_lora_adapter", {"lora_name": f"plain-{number}"})
    return new, plain


def logprobs(server: str, name: str, number: int = NUM_LOGPROBS) -> dict[int, float]:
    """{token: log-probability} of the `number` most likely first tokens."""
    fields = {"max_tokens": 1, "temperature": 0, "logprobs": number, "return_tokens_as_token_ids": True}
    answer = json.loads(post(f"{server}/v1/completions", {"model": name, "prompt": PROMPT, **fields}))
    found = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(token.removeprefix("token_id:")): value for token, value in found.items()}


def post(url: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{body.get('model', url)}: {error.code} {error.read().decode()}") from error


@contextmanager
def running(url: str, hub: lw.Hub, model: Any, tokenizer: Any, slots: int) -> Iterator[str]:
    """The server at `url`, or one that ends with the block."""
    if url:
        yield url
        return
    python = os.environ.get("LORAWEAVE_ENGINE_VLLM")
    if not python:
        raise typer.BadParameter("name a Python with vLLM and loraweave in $LORAWEAVE_ENGINE_VLLM")
    with started(Path(python), hub, model, tokenizer, slots) as server:
        yield server


@contextmanager
def started(python: Path, hub: lw.Hub, model: Any, tokenizer: Any, slots: int, **environment: str) -> Iterator[str]:
    """The URL of a vLLM in fp32 over this hub, of one thread on CPUs, which ends with the block."""
    with tempfile.TemporaryDirectory() as root:
        model.save_pretrained(f"{root}/model")
        tokenizer.save_pretrained(f"{root}/model")
        port = _served.free_port()
        words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", f"{root}/model"]
        words += ["--served-model-name", BASE, "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
        words += ["--max-model-len", "256", "--enforce-eager", "--enable-lora", "--max-loras", str(slots)]
        words += ["--max-lora-rank", str(RANK), "--max-logprobs", "-1"]
        own = {
            "LORAWEAVE_HUB": str(hub.path),
            "LORAWEAVE_SERVED_FOLDER": f"{root}/served",
            "LORAWEAVE_SERVED_BYTES": str(slots * FOLDER_BYTES),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with _served.started(words, port, {**own, **environment}) as server:
            yield server.url
