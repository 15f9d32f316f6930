"""A mixture of the page as text to copy: its formula, Python, a command of the shell, and a request by curl."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from loraweave import Hub, parse
from loraweave.extend import Prompt
from loraweave.extend.composing import Sum
from loraweave.extensions.ui.catalogue import place_of

# where `loraweave serve` answers by default
SERVER = "http://127.0.0.1:8000/v1"
PYTHON = """\
import loraweave as lw

hub = lw.Hub({place!r})
{mixed}
prompt = {prompt!r}
(answer,) = engine.generate([prompt], mixture={mixture}, max_new_tokens={tokens}, do_sample=False)
print(answer)
"""
OF_FORMULA = """\
formula = lw.parse({formula!r})
model, tokenizer = lw.load_base({base})
engine = lw.Composer(model, formula.pool(hub), tokenizer=tokenizer)"""
BY_BLOCK = """\
weights = {weights!r}
by_block = {blocks!r}
model, tokenizer = lw.load_base({base})
engine = lw.Composer(model, hub.pool(list(weights)), tokenizer=tokenizer)
by_layer = {{layer: dict(weights) for layer in engine.pool.layer_names}}
for layer, row in by_layer.items():
    for block, differing in by_block.items():
        if f"{{layer}}.".startswith(f"{{block}}."):
            row.update(differing)
mixture = lw.MixtureWeights.of_layers(by_layer, list(weights))"""


def texts_of(hub: Hub, base: str | None, formula: str, question: Prompt, max_new_tokens: int) -> dict[str, str]:
    """Return {"formula": ..., "python": ..., "shell": ..., "curl": ...}: texts that compose the formula's adapters.

    Python and curl ask the question; `base` is the base model's name, None for the default. Raises FormulaError for a text
    that is not a formula.
    """
    place, word = shlex.quote(place_of(hub)), shlex.quote(formula)
    # a router has no weights to merge: the hub keeps it under a name
    verb = (
        f"merge --hub {place} --out merged --"
        if isinstance(parse(formula).root, Sum)
        else f"hub save-composition --hub {place} routed"
    )
    path, key = ("completions", "prompt") if isinstance(question, str) else ("chat/completions", "messages")
    body: dict[str, Any] = {"model": formula, "max_tokens": max_new_tokens, "temperature": 0, key: question}
    sent = shlex.quote(json.dumps(body, ensure_ascii=False))
    option = "" if base is None else f" --base {shlex.quote(base)}"
    mixed = OF_FORMULA.format(formula=formula, base=_loaded(base))
    return {
        "formula": formula,
        "python": _python(hub, mixed, "formula.mixture(hub)", question, max_new_tokens),
        "shell": f"loraweave {verb} {word}",
        "curl": f"# the server: loraweave serve --hub {place}{option}\n"
        f"curl {SERVER}/{path} -H 'Content-Type: application/json' -d {sent}",
    }


def by_block(
    hub: Hub,
    base: str | None,
    weights: Mapping[str, float],
    blocks: Mapping[str, Mapping[str, float]],
    question: Prompt,
    max_new_tokens: int,
) -> str:
    """Return Python that mixes adapters by {name: weight}, but by {block: {name: weight}} in the blocks that differ."""
    mixed = BY_BLOCK.format(weights=weights, blocks=blocks, base=_loaded(base))
    return _python(hub, mixed, "mixture", question, max_new_tokens)


def _loaded(base: str | None) -> str:
    return "" if base is None else repr(base)


def _python(hub: Hub, mixed: str, mixture: str, question: Prompt, max_new_tokens: int) -> str:
    # a prompt of a task is a text that knows its parts
    prompt = str(question) if isinstance(question, str) else question
    return PYTHON.format(place=place_of(hub), mixed=mixed, mixture=mixture, prompt=prompt, tokens=max_new_tokens)
