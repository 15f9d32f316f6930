"""GS-LoRA: forgetting tasks by updates of few blocks, chosen by a group lasso (Zhao et al., CVPR 2024)."""

import torch
from torch import Tensor

from loraweave import Adapter, Task, TrainingError
from loraweave.extend import GivenRows, NonNegative, Whole
from loraweave.extend.routing import block_of
from loraweave.extend.training import LoraJobs, job_losses
from loraweave.extensions.continual.course import Course, Layers, by_prefix


def gs_lora(
    course: Course,
    *,
    retain: Task | GivenRows = (),
    bound: NonNegative = 5.0,
    strength: NonNegative = 0.15,
    sparsity: NonNegative = 0.3,
    dense_steps: Whole = 10,
) -> dict[str, Adapter]:
    """Return {task t: the sum of the updates that made the model forget tasks 0 to t}; the tasks are to be forgotten.

    Each update is trained over the frozen earlier ones, with the loss CE(retain) + strength * max(0, bound - CE(forget)) +
    sparsity * the sum over blocks g of sqrt(n_g) * |theta_g|, theta_g being the n_g entries of all factors of a block's
    target layers (arXiv 2403.11530). `retain` are examples of what must stay; `bound` is in nats a token: beyond it a task
    counts as forgotten. The paper adapts the feed-forward layers: target_modules=("up_proj", "down_proj").

    A gradient of the norms never makes a block zero. Instead, after each step but the first `dense_steps`, theta_g is drawn
    towards 0 by rate * sparsity * sqrt(n_g), and where that is more than its norm the block is 0 from there on (the proximal
    step; without gradient in a and b it could not come back). AdamW moves an entry by about the rate in a step, hence the
    sqrt(n_g), which the paper does not have: a sparsity of 1 takes back all that a step can do, and a block that does not
    learn is 0 after rates of about 0.02 / sparsity in all. Raises TrainingError without `retain`.
    """
    kept = course.encoded(retain)
    if not kept:
        raise TrainingError("gs_lora needs retain=examples of what must not be forgotten, in options")

    def learn(name: str, prefix: Layers) -> Layers:
        jobs = course.jobs([name])
        zeroed: set[str] = set()

        def losses(step: int) -> Tensor:
            forgotten = course.settings.rows(course.rows[name], name, step)
            rows = [*course.settings.rows(kept, f"{name} retained", step), *forgotten]
            with course.frozen(prefix), jobs:
                both = job_losses(course.model, course.tokenizer, rows, 2)
            return both[:1] + strength * (bound - both[1:]).clamp(min=0)

        def after_step(step: int) -> None:
            if step >= dense_steps:
                shrink(jobs, course.settings.rate(step) * sparsity, zeroed)

        course.run(jobs, losses, after_step=after_step)
        return jobs.layers_of(name)

    return by_prefix(course, learn)


@torch.no_grad()
def shrink(jobs: LoraJobs, threshold: float, zeroed: set[str]) -> None:
    """Scale each block's n factors by max(0, 1 - threshold * sqrt(n) / their norm); add blocks that become 0 to `zeroed`."""
    for block, tensors in blocks(jobs).items():
        norm = float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())
        size = sum(tensor.numel() for tensor in tensors)
        # AdamW's moments of earlier gradients would move a zeroed block again
        if block in zeroed or norm <= threshold * size**0.5:
            zeroed.add(block)
        for tensor in tensors:
            tensor.mul_(0.0 if block in zeroed else 1 - threshold * size**0.5 / norm)


def blocks(jobs: LoraJobs) -> dict[str, list[Tensor]]:
    """Return the factors of each block: a layer's path up to the first number, or the whole path without one."""
    factors_by_block: dict[str, list[Tensor]] = {}
    for layer, pair in (item for job in jobs.members for item in job.factors.items()):
        factors_by_block.setdefault(block_of(layer) or layer, []).extend(pair)
    return factors_by_block
