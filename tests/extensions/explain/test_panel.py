"""What the page of `ui` shows of a router: an explanation, its figures, and the answer's tokens with their adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import loraweave as lw
from loraweave.extensions.explain import explain
from loraweave.extensions.explain.panel import panel

Make = Callable[..., Any]


@pytest.mark.parametrize(("kind", "targets"), [("llama", ("q_proj", "down_proj")), ("t5", ("q", "v", "wo"))])
@pytest.mark.parametrize("max_new_tokens", [0, 5])
def test_a_panel_has_the_shares_of_explain_and_the_answers_tokens(
    kind: str, targets: tuple[str, ...], max_new_tokens: int, make_model: Make, make_adapter: Make, tokenizer: Any
) -> None:
    model = make_model(kind)
    model.generation_config.eos_token_id = None
    adapters = [make_adapter(model, name, targets=targets, seed=seed) for seed, name in enumerate("ab")]
    engine = lw.Composer(model, adapters, tokenizer=tokenizer)
    router = lw.router("arrow", engine.bound_pool)
    page, shares, entropy, answer = panel(engine, "abc", router, max_new_tokens=max_new_tokens, title="a title")
    total = explain(engine, "abc", router, max_new_tokens=max_new_tokens).total
    assert "a title" in page
    assert (list(shares), list(shares.values()), entropy) == (["a", "b"], total.share_E.tolist(), total.entropy)
    # the last token of an answer is never read
    num_tokens = max(max_new_tokens - 1, 0)
    said = ""
    if num_tokens:
        (said,) = engine.generate(["abc"], mixture=router, max_new_tokens=num_tokens, do_sample=False)
    assert "".join(token for token, _ in answer) == said
    assert [sum(of.values()) for _, of in answer] == pytest.approx([1.0] * len(answer))
