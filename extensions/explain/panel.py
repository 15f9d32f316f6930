"""The panel of a router in the page over a hub: the page of an explanation."""

from __future__ import annotations

from typing import Any

from loraweave import Composer
from loraweave.extend import Prompt
from loraweave.extensions.explain.plot import page
from loraweave.extensions.explain.reading import explain


def panel(
    engine: Composer, prompt: Prompt, router: Any, *, max_new_tokens: int, title: str
) -> tuple[str, dict[str, float], float]:
    """Return the HTML of a page, each expert's share of the weight, and the mean entropy of a token's weights in nats."""
    explanation = explain(engine, prompt, router, max_new_tokens=max_new_tokens)
    total = explanation.total
    return page(explanation, title), dict(zip(explanation.experts, total.share_E.tolist(), strict=True)), total.entropy
