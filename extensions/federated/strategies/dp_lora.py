"""DP-LoRA (Liu et al. 2023, arXiv 2312.17493): clients clip the gradients of each step, and add noise to them themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loraweave import TrainingError
from loraweave.extend.scoring import EncodedRow
from loraweave.extend.training import LoraJob, seeded
from loraweave.extensions.federated.strategies._privacy import PrivateStrategy, length
from loraweave.extensions.federated.strategies._strategy import (
    Course,
    Order,
    Tensors,
    Trained,
    factors_of,
    mean,
    plain_loss,
)


@dataclass(frozen=True, kw_only=True)
class DpLora(PrivateStrategy):
    """(epsilon, delta)-differential privacy for each single example, from everyone, the server too.

    In a step, a client with n examples draws each of them with probability q = min(1, batch_size / n). g_a and g_b are the
    gradients of the mean loss of those drawn, 0 where none is, in the a and in the b of all layers. With
    clip(g) = g min(1, C / |g|), C being `clip`, and z standard normal, the client moves

        a by -rate (clip(g_a) + sigma S z)    and    b by -rate (clip(g_b) + sigma S z).

    This is the paper's Algorithm 1, which clips the gradient of a whole batch (`clip_by` "batch"). One example can turn both
    clipped gradients round there, so S = 2 sqrt(2) C. With `clip_by` "example" the gradients g_i of each example's own loss
    are clipped, as in DP-SGD (Abadi et al. 2016, arXiv 1607.00133): the brackets are then (sum of clip(g_i) + sigma S z) /
    (q n), with S = sqrt(2) C.

    The server takes the mean of the clients' a and b, in which all count alike. sigma is the least noise whose epsilon by
    the Renyi accountant of opacus is at most `epsilon`, after all steps of all rounds at the q of the smallest client; that
    a client may sit out rounds (`participation`) is not counted in its favour. The paper's own sigma is sigma S / C; its
    bound on it is for one step, in which one example changes a gradient by at most C.

    A client sends a and b and nothing else, so reports have no losses. n is taken as known. The seed, from which draws and
    noise follow, is not for others. Raises PackageMissing without opacus, TrainingError for an epsilon that no noise
    reaches and for clients whose rows have more than one example in them.
    """

    clip_by: Literal["batch", "example"] = "batch"

    def require(self, course: Course) -> None:
        if mixed := [client.name for client in course.clients.values() if not client.rows_apart]:
            raise TrainingError(
                f"strategy 'dp_lora' protects single examples, and rows of client {mixed[0]!r} have several in them: give "
                "pairs without demonstrations, and no Texts"
            )
        super().require(course)

    @property
    def sensitivity(self) -> float:
        """S, the largest change that one example can make to the sum that noise is added to."""
        return math.sqrt(2) * self.clip * (2 if self.clip_by == "batch" else 1)

    def exposure(self, course: Course, rounds: int) -> dict[str, Any]:
        highest_rate = max(_rate(course, client) for client in course.clients)
        return {"steps": rounds * course.settings.steps, "sample_rate": highest_rate}

    def train(self, course: Course, order: Order) -> Trained:
        settings, sigma = course.settings, self.noise(course)
        job = self.job(course, order)
        for step in range(settings.steps):
            gradients = self.gradients(course, job, drawn(course, order, step))
            generator = seeded(settings.seed, "noise", order.client, order.round, step)
            share = 1.0 if self.clip_by == "batch" else 1 / min(settings.batch_size, len(course.clients[order.client].rows))
            with torch.no_grad():
                for parameter, gradient in zip(job.parameters(), gradients, strict=True):
                    z = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                    parameter -= settings.rate(step) * share * (gradient + sigma * self.sensitivity * z)
        return Trained(factors_of(job), {}, ())

    def aggregate(self, course: Course, server: Tensors, updates: Mapping[str, Tensors], number: int) -> Tensors:
        return mean(list(updates.values()), [1.0] * len(updates))

    def gradients(self, course: Course, job: LoraJob, rows: Sequence[EncodedRow]) -> list[Tensor]:
        """Return the sum of the clipped gradients of the job's parameters, clipped once for all rows or for each row."""
        summed = [torch.zeros_like(parameter) for parameter in job.parameters()]
        for part in [rows] if self.clip_by == "batch" and rows else [[row] for row in rows]:
            loss = plain_loss(course, job, part)
            gradients = torch.autograd.grad(loss, job.parameters(), allow_unused=True, materialize_grads=True)
            for kind in (0, 1):
                for total, gradient in zip(summed[kind::2], clipped(gradients[kind::2], self.clip), strict=True):
                    total += gradient
        return summed


def drawn(course: Course, order: Order, step: int) -> list[EncodedRow]:
    """Return the rows of a client's step, each drawn independently by the seed, the client, the round and the step."""
    rows = course.clients[order.client].rows
    generator = seeded(course.settings.seed, "rows", order.client, order.round, step)
    chance = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    rate = _rate(course, order.client)
    return [row for row, value in zip(rows, chance.tolist(), strict=True) if value < rate]


def clipped(gradients: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Return the gradients, scaled to a joint norm of at most `limit`; zeros if one is not finite, which would leak rows."""
    size = length(gradients)
    if not math.isfinite(size):
        return [torch.zeros_like(gradient) for gradient in gradients]
    return [gradient * min(1.0, limit / max(size, 1e-30)) for gradient in gradients]


def _rate(course: Course, client: str) -> float:
    """Return the probability with which each of a client's examples is in a step."""
    return min(1.0, course.settings.batch_size / len(course.clients[client].rows))
