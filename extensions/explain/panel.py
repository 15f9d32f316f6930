"""The function by which the page over a hub shows a router's weights, as an explanation's page."""

from typing import Any

from loraweave import Composer
from loraweave.extend import Prompt
from loraweave.extend.routing import has_two_sequences
from loraweave.extend.scoring import encode_texts
from loraweave.extensions.explain.plot import page
from loraweave.extensions.explain.reading import explain


def panel(
    engine: Composer, prompt: Prompt, router: Any, *, max_new_tokens: int, title: str
) -> tuple[str, dict[str, float], float, list[tuple[str, dict[str, float]]]]:
    """Return (HTML of an explanation's page, {expert: share of all weight}, entropy, [(token, {expert: share})]).

    The entropy is the mean over the tokens, in nats. The list has the answer's tokens that the model read, each with the
    experts' shares of the weight with which it was read; it is empty where `max_new_tokens` is 0.
    """
    explanation = explain(engine, prompt, router, max_new_tokens=max_new_tokens)
    total, experts = explanation.total, explanation.experts
    # an encoder-decoder's answer begins with a token of its own
    begin = encode_texts(engine.model, engine.tokenizer, [prompt])[0]["input_ids"].shape[1] + has_two_sequences(engine.model)
    share_TE = explanation.by_token_TE[begin:].abs().nan_to_num()
    share_TE = share_TE / share_TE.sum(dim=1, keepdim=True).clamp(min=1e-30)
    of_tokens = zip(explanation.tokens[begin:], share_TE.tolist(), strict=True)
    answer = [(token, dict(zip(experts, shares, strict=True))) for token, shares in of_tokens]
    return page(explanation, title), dict(zip(experts, total.share_E.tolist(), strict=True)), total.entropy, answer
