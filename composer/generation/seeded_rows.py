"""Sampling in which every text of a batch has a random generator of its own, so that it draws what it would draw alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def seeded(seeds: Sequence[int], streamer: Any) -> Callable[..., Any]:
    """transformers' own sampling loop, as a `custom_generate` of it, with each text's tokens drawn under the text's seed.

    A function is the way in because only there is the list of processors complete: temperature, top-k and the like come
    first. `streamer` is what the caller gave; transformers hands none to a function.
    """

    def decode(model: Any, input_ids: Tensor, logits_processor: Any, **others: Any) -> Any:
        logits_processor.append(_SeededRows(seeds, input_ids.device))
        return type(model)._sample(model, input_ids, logits_processor=logits_processor, streamer=streamer, **others)

    return decode


class _SeededRows:
    """A logits processor that draws the next tokens, and leaves the draw that follows no other choice."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        # a text's return sequences are rows on end, and share its generator
        parts = scores_BV.chunk(len(self._generators))
        tokens_B1 = torch.cat(
            [
                torch.multinomial(part.softmax(dim=-1), 1, generator=generator)
                for part, generator in zip(parts, self._generators, strict=True)
            ]
        )
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, tokens_B1, 0.0)
