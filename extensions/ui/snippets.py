"""A formula of the page as text to copy: the formula, Python, a command of the shell, and a request by curl."""

from __future__ import annotations

import json
import shlex
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
formula = lw.parse({formula!r})
model, tokenizer = lw.load_base({base})
engine = lw.Composer(model, formula.pool(hub), tokenizer=tokenizer)
prompt = {prompt!r}
(answer,) = engine.generate([prompt], mixture=formula.mixture(hub), max_new_tokens={tokens}, do_sample=False)
print(answer)
"""


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
    # a prompt of a task is a text that knows its parts
    prompt = str(question) if isinstance(question, str) else question
    loaded = "" if base is None else repr(base)
    return {
        "formula": formula,
        "python": PYTHON.format(place=place_of(hub), formula=formula, base=loaded, prompt=prompt, tokens=max_new_tokens),
        "shell": f"loraweave {verb} {word}",
        "curl": f"# the server: loraweave serve --hub {place}{option}\n"
        f"curl {SERVER}/{path} -H 'Content-Type: application/json' -d {sent}",
    }
