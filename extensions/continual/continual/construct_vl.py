"""ConStruct-VL's prefix composition: an adapter for each task, over those of all earlier ones (Smith et al., CVPR 2023)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraweave import Adapter, Factors
from loraweave.extend import Count, NonNegative, Positive
from loraweave.extend.scoring import TargetBatch, batch, mean_losses
from loraweave.extend.training import LoraJob, LowRank
from loraweave.extensions.continual.course import Course, Layers, added


def construct_vl(
    course: Course,
    *,
    replay: NonNegative = 2.0,
    attacks: Count = 9,
    attack_size: Positive = 0.01,
    ada_weights: bool = False,
) -> dict[str, Adapter]:
    """Return {task t: the sum of the adapters of tasks 0 to t}, each trained with the earlier ones frozen in the model.

    b begins at 0, so a task begins with the model that the task before left; every past model is a prefix of the sum, to the
    bit (`own_parts` takes it apart). Ranks add up: task t has (t + 1) * rank.

    Adversarial pseudo-replay keeps the sum from forgetting, without rows of earlier tasks. It adds to the loss of task t
    `replay` times the sum over past models s of the mean over rows of |(p_s - p_s') - (p_t - p_t')|. p is exp(-the mean loss
    of the row's target tokens), and p' is the same after the embeddings of the row's tokens were moved `attacks` times by
    `attack_size` * sign(-dp_s'/de): an attack that lowers the past model's p has to lower the new model's as much. The
    defaults are those of the released code, where p is the probability that text and image match. Each past task costs
    attacks + 3 more passes a step, and all together one; `replay=0` is the prefix alone.

    With `ada_weights`, off in the released code too, the update of task t is the sum over i <= t of v_i b_i a_i in each
    layer. b_i and a_i are the factors learned from task i; the v of this task and layer begin as ones and learn with b_t and
    a_t. As later tasks have other weights, the results are then no prefixes of each other.
    """
    names = list(course.rows)
    adapters: dict[str, Adapter] = {}
    parts: Layers = course.first
    for number, name in enumerate(names):
        past = [adapters[earlier].layers for earlier in names[:number]]
        lesson = partial(_learn, course, replay, attacks, attack_size, ada_weights, name, parts, past)
        adapters[name], *unweighed = course.once(name, lesson, ("", "parts") if ada_weights else ("",))
        parts = unweighed[0].layers if ada_weights else adapters[name].layers
    return adapters


def _learn(
    course: Course, replay: float, attacks: int, size: float, ada: bool, name: str, parts: Layers, past: Sequence[Layers]
) -> list[Layers]:
    """Train the task; return [the model's update after it], with `ada` also the sum of its parts without their weights."""
    jobs = course.jobs([name])
    if ada:
        (job,) = jobs.members
        jobs.members = (weighed := Weighed(job, course.first, parts),)
    frozen, settings, model = course.first if ada else parts, course.settings, course.model
    plain = course.plain(jobs, frozen)

    def losses(step: int) -> Tensor:
        loss_J = plain(step)
        if not past or not replay:
            return loss_J
        stacked = batch(model, course.tokenizer, settings.rows(course.rows[name], name, step))
        with course.frozen(frozen), jobs:
            clean_B = certainty(model, stacked)
        for layers in past:
            with course.frozen(layers):
                doubt_B, moved_BTI = attacked(model, stacked, attacks, size)
            with course.frozen(frozen), jobs:
                own_B = clean_B - certainty(model, stacked, moved_BTI)
            loss_J = loss_J + replay * (doubt_B - own_B).abs().mean()
        return loss_J

    course.run(jobs, losses)
    if not ada:
        return [added(parts, jobs.layers_of(name))]
    return [added(course.first, weighed.result()), added(parts, weighed.own())]


class Weighed(LoraJob):
    """A job of a task's factors and the frozen ones of earlier tasks, each task's with a learned weight in each layer."""

    def __init__(self, job: LoraJob, first: Layers, parts: Layers) -> None:
        super().__init__(job.name, {layer: (a.detach(), b.detach()) for layer, (a, b) in job.factors.items()}, job.scale)
        self._earlier: dict[str, tuple[Tensor, Tensor]] = {}
        self.weights: dict[str, Tensor] = {}
        for layer, (a_RI, b_OR) in self.factors.items():
            # the model's update before the first task is no part
            began = first[layer].rank if layer in first else 0
            part = parts.get(layer)
            earlier_a = a_RI[:0].detach() if part is None else part.a_RI[began:].to(a_RI)
            earlier_b = b_OR[:, :0].detach() if part is None else part.b_OR[:, began:].to(b_OR)
            self._earlier[layer] = earlier_a, earlier_b / job.scale
            self.weights[layer] = torch.ones(len(earlier_a) // len(a_RI) + 1, device=a_RI.device, requires_grad=True)

    def parameters(self) -> list[Tensor]:
        return [*super().parameters(), *self.weights.values()]

    def low_rank(self, layer: str) -> LowRank:
        own_a, own_b = self.factors[layer]
        earlier_a, earlier_b = self._earlier[layer]
        v_S = self.weights[layer].repeat_interleave(len(own_a))
        return LowRank(torch.cat([earlier_a, own_a]), torch.cat([earlier_b, own_b], dim=1) * v_S, self.scale)

    def own(self) -> dict[str, Factors]:
        """Return the task's own factors, without its weight."""
        return LoraJob(self.name, self.factors, self.scale).result()


def certainty(model: Any, stacked: TargetBatch, moved_BTI: Tensor | None = None) -> Tensor:
    """Return p_B = exp(-the mean loss of a row's target tokens), with the token embeddings shifted by `moved_BTI`."""
    with _moved(model, moved_BTI):
        return (-mean_losses(model, stacked)).exp()


def attacked(model: Any, stacked: TargetBatch, attacks: int, size: float) -> tuple[Tensor, Tensor]:
    """Return (p_B - p'_B, the shift of the token embeddings that lowers p to p') for the model as it is."""
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
    """Shift the output of the next call of the input embeddings (an encoder's, if there is one) inside the block."""
    if moved_BTI is None:
        yield
        return

    def move(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        handle.remove()
        return output + moved_BTI

    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    with reader.get_input_embeddings().register_forward_hook(move) as handle:
        yield
