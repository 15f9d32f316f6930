"""InfLoRA: each task learns in a subspace that earlier tasks' inputs hardly reach (Liang and Li, CVPR 2024)."""

from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from loraweave import Adapter, Factors, TrainingError
from loraweave.extend import Count, Fraction
from loraweave.extend.scoring import batch, target_logits
from loraweave.extensions.continual.course import Course, Layers, added

ROWS_AT_ONCE = 8


def inflora(
    course: Course, *, energy_first: Fraction = 0.95, energy_last: Fraction = 1.0, max_examples: Count = 256
) -> dict[str, Adapter]:
    """Return {task t: the sum of the updates of tasks 0 to t}; of a task's update a is designed and frozen, b is trained.

    H = X^T X / n over the inputs of a layer for the task's examples (at most `max_examples`), and M is an orthonormal basis
    of what matters to earlier tasks (arXiv 2404.00228). The rows of a are the largest left singular vectors of H - M M^T H,
    over sqrt(3). Hence a M = 0, and an earlier task's input x meets it with |a x|^2 <= |x - M M^T x|^2 / 3. After a task,
    with its update in the model, M grows by the fewest directions that leave at most 1 - e of tr H outside, where
    e = energy_first + (energy_last - energy_first) * t / number of tasks (DualGPM).

    Where fewer than `rank` directions are free, a layer gets as many as there are. Energy is tr H, that of the inputs; the
    authors' code takes the squares of H's singular values, with which fewer directions are kept. It also stores the
    complement of an M of more than half of all directions, which is the same space. Their loss over the current classes
    alone has no counterpart for texts. Raises TrainingError when nothing is free in a layer.
    """
    adapters: dict[str, Adapter] = {}
    prefix = course.first
    bases = {layer: torch.zeros(inputs, 0, dtype=torch.float64) for layer, (_, inputs) in course.layers.items()}
    for number, name in enumerate(course.rows):
        (adapters[name],) = course.once(name, partial(_learn, course, name, prefix, bases, max_examples))
        prefix = adapters[name].layers
        if number + 1 < len(course.rows):
            energy = energy_first + (energy_last - energy_first) * number / len(course.rows)
            grams = input_grams(course, name, prefix, max_examples)
            bases = {layer: grown(basis, grams[layer], energy) for layer, basis in bases.items()}
    return adapters


def _learn(course: Course, name: str, prefix: Layers, bases: dict[str, Tensor], max_examples: int) -> list[Layers]:
    grams, rank = input_grams(course, name, prefix, max_examples), course.settings.rank
    begin = {}
    for layer, (num_outputs, _) in course.layers.items():
        a_RI = designed(grams[layer], bases[layer], rank).float()
        if not len(a_RI):
            raise TrainingError(
                f"task {name!r} has nowhere to learn in layer {layer!r}: earlier tasks take all {a_RI.shape[1]} directions "
                "of its input; lower energy_first and energy_last"
            )
        begin[layer] = Factors(a_RI, torch.zeros(num_outputs, len(a_RI)))
    jobs = course.jobs([name], begin)
    for job in jobs.members:
        job.freeze_a()
    course.run(jobs, course.plain(jobs, prefix))
    return [added(prefix, jobs.layers_of(name))]


@torch.no_grad()
def input_grams(course: Course, name: str, update: Layers, max_examples: int) -> dict[str, Tensor]:
    """Return gram_II = X^T X / n of each target layer, float64 on the CPU, over n real tokens of the task's first examples.

    `update` is in the model. An encoder-decoder runs its examples one by one, without padding.
    """
    model = course.model
    alone = bool(model.config.is_encoder_decoder)
    rows, size = course.rows[name][:max_examples], 1 if alone else ROWS_AT_ONCE
    grams = {layer: torch.zeros(inputs, inputs, dtype=torch.float64) for layer, (_, inputs) in course.layers.items()}
    counts = dict.fromkeys(grams, 0)
    mask_BT = torch.zeros(0)

    def see(layer: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_NI = (args[0].flatten(0, -2) if alone else args[0][mask_BT]).double().cpu()
        grams[layer].addmm_(x_NI.T, x_NI)
        counts[layer] += len(x_NI)

    with ExitStack() as stack:
        stack.enter_context(course.frozen(update))
        for layer in grams:
            stack.callback(model.get_submodule(layer).register_forward_pre_hook(partial(see, layer)).remove)
        for first in range(0, len(rows), size):
            stacked = batch(model, course.tokenizer, rows[first : first + size])
            mask_BT = stacked.inputs["attention_mask"].bool()
            target_logits(model, stacked)
    return {layer: gram_II / max(1, counts[layer]) for layer, gram_II in grams.items()}


def designed(gram_II: Tensor, basis_IM: Tensor, rank: int) -> Tensor:
    """Return a_RI: the top left singular vectors of H - M M^T H (H gram, M basis), orthogonal to M, of norm 1 / sqrt(3)."""
    outside_II = gram_II - basis_IM @ (basis_IM.T @ gram_II)
    return _largest(outside_II @ outside_II.T, basis_IM)[1][:, :rank].T / 3**0.5


def grown(basis_IM: Tensor, gram_II: Tensor, energy: float) -> Tensor:
    """Return the basis with the fewest more directions that leave at most (1 - energy) * tr gram_II outside the basis."""
    outside_II = gram_II - basis_IM @ (basis_IM.T @ gram_II)
    outside_II = outside_II - (outside_II @ basis_IM) @ basis_IM.T
    values, directions_IM = _largest(outside_II, basis_IM)
    left = values.sum() - values.cumsum(dim=0)
    allowed = (1 - energy) * gram_II.trace()
    if float(values.sum()) <= float(allowed):
        return basis_IM
    count = int((left > allowed).sum()) + 1
    return cast(Tensor, torch.linalg.qr(torch.cat([basis_IM, directions_IM[:, :count]], dim=1)).Q)


def _largest(symmetric_II: Tensor, basis_IM: Tensor) -> tuple[Tensor, Tensor]:
    """Return (eigenvalues from the largest down, at least 0; eigenvectors) of the matrix, orthogonal to the basis."""
    num_free = len(basis_IM) - basis_IM.shape[1]
    # this makes the basis the smallest eigenvectors, apart from other directions of value 0
    lowered_II = symmetric_II - (1 + symmetric_II.trace()) * basis_IM @ basis_IM.T
    values, vectors_II = torch.linalg.eigh((lowered_II + lowered_II.T) / 2)
    free_IM = vectors_II.flip(1)[:, :num_free]
    free_IM = torch.linalg.qr(free_IM - basis_IM @ (basis_IM.T @ free_IM)).Q
    return values.flip(0)[:num_free].clamp(min=0), free_IM
