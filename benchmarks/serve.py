"""A server soaked in random requests: formulas, clients that leave, malformed bodies, an adapter that comes and goes.

    python -m benchmarks serve [--requests 60] [--clients 8]

Every whole answer is compared with what transformers' greedy search gives for its prompt alone under its mixture. Where the
texts differ, the two tokens at which they part have to score within 1e-4 of each other: both are right to rounding. No time
is measured.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer

import loraweave as lw
from benchmarks._models import base_model
from benchmarks._run import Run, Table, status_bytes
from loraweave.serving.limits import Limits
from loraweave.serving.run import make_server

app = typer.Typer()

NAMES = ("passive", "negation", "antonym", "past_tense", "plural", "uppercase", "synonym", "country_capital")
COMING_AND_GOING = "coming_and_going"
MALFORMED = (
    b"",
    b"{",
    b'{"model": "passive"}',
    b'{"model": "0.5*passive +", "prompt": "a"}',
    b'{"model": "pasive", "prompt": "a"}',
)
NUM_TOKENS = 12
TIE = 1e-4


@dataclass(frozen=True)
class Asked:
    """One request: what is sent, how it is sent ("whole", "leaves" or "malformed"), and the mixture that it names."""

    kind: str
    body: bytes
    prompt: str = ""
    mixture: dict[str, float] | None = None


@app.command()
def main(
    context: typer.Context,
    requests: Annotated[int, typer.Option(help="how many in all")] = 60,
    clients: Annotated[int, typer.Option(help="that send at the same time")] = 8,
) -> None:
    """Answers that differ from those of the model alone, refusals, and the server's memory."""
    run: Run = context.obj
    model, tokenizer = base_model()
    generator = random.Random(run.seed)
    prompts = [
        row["prompt"] if "prompt" in row else f"{row['input']}\nOutput:" for task in NAMES for row in run.rows(task)[:20]
    ]
    asked = [draw(generator, prompts) for _ in range(requests)]
    memory = [("before", status_bytes("RssAnon"))]
    with run.hub() as hub:
        adapters = [hub[name] for name in NAMES]
        engine = lw.Composer(
            model, {**{a.name: a for a in adapters}, COMING_AND_GOING: hub["spell_out"]}, tokenizer=tokenizer
        )
        with running(hub, model, tokenizer) as port, ThreadPoolExecutor(clients) as threads:
            found: list[tuple[int, Any]] = []
            for quarter in range(4):
                part = asked[quarter * requests // 4 : (quarter + 1) * requests // 4]
                futures = [threads.submit(send, port, each) for each in part]
                come_or_go(hub, quarter)
                found += [future.result() for future in futures]
                memory.append((f"after {len(found)} requests", status_bytes("RssAnon")))
        counted = judged(engine, asked, found)
    counts = Table(f"{requests} requests by {clients} clients, seed {run.seed}", ("what became of them", "requests"))
    for what, count in sorted(counted.items()):
        counts.add(what, str(count))
    table = Table("memory that is the process's own", ("when", "MB"))
    for when, num_bytes in memory:
        table.add(when, f"{num_bytes / 1e6:.0f}")
    run.show(counts, table)
    if counted["wrong"]:
        raise typer.Exit(1)


def draw(generator: random.Random, prompts: list[str]) -> Asked:
    """A request at random: 1 in 50 malformed, 1 in 10 by a client that leaves, 1 in 10 of the base."""
    if generator.random() < 0.02:
        return Asked("malformed", generator.choice(MALFORMED))
    names = generator.sample([*NAMES, COMING_AND_GOING], generator.choice([0, *[1, 2, 3] * 3]))
    mixture = {name: round(generator.uniform(-0.3, 1.0), 2) or 0.5 for name in names}
    terms = " ".join(f"{'-' if weight < 0 else '+'} {abs(weight)}*{name}" for name, weight in mixture.items())
    formula = terms.removeprefix("+ ")
    prompt, leaves = generator.choice(prompts), generator.random() < 0.1
    fields = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 0, "stream": leaves}
    body = json.dumps({"model": formula or "base", **fields}).encode()
    return Asked("leaves" if leaves else "whole", body, prompt, mixture)


@contextmanager
def running(hub: lw.Hub, model: Any, tokenizer: Any) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    server = make_server(hub, model, tokenizer, port=0, limits=Limits(rows=8, loaded=4), log_level="warning")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def send(port: int, asked: Asked) -> tuple[int, Any]:
    """(status, body); a client that leaves reads one event and has no body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", asked.body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if asked.kind == "leaves" and answer.status == 200:
            answer.readline()
            return 200, None
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def come_or_go(hub: lw.Hub, quarter: int) -> None:
    """The adapter is in the hub in every other quarter."""
    if quarter % 2:
        hub.remove(COMING_AND_GOING)
    else:
        hub.add(hub["spell_out"], name=COMING_AND_GOING)


def judged(engine: lw.Composer, asked: list[Asked], found: list[tuple[int, Any]]) -> Counter[str]:
    """How many of each kind there are; "wrong" are answers that differ beyond rounding, and statuses that do not fit."""
    counted = Counter({"wrong": 0})
    for each, (status, body) in zip(asked, found, strict=True):
        if each.kind == "malformed":
            counted["malformed and refused" if status in (400, 404) else "wrong"] += 1
        elif status == 404 and COMING_AND_GOING in (each.mixture or {}):
            counted["refused, since the adapter had gone"] += 1
        elif status != 200:
            counted["wrong"] += 1
        elif each.kind == "leaves":
            counted["left after one event"] += 1
        else:
            counted[compared(engine, each, body["choices"][0])] += 1
    return counted


@torch.no_grad()
def compared(engine: Any, asked: Asked, choice: dict[str, Any]) -> str:
    """Beside transformers' greedy search on this prompt alone."""
    inputs = engine.tokenizer(asked.prompt, return_tensors="pt")
    with engine.activate(asked.mixture):
        output = engine.model.generate(
            **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, output_logits=True, return_dict_in_generate=True
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    if engine.tokenizer.decode(tokens, skip_special_tokens=True) == choice["text"]:
        return "equal"
    words = [engine.tokenizer.decode([token]) for token in tokens.tolist()]
    served = choice["logprobs"]
    parted = next((n for n, pair in enumerate(zip(words, served["tokens"], strict=False)) if pair[0] != pair[1]), None)
    if parted is None:
        return "wrong"
    own = float(output.logits[parted][0].log_softmax(0).max())
    return "equal but for a tie" if abs(own - served["token_logprobs"][parted]) < TIE else "wrong"
