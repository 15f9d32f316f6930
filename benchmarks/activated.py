"""Time to the first token after a shared beginning: activated LoRAs over the base's cache, plain ones that read it again.

    python -m benchmarks --cpu activated
    python -m benchmarks --cpu activated --prefix 2048

A conversation that the base has read is judged by an adapter: what follows are the adapter's invocation tokens, at which an
activated LoRA begins. It takes the base's keys and values of all before; a plain LoRA has other ones, and reads the whole
prompt. The base itself, over its own cache, is the least that any can take. Before anything is measured, the first tokens
over the cache must be those of the whole prompt, read from its beginning.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

import loraweave as lw
from benchmarks._models import LIMIT, base_model, changes, difference, random_adapter, tokens
from benchmarks._run import Run
from benchmarks._timing import Gate, Way, compare, require

app = typer.Typer()

INVOCATION = "<|im_start|>assistant\n"
NUM_NEW = 8


@app.command()
def main(
    context: typer.Context,
    prefix: Annotated[int, typer.Option(help="tokens that the base has read")] = 512,
    asked: Annotated[int, typer.Option(help="tokens after them, the invocation included")] = 16,
    targets: Annotated[str, typer.Option(help="qv or all")] = "all",
) -> None:
    """Prefill and choice of one token, relative to a plain LoRA of the same factors that reads all."""
    run: Run = context.obj
    model, tokenizer = base_model()
    invocation = tuple(tokenizer(INVOCATION)["input_ids"])
    plain = random_adapter(model, "plain", targets, run.seed)
    engine = lw.Composer(model, [plain, replace(plain, name="activated", invocation=invocation)])
    ids_BT = tokens(model, 1, prefix + asked, run.seed)
    ids_BT[:, -len(invocation) :] = torch.tensor(invocation)
    with torch.no_grad():
        shared = model(ids_BT[:, :prefix], use_cache=True).cache
    caches: list[Any] = []

    @torch.no_grad()
    def first(name: str | None, over_cache: bool) -> torch.Tensor:
        read, known = (ids_BT[:, prefix:], {"cache": caches.pop()}) if over_cache else (ids_BT, {})
        with engine.activate({name: 1.0} if name else {}):
            logits: torch.Tensor = model(read, **known, use_cache=True, logits_to_keep=1).logits
        return logits

    def copied() -> None:
        caches[:] = [copy.deepcopy(shared)]

    def found(name: str | None, over_cache: bool) -> torch.Tensor:
        copied()
        return first(name, over_cache)

    def generated(known: dict[str, Any]) -> list[int]:
        settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0}
        with engine.activate({"activated": 1.0}):
            output = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **known, **settings)
        answer: list[int] = output[0, prefix + asked :].tolist()
        return answer

    whole = found("activated", False)
    parted = generated({}) != generated({"cache": copy.deepcopy(shared)})
    require(
        [
            Gate("activated over the cache and the whole prompt", difference(found("activated", True), whole), LIMIT),
            Gate(f"of both, {NUM_NEW} tokens that differ", float(parted), 0.0),
            changes("activated adapter", difference(whole, found(None, False))),
        ]
    )
    ways = {
        "plain LoRA, all read": Way(lambda: first("plain", False)),
        "activated, over the base's cache": Way(lambda: first("activated", True), copied),
        "base, over its cache": Way(lambda: first(None, True), copied),
    }
    title = f"first token after {prefix} shared and {asked} new tokens, rank {plain.rank}, layers: {targets}"
    compare(run, title, ways, {"time, plain LoRA = 1": ("plain LoRA, all read", False)})
