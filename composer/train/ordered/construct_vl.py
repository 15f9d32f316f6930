"""ConStruct-VL's prefix composition: an adapter for each task, over those of all earlier ones (Smith et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraweave.common.options import Count, NonNegative, Positive
from loraweave.composer.model.batches import TargetBatch, batch, mean_losses
from loraweave.composer.train.ordered._course import Course, Layers, by_prefix
from loraweave.hub.adapter import Adapter


def construct_vl(
    course: Course, *, replay: NonNegative = 2.0, attacks: Count = 9, attack_size: Positive = 0.01
) -> dict[str, Adapter]:
    """{task t: the sum of the adapters of tasks 0 to t}, each trained while the earlier ones are in the model and frozen.

    b begins at 0, so a task begins as the model that the one before left; every past model is that prefix of the sum, to
    the bit (`own_parts` takes it apart). Ranks add up: task t has (t + 1) * rank.

    Adversarial pseudo-replay keeps the sum from forgetting, without rows of earlier tasks. The loss of task t has beside it
    `replay` times the sum over past models s of the mean over rows of |(p_s - p_s') - (p_t - p_t')|. p is exp(-the mean loss
    of the row's target tokens), and p' that with the embeddings of the row's tokens moved `attacks` times by `attack_size` *
    sign(-dp_s'/de): what makes the past model doubt has to make the new one doubt as much. As in the released code, at whose
    settings these are the defaults, but that p there is the probability that text and image match. Each past task costs
    attacks + 3 more passes a step, and all together one; `replay=0` is the prefix alone.

    The paper's learnable weight of each earlier part and layer (`ada_weights`, off in its runs) is a mixture of `own_parts`,
    which any search can learn afterwards.
    """
    return by_prefix(course, partial(_lesson, course, replay, attacks, attack_size))


def _lesson(course: Course, replay: float, attacks: int, size: float, name: str, prefix: Layers) -> Layers:
    settings, model = course.settings, course.model
    if not replay:
        return course.learned(name, frozen=prefix)
    jobs = course.jobs([name])
    plain = course.plain(jobs, prefix)
    past = [after(course, prefix, number + 1) for number in range(list(course.rows).index(name))]

    def losses(step: int) -> Tensor:
        loss_J = plain(step)
        if not past:
            return loss_J
        stacked = batch(model, course.tokenizer, settings.rows(course.rows[name], name, step))
        with course.frozen(prefix), jobs:
            clean_B = certainty(model, stacked)
        for layers in past:
            with course.frozen(layers):
                doubt_B, moved_BTI = attacked(model, stacked, attacks, size)
            with course.frozen(prefix), jobs:
                own_B = clean_B - certainty(model, stacked, moved_BTI)
            loss_J = loss_J + replay * (doubt_B - own_B).abs().mean()
        return loss_J

    course.run(jobs, losses)
    return jobs.layers_of(name)


def after(course: Course, prefix: Layers, count: int) -> Layers:
    """The update that the model had after so many tasks, out of the sum after more of them."""
    found = {}
    for layer, factors in prefix.items():
        began = course.first[layer].rank if layer in course.first else 0
        rank = began + (count * course.settings.rank if layer in course.layers else 0)
        found[layer] = replace(factors, a_RI=factors.a_RI[:rank], b_OR=factors.b_OR[:, :rank])
    return found


def certainty(model: Any, stacked: TargetBatch, moved_BTI: Tensor | None = None) -> Tensor:
    """p_B = exp(-the mean loss of a row's target tokens), with the embeddings moved by so much."""
    with _moved(model, moved_BTI):
        return (-mean_losses(model, stacked)).exp()


def attacked(model: Any, stacked: TargetBatch, attacks: int, size: float) -> tuple[Tensor, Tensor]:
    """p_B - p'_B of the model as it is, and the move of the embeddings that makes p' low."""
    shape = *stacked.inputs["input_ids"].shape, model.get_input_embeddings().weight.shape[1]
    moved_BTI = model.get_input_embeddings().weight.new_zeros(shape)
    with torch.no_grad():
        clean_B = certainty(model, stacked)
    for _ in range(attacks):
        moved_BTI.requires_grad_()
        (slope_BTI,) = torch.autograd.grad(certainty(model, stacked, moved_BTI).mean(), moved_BTI)
        moved_BTI = moved_BTI.detach() - size * slope_BTI.sign()
    with torch.no_grad():
        return clean_B - certainty(model, stacked, moved_BTI), moved_BTI


@contextmanager
def _moved(model: Any, moved_BTI: Tensor | None) -> Iterator[None]:
    """Inside, the first call of the input embeddings (an encoder's, where there is one) gives them moved."""
    if moved_BTI is None:
        yield
        return

    def move(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        handle.remove()
        return output + moved_BTI

    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    handle = reader.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()
