"""A server soaked in random requests: formulas, clients that leave, malformed bodies, an adapter that comes and goes.

    python -m benchmarks --out runs/soak serve --tiny --requests 20000      a random model of two blocks, in float64
    python -m benchmarks --out runs/soak-135m serve                         SmolLM2-135M

The server is `loraweave serve` in a process of its own. Formulas are weighted sums, merges, routers and the base, new ones
in each part of the run; most prompts come again under other formulas, and what was read of them must not be taken. One
adapter is removed after each part and is there again, with other content, after the next. Every whole answer is compared
with what transformers' greedy search gives for its prompt alone under the formula's adapters as they were then. Where the
texts differ, the two tokens at which they part have to score within 1e-4 of each other: both are right to rounding. What a
part has shown is kept in --out; a run that goes on there begins with a new server. No time is measured.
"""

from __future__ import annotations

import http.client
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

import loraweave as lw
from benchmarks._data import kept
from benchmarks._models import base_model, random_adapter
from benchmarks._run import Run, Table, console
from benchmarks._served import Served, serving

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
NUM_TOKENS = 8
PART = 500
# of each part; one that is drawn again asks what was asked before
NUM_FORMULAS, NUM_PROMPTS, NUM_PAIRS = 60, 12, 80
TIE = 1e-4
# small ones, so that everything that is kept makes room many times
KEPT = ("--prefix-bytes", str(1 << 21), "--loaded", "4")


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
    requests: Annotated[int, typer.Option(help="how many in all")] = 1000,
    clients: Annotated[int, typer.Option(help="that send at the same time")] = 8,
    tiny: Annotated[bool, typer.Option("--tiny", help="a random model of two blocks, in float64")] = False,
) -> None:
    """Answers that differ from those of the model alone, refusals, and the server's memory."""
    run: Run = context.obj
    found = [] if run.report else soaked(run, requests, clients, tiny)
    found = found or [json.loads(path.read_text()) for path in sorted(run.folder().glob("part-*.json"))]
    counted = sum((Counter(part["counts"]) for part in found), Counter())
    total, of = counted.total(), "a random model" if tiny else "SmolLM2-135M-Instruct"
    counts = Table(f"{total} requests to {of} by {clients} clients, seed {run.seed}", ("what became of them", "requests"))
    for what in sorted({*counted, "wrong"}):
        counts.add(what, str(counted[what]))
    memory = Table("memory of the server's process, MB", ("after requests", "resident", "but for pages of files"))
    for number, part in enumerate(found, 1):
        if number == 1 or number % max(1, len(found) // 10) == 0:
            note = ", a new server" if number > 1 and part["begun"] != found[number - 2]["begun"] else ""
            sizes = [f"{part[what] / 1e6:.0f}" if what in part else "" for what in ("resident", "own")]
            memory.add(f"{min(total, number * PART)}{note}", *sizes)
    run.show(counts, memory)
    if counted["wrong"]:
        raise typer.Exit(1)


def soaked(run: Run, requests: int, clients: int, tiny: bool) -> list[dict[str, Any]]:
    """What each part of the run has shown: how many of each kind, and the server's memory after it."""
    folder = run.folder()
    model, tokenizer, base, adapters = base_and_adapters(run, folder, tiny)
    found = []
    with run.hub(without=[path.name for path in run.adapters()]) as hub:
        for name, adapter in adapters.items():
            hub.add(adapter, name=name)
        assert hub.path is not None
        with serving(Path(hub.path), base, *KEPT) as server, ThreadPoolExecutor(clients) as threads:
            for number in range(-(-requests // PART)):

                def part(number: int = number) -> dict[str, Any]:
                    comes = random_adapter(model, f"comes{number // 2}", "all", run.seed)
                    pool = lw.ExpertPool({**adapters, COMING_AND_GOING: comes})
                    if number % 2 and COMING_AND_GOING not in hub:
                        # the run went on here
                        hub.add(comes, name=COMING_AND_GOING)
                    asked = drawn(run, random.Random(f"{run.seed} {number}"), min(PART, requests - number * PART))
                    futures = [threads.submit(send, server, each) for each in asked]
                    if number % 2:
                        hub.remove(COMING_AND_GOING)
                    else:
                        hub.add(comes, name=COMING_AND_GOING)
                    answers = [future.result() for future in futures]
                    used = server.memory()
                    counts = judged(Alone(model, tokenizer, pool), asked, answers)
                    return {"counts": counts, **used, "begun": server.process.create_time()}

                found.append(kept(folder / f"part-{number:04d}.json", part))
                wrong = sum(part["counts"].get("wrong", 0) for part in found)
                console.print(
                    f"{min(requests, (number + 1) * PART)} requests, {wrong} wrong, {found[-1]['own'] / 1e6:.0f} MB"
                )
    return found


def base_and_adapters(run: Run, folder: Path, tiny: bool) -> tuple[Any, Any, Path | None, dict[str, lw.Adapter]]:
    """(model, tokenizer, the model's folder, {name: adapter}); the folder is None for the default base."""
    model, tokenizer = base_model()
    if not tiny:
        return model, tokenizer, None, {name: lw.Adapter.from_pretrained(run.pool / name) for name in NAMES}
    base = folder / "model"
    model = tiny_model(len(tokenizer), base)
    tokenizer.save_pretrained(base)
    return model, tokenizer, base, {name: random_adapter(model, name, "all", run.seed) for name in NAMES}


def tiny_model(num_tokens: int, folder: Path) -> Any:
    """A random Llama of two blocks in float64, where rounding decides no token; it is kept in the folder."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=num_tokens, num_key_value_heads=2, initializer_range=0.3, **sizes)
    transformers.LlamaForCausalLM(config).double().save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def drawn(run: Run, generator: random.Random, count: int) -> list[Asked]:
    """The requests of a part at random: 1 in 50 malformed, 1 in 10 by a client that leaves."""
    rows = [row for task in NAMES for row in run.rows(task)[:5]]
    prompts = [
        row["prompt"] if "prompt" in row else f"{row['input']}\nOutput:" for row in generator.sample(rows, NUM_PROMPTS)
    ]
    formulas = [formula(generator) for _ in range(NUM_FORMULAS)]
    pairs = [(generator.choice(formulas), generator.choice(prompts)) for _ in range(NUM_PAIRS)]
    asked = []
    for _ in range(count):
        if generator.random() < 0.02:
            asked.append(Asked("malformed", generator.choice(MALFORMED)))
            continue
        (name, prompt), leaves = generator.choice(pairs), generator.random() < 0.1
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


def send(server: Served, asked: Asked) -> tuple[int, Any]:
    """(status, body); a client that leaves reads one event and has no body."""
    if asked.kind != "leaves":
        return server.post("/v1/completions", asked.body)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", asked.body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            return answer.status, json.loads(answer.read())
        answer.readline()
        return 200, None
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
