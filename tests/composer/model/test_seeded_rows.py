"""Seeded draws: by probability, one generator per text."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList

from loraweave.composer.model.generate import _SeededRows, sample_by_seeds


def draws(seeds: list[int], scores_BV: torch.Tensor) -> list[int]:
    drawn = _SeededRows(seeds, torch.device("cpu"))(torch.zeros(1), scores_BV)
    assert drawn.isfinite().sum(dim=1).tolist() == [1] * len(scores_BV)
    return drawn.argmax(dim=1).tolist()


def test_tokens_come_as_often_as_their_probability_says() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    found = draws([3], probabilities.log().expand(20_000, 4))
    shares = torch.bincount(torch.tensor(found), minlength=4) / len(found)
    assert float((shares - probabilities).abs().max()) < 0.015


def test_a_text_draws_by_its_own_seed_wherever_it_stands() -> None:
    scores_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    together = draws([1, 2, 3], scores_BV)
    for index, seed in enumerate([1, 2, 3]):
        assert draws([seed], scores_BV[2 * index : 2 * index + 2]) == together[2 * index : 2 * index + 2]
    assert draws([4, 2, 9], scores_BV)[2:4] == together[2:4]


def test_the_processors_of_the_call_come_first() -> None:
    seen = []

    class Model:
        def _sample(self, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, streamer: object) -> None:
            seen.extend([*logits_processor, streamer])

    sample_by_seeds([1], "streamer")(Model(), torch.zeros(1, 1), LogitsProcessorList(["temperature"]))
    assert [type(each).__name__ for each in seen] == ["str", "_SeededRows", "str"]
    assert seen[2] == "streamer"
