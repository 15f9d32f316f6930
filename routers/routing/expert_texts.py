"""What the experts of a pool were trained on, as prompts: from their cards, from a hub's catalogue, or given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loraweave.errors import WeightingError
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.hub.search import MAX_SAMPLE_INPUTS
from loraweave.types import Task

Examples = Mapping[str, Iterable[str]] | Hub | None


def expert_texts(router: str, pool: ExpertPool, examples: Examples, template: str | None) -> dict[str, list[str]]:
    """{expert: texts} of the experts that have some.

    Given texts are taken as they are. The sample inputs of a card (None), or of a hub's record of that name, become prompts
    by the template, with the description as the instruction; up to 50 of each, and without a template the inputs alone.
    Raises WeightingError for what is no list of texts.
    """
    if isinstance(examples, Mapping):
        return {name: _texts(router, name, given) for name, given in examples.items()}
    found = {}
    for name in pool.names:
        if isinstance(examples, Hub):
            record = examples.record(name)
            inputs, description = record.examples, record.description
        else:
            card = pool.adapters[name].card
            inputs, description = tuple(card.get("examples") or ()), str(card.get("description") or "")
        samples = [text for text in inputs if isinstance(text, str) and text.strip()][:MAX_SAMPLE_INPUTS]
        found[name] = samples if template is None else _prompts(samples, description, template)
    return found


def _prompts(inputs: Sequence[str], instruction: str, template: str) -> list[str]:
    task = Task([], instruction=instruction, template=template)
    return [task.prompt(text) for text in inputs]


def _texts(router: str, name: str, given: Any) -> list[str]:
    listed = [given] if isinstance(given, str) else list(given)
    if odd := [text for text in listed if not isinstance(text, str) or not text.strip()]:
        raise WeightingError(
            f"an example of {name!r} for router {router!r} is {odd[0]!r}, which says nothing: examples are texts, as the "
            "model will be asked"
        )
    return listed
