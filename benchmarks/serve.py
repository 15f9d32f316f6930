"""A server soaked in random requests: formulas, clients that leave, malformed bodies, an adapter that comes and goes.

    python -m benchmarks serve [--requests 60] [--clients 8]
    python -m benchmarks serve --tiny --requests 20000       a random model of two blocks, for its many requests

Formulas are weighted sums, merges, routers and the base; most prompts come again under other formulas, and what was read of
them must not be taken. Every whole answer is compared with what transformers' greedy search gives for its prompt alone
under its mixture. Where the texts differ, the two tokens at which they part have to score within 1e-4 of each other: both
are right to rounding. No time is measured.
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
import transformers
import typer

import loraweave as lw
from benchmarks._models import base_model, random_adapter
from benchmarks._run import Run, Table, console, status_bytes
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
NUM_PARTS = 10
# of each kind; one that is drawn again asks what was asked before
NUM_FORMULAS, NUM_PROMPTS = 200, 40
TIE = 1e-4


@dataclass(frozen=True)
class Asked:
    """One request: what is sent, how it is sent ("whole", "leaves" or "malformed"), and what it asks."""

    kind: str
    body: bytes
    formula: str = ""
    prompt: str = ""


@app.command()
def main(
    context: typer.Context,
    requests: Annotated[int, typer.Option(help="how many in all")] = 60,
    clients: Annotated[int, typer.Option(help="that send at the same time")] = 8,
    tiny: Annotated[bool, typer.Option("--tiny", help="a random model of two blocks, in float64")] = False,
) -> None:
    """Answers that differ from those of the model alone, refusals, and the server's memory."""
    run: Run = context.obj
    model, tokenizer = base_model()
    adapters = [lw.Adapter.from_pretrained(run.pool / name) for name in NAMES]
    comes = lw.Adapter.from_pretrained(run.pool / "spell_out")
    if tiny:
        model = tiny_model(len(tokenizer))
        adapters = [random_adapter(model, name, "all", run.seed) for name in NAMES]
        comes = random_adapter(model, COMING_AND_GOING, "all", run.seed)
    generator = random.Random(run.seed)
    asked = drawn(run, generator, requests)
    memory = [("before", status_bytes("RssAnon"))]
    found: list[tuple[int, Any]] = []
    with run.hub(without=[path.name for path in run.adapters()]) as hub:
        for name, adapter in zip(NAMES, adapters, strict=True):
            hub.add(adapter, name=name)
        with running(hub, model, tokenizer) as port, ThreadPoolExecutor(clients) as threads:
            for part in range(NUM_PARTS):
                some = asked[part * requests // NUM_PARTS : (part + 1) * requests // NUM_PARTS]
                futures = [threads.submit(send, port, each) for each in some]
                if part % 2:
                    hub.remove(COMING_AND_GOING)
                else:
                    hub.add(comes, name=COMING_AND_GOING)
                found += [future.result() for future in futures]
                memory.append((f"after {len(found)} requests", status_bytes("RssAnon")))
    pool = lw.ExpertPool({**dict(zip(NAMES, adapters, strict=True)), COMING_AND_GOING: comes})
    counted = judged(Alone(model, tokenizer, pool), asked, found)
    of = "a random model" if tiny else "SmolLM2-135M-Instruct"
    counts = Table(f"{requests} requests to {of} by {clients} clients, seed {run.seed}", ("what became of them", "requests"))
    for what, count in sorted(counted.items()):
        counts.add(what, str(count))
    table = Table("memory that is the process's own", ("when", "MB"))
    for when, num_bytes in memory:
        table.add(when, f"{num_bytes / 1e6:.0f}")
    run.show(counts, table)
    if counted["wrong"]:
        raise typer.Exit(1)


def tiny_model(num_tokens: int) -> Any:
    """A random Llama of two blocks in float64, where rounding decides no token."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=num_tokens, num_key_value_heads=2, initializer_range=0.3, **sizes)
    model = transformers.LlamaForCausalLM(config).double().eval().requires_grad_(False)
    model.name_or_path = "tiny"
    return model


def drawn(run: Run, generator: random.Random, count: int) -> list[Asked]:
    """Requests at random: 1 in 50 malformed, 1 in 10 by a client that leaves."""
    rows = [row for task in NAMES for row in run.rows(task)[:5]]
    prompts = [row["prompt"] if "prompt" in row else f"{row['input']}\nOutput:" for row in rows][:NUM_PROMPTS]
    formulas = [formula(generator) for _ in range(NUM_FORMULAS)]
    asked = []
    for _ in range(count):
        if generator.random() < 0.02:
            asked.append(Asked("malformed", generator.choice(MALFORMED)))
            continue
        name, prompt, leaves = generator.choice(formulas), generator.choice(prompts), generator.random() < 0.1
        fields = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 0, "stream": leaves}
        body = json.dumps({"model": name, **fields}).encode()
        asked.append(Asked("leaves" if leaves else "whole", body, name, prompt))
    return asked


def formula(generator: random.Random) -> str:
    """Of ten, one is the base, one a merge by a method, one a router, and seven are weighted sums of up to three."""
    kind, names = generator.randrange(10), generator.sample([*NAMES, COMING_AND_GOING], generator.choice([1, 2, 3]))
    if kind == 0:
        return "base"
    if kind < 3 and len(names) > 1:
        return f"{('ties', 'arrow')[kind - 1]}({', '.join(names)}; {('density=0.5', 'top_k=1')[kind - 1]})"
    weights = [round(generator.uniform(-0.3, 1.0), 2) or 0.5 for _ in names]
    terms = " ".join(f"{'-' if w < 0 else '+'} {abs(w)}*{name}" for w, name in zip(weights, names, strict=True))
    return terms.removeprefix("+ ")


@contextmanager
def running(hub: lw.Hub, model: Any, tokenizer: Any) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    limits = Limits(rows=8, loaded=4, prefix_bytes=1 << 24)
    server = make_server(hub, model, tokenizer, port=0, limits=limits, log_level="warning")
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


class Alone:
    """What formulas answer with no server: each prompt alone, under the formula's own pool."""

    def __init__(self, model: Any, tokenizer: Any, pool: lw.ExpertPool) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._pool = pool
        self._known: dict[tuple[str, str], tuple[str, list[str], list[float]]] = {}
        self._merged: dict[str, lw.Adapter] = {}

    @torch.no_grad()
    def answer(self, name: str, prompt: str) -> tuple[str, list[str], list[float]]:
        """(text, its tokens as text, the log-probability of each) of transformers' greedy search."""
        if (name, prompt) not in self._known:
            inputs = self._tokenizer(prompt, return_tensors="pt")
            engine, mixture = self._composer(lw.parse(name))
            with engine.activate(mixture):
                output = self._model.generate(
                    **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, output_logits=True, return_dict_in_generate=True
                )
            tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
            words = [self._tokenizer.decode([token]) for token in tokens.tolist()]
            best = [float(step[0].log_softmax(0).max()) for step in output.logits]
            self._known[name, prompt] = self._tokenizer.decode(tokens, skip_special_tokens=True), words, best
        return self._known[name, prompt]

    def _composer(self, formula: lw.Formula) -> tuple[lw.Composer, Any]:
        if formula.is_base:
            return lw.Composer(self._model, self._pool), {}
        try:
            return lw.Composer(self._model, formula.pool(self._pool)), formula.mixture(self._pool)
        except lw.ScopeError:
            merged = formula.merge(self._pool, progress=False)
            return lw.Composer(self._model, [merged]), {merged.name: 1.0}


def judged(alone: Alone, asked: list[Asked], found: list[tuple[int, Any]]) -> Counter[str]:
    """How many of each kind there are; "wrong" are answers that differ beyond rounding, and statuses that do not fit."""
    counted = Counter({"wrong": 0})
    for each, (status, body) in zip(asked, found, strict=True):
        before = counted["wrong"]
        if each.kind == "malformed":
            counted["malformed and refused" if status in (400, 404) else "wrong"] += 1
        elif status == 404 and COMING_AND_GOING in each.formula:
            counted["refused, since the adapter had gone"] += 1
        elif status != 200:
            counted["wrong"] += 1
        elif each.kind == "leaves":
            counted["left after one event"] += 1
        else:
            counted[compared(*alone.answer(each.formula, each.prompt), body["choices"][0])] += 1
        if counted["wrong"] > before:
            console.print(f"wrong: {each.body!r} was answered {status} {json.dumps(body)}", markup=False)
    return counted


def compared(text: str, words: list[str], best: list[float], choice: dict[str, Any]) -> str:
    """A served answer beside the one of the prompt alone."""
    if text == choice["text"]:
        return "equal"
    served = choice["logprobs"]
    parted = next((n for n, pair in enumerate(zip(words, served["tokens"], strict=False)) if pair[0] != pair[1]), None)
    if parted is None:
        return "wrong"
    return "equal but for a tie" if abs(best[parted] - served["token_logprobs"][parted]) < TIE else "wrong"
