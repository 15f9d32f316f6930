"""I-LoRA: a fast adapter that learns, and a slow one that follows it (Ren et al. 2024, arXiv 2402.18865)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraweave import Adapter
from loraweave.extend import Count, Fraction, NonNegative
from loraweave.extend.scoring import IGNORED, EncodedRow, TargetBatch, batch, token_losses
from loraweave.extend.training import LoraJobs, job_losses, seeded
from loraweave.extensions.continual.course import Course, Layers


def ilora(
    course: Course, *, decay: Fraction = 0.25, reservoir: Count = 500, consistency: NonNegative = 1.0
) -> dict[str, Adapter]:
    """Return {task: the slow adapter after that task}; the fast one goes on learning from task to task.

    After step n of the whole course slow = d * slow + (1 - d) * fast with d = min(1 - 1 / (n + 1), decay), on a and on b
    apart. From the second task on the loss is (CE(x) + CE(x')) / 2 + consistency * mean((h - max(h, h_slow))^2): x' are as
    many examples of earlier tasks, from a reservoir that is an even sample of at most `reservoir` of them, and h are the
    hidden states of all layers at the real tokens of x', with the fast and with the slow adapter in the model.

    The authors' code has a `decay` of 0.25, with which the slow adapter keeps a quarter of itself at each step and
    is nearly the fast one; with 1 it is the mean over all steps. n goes on from task to task: starting again at 1, the slow
    adapter would begin each task as the fast one.
    """
    adapters: dict[str, Adapter] = {}
    fast = slow = course.first or None
    for number, name in enumerate(course.rows):
        past = _reservoir(course, list(course.rows)[:number], reservoir)
        lesson = partial(_learn, course, name, fast, slow, past, decay, consistency)
        adapters[name], fast_adapter = course.once(name, lesson, ("slow", "fast"))
        fast, slow = fast_adapter.layers, adapters[name].layers
    return adapters


def _learn(
    course: Course,
    name: str,
    fast_layers: Layers | None,
    slow_layers: Layers | None,
    past: Sequence[EncodedRow],
    decay: float,
    consistency: float,
) -> list[Layers]:
    settings, model, tokenizer = course.settings, course.model, course.tokenizer
    fast, slow = course.jobs([name], fast_layers), course.jobs([name], slow_layers)
    done = list(course.rows).index(name) * settings.steps

    def losses(step: int) -> Tensor:
        rows = settings.rows(course.rows[name], name, step)
        with fast:
            loss_J = job_losses(model, tokenizer, rows, 1)
        if not past:
            return loss_J
        replayed = batch(model, tokenizer, settings.rows(past, f"{name} replayed", step))
        with torch.no_grad(), slow:
            _, stable = states(model, replayed)
        with fast:
            replayed_loss, plastic = states(model, replayed)
        return (loss_J + replayed_loss) / 2 + consistency * lag(plastic, stable)

    def after_step(step: int) -> None:
        follow(slow, fast, min(1 - 1 / (done + step + 1), decay))

    course.run(fast, losses, after_step=after_step)
    return [slow.layers_of(name), fast.layers_of(name)]


@torch.no_grad()
def follow(slow: LoraJobs, fast: LoraJobs, decay: float) -> None:
    """Set slow = decay * slow + (1 - decay) * fast, factor by factor."""
    for slow_factor, its in zip(slow.parameters(), fast.parameters(), strict=True):
        slow_factor.mul_(decay).add_(its, alpha=1 - decay)


def lag(plastic: Tensor, stable: Tensor) -> Tensor:
    """Return mean((plastic - max(plastic, stable))^2), which penalises the fast state only where the slow one is larger."""
    return (plastic - torch.maximum(plastic, stable)).square().mean()


def states(model: Any, stacked: TargetBatch) -> tuple[Tensor, Tensor]:
    """Return the mean loss of the target tokens, and all layers' hidden states at the real tokens as one vector."""
    inputs: dict[str, Any] = {**stacked.inputs, "output_hidden_states": True}
    outputs: list[Any] = []
    with model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)):
        losses_BK = token_losses(model, replace(stacked, inputs=inputs))
    real_BK = stacked.targets_BK != IGNORED
    mask_BT = stacked.inputs["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        pairs = [(outputs[0].encoder_hidden_states, mask_BT), (outputs[0].decoder_hidden_states, real_BK)]
    else:
        pairs = [(outputs[0].hidden_states, mask_BT)]
    hidden = [layer_BTI[mask].flatten().float() for layers, mask in pairs for layer_BTI in layers]
    return losses_BK.sum() / real_BK.sum(), torch.cat(hidden)


def _reservoir(course: Course, past: Sequence[str], size: int) -> list[EncodedRow]:
    """Return at most `size` rows of the tasks `past`, drawn uniformly (Vitter's algorithm R)."""
    kept: list[EncodedRow] = []
    generator = seeded(course.settings.seed, "reservoir")
    for seen, row in enumerate(row for name in past for row in course.rows[name]):
        if len(kept) < size:
            kept.append(row)
        elif (place := int(torch.randint(seen + 1, (), generator=generator))) < size:
            kept[place] = row
    return kept
