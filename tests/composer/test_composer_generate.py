"""Generation: caches, beams, return sequences and left padding, with a mixture per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.errors import (
    CompositionError,
    ScopeError,
)
from loraweave.hub.adapter import Adapter


def inputs(kind: str, rows: int = 3, tokens: int = 7, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (rows, tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids[:, :4]} if kind == "t5" else batch


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


class Tokens:
    """A tokenizer of texts such as "5 8 13": the numbers are the ids."""

    pad_token_id = 0
    eos_token_id = 2
    bos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(token) for token in text.split()]}

    def batch_decode(self, sequences: Tensor, *, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(token) for token in row if token > 2) for row in sequences.tolist()]


TEXTS = ["5 8 13 21 34", "9", "7 30 11"]
ROWS = [{"a": 1.0}, {"b": 0.5, "c": -0.5}, None]


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "beams", "several beams"],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_generation_of_a_mixed_batch_equals_each_text_alone(
    kind: str, settings: dict[str, int], make_model: Callable[..., nn.Module], make_adapters: Callable[..., list[Adapter]]
) -> None:
    model = make_model(kind, dtype=torch.float64)
    engine = Composer(model, make_adapters(model, kind), tokenizer=Tokens())
    together = engine.generate(TEXTS, mixture=ROWS, max_new_tokens=6, do_sample=False, **settings)
    each = settings.get("num_return_sequences", 1)
    assert len(together) == each * len(TEXTS)
    for index, text in enumerate(TEXTS):
        alone = engine.generate([text], mixture=ROWS[index] or {}, max_new_tokens=6, do_sample=False, **settings)
        assert together[index * each : (index + 1) * each] == alone
    assert not engine.active


def test_sampled_return_sequences_are_scored_by_their_own_mixture(
    make_model: Callable[..., nn.Module], make_adapters: Callable[..., list[Adapter]]
) -> None:
    model = make_model("llama", dtype=torch.float64)
    engine = Composer(model, make_adapters(model, "llama"))
    batch = inputs("llama")
    torch.manual_seed(0)
    with engine.activate(ROWS):
        output = model.generate(
            **batch,
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=4,
            min_new_tokens=4,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert output.sequences.shape[0] == 9
    scored = torch.stack(output.logits, dim=1)
    for index, sequence in enumerate(output.sequences):
        with engine.activate(ROWS[index // 3] or {}):
            alone = logits(model, {"input_ids": sequence[None]})[0, 6:-1]
        assert torch.allclose(scored[index].double(), alone, rtol=1e-5, atol=1e-5)


def test_cached_generation_equals_uncached(make_model: Callable[..., nn.Module], make_adapters: Callable[..., Any]) -> None:
    model = make_model("llama", dtype=torch.float64)
    engine = Composer(model, make_adapters(model, "llama"), tokenizer=Tokens())
    cached, uncached = (
        engine.generate(TEXTS, mixture=ROWS, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert cached == uncached
    assert cached != engine.generate(TEXTS, max_new_tokens=8, do_sample=False)


def test_generation_returns_the_continuation_only(
    tiny_llama: nn.Module, make_adapters: Callable[..., list[Adapter]]
) -> None:
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"), tokenizer=Tokens())
    ids = torch.tensor([[9]])
    expected = tiny_llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert engine.generate(["9"], max_new_tokens=4, do_sample=False) == Tokens().batch_decode(
        expected[:, 1:], skip_special_tokens=True
    )


def test_generation_refuses_what_it_cannot_do(tiny_llama: nn.Module, make_adapters: Callable[..., list[Adapter]]) -> None:
    adapters = make_adapters(tiny_llama, "llama")
    with pytest.raises(CompositionError, match="tokenizer="):
        Composer(tiny_llama, adapters).generate(["5"])
    engine = Composer(tiny_llama, adapters, tokenizer=Tokens())
    with pytest.raises(CompositionError, match="put it into a list"):
        engine.generate("5")
    with pytest.raises(ScopeError, match="3 rows, but there are 2 texts"):
        engine.generate(["5", "6"], mixture=ROWS)
    assert engine.generate([], mixture={"a": 1.0}) == []
