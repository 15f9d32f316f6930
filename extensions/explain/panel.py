"""The function by which the page over a hub shows a router's weights, as an explanation's page."""

from typing import Any

from loraweave import Composer
from loraweave.extend import Prompt
from loraweave.extensions.explain.plot import page
from loraweave.extensions.explain.reading import explain


def panel(
    engine: Composer, prompt: Prompt, router: Any, *, max_new_tokens: int, title: str
) -> tuple[str, dict[str, float], float]:
    """Return (HTML of an explanation's page, {expert: share of the weight}, mean entropy of a token's weights in nats)."""
    explanation = explain(engine, prompt, router, max_new_tokens=max_new_tokens)
    total = explanation.total
    return page(explanation, title), dict(zip(explanation.experts, total.share_E.tolist(), strict=True)), total.entropy
