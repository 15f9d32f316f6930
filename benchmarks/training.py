"""What a fused step of several training jobs costs, beside peft's steps one after the other and the base's own pass.

    python benchmarks/training.py
    python benchmarks/training.py --targets all --rows 4 --tokens 128

Four jobs of rank 8, 8 rows of 24 tokens each, the last 6 being the target. All begin from the same factors; losses and
gradients are compared before anything is timed. A step is forward, backward, clipping and AdamW; the base's pass is its
forward and its backward through the activations, with frozen weights, over the rows of all jobs.

peft runs twice: on our batches, whose logits are made where a target is predicted, and as its users run it, with labels,
where the model makes the logits of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
import typer
from _adapters import ALL, ATTENTION, RANK, base_model, difference, in_peft
from _ratios import Gate, Way, compare, require
from torch import Tensor

from loraweave.composer.batches import IGNORED, TargetBatch, token_losses, with_positions
from loraweave.composer.layer_kinds.linear import shape as linear_shape
from loraweave.composer.training.fused_jobs import FusedJobs
from loraweave.composer.training.job_progress import JobProgress
from loraweave.composer.training.planned_job import PlannedJob
from loraweave.composer.training.training_recipe import Recipe
from loraweave.hub.adapter import Adapter

NUM_JOBS = 4
NUM_TARGETS = 6
CLIP = 1.0
LR = 1e-4
LIMIT = 1e-4


class Jobs:
    """The same jobs, fused in our batch and as trainable adapters of one PeftModel."""

    def __init__(self, model: Any, endings: tuple[str, ...], rows: int, tokens: int, seed: int) -> None:
        self.model = model
        layers = {
            name: shape[:2]
            for name, module in model.named_modules()
            if name.endswith(endings) and (shape := linear_shape(module))
        }
        names = [f"job{number}" for number in range(NUM_JOBS)]
        self.fused = FusedJobs(model, layers, names, rank=RANK, alpha=float(RANK), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, b_OR in (pair for job in self.fused.members for pair in job.factors.values()):
                # not zero as at the start, or a would have no gradient to compare
                b_OR.copy_(torch.randn(b_OR.shape, generator=generator) * 0.02)
        adapters = [Adapter(name, model.name_or_path, self.fused.layers_of(name)) for name in names]
        self.peft = in_peft(model, adapters, trainable=True)
        self.peft_base = self.peft.get_base_model()
        ids_BT = torch.randint(0, model.config.vocab_size, (NUM_JOBS * rows, tokens), generator=generator)
        self.batch = self._batch(ids_BT)
        self.batches = {name: self._batch(ids) for name, ids in zip(names, ids_BT.chunk(NUM_JOBS), strict=True)}
        recipe = Recipe(RANK, float(RANK), 1_000_000, LR, rows, endings, seed)
        self.running = [
            JobProgress(PlannedJob(job.name, lambda job=job: job, 0, [], recipe))  # type: ignore[misc]
            for job in self.fused.members
        ]
        self.own = {name: [p for path, p in self.peft.named_parameters() if f".{name}." in path] for name in names}
        self.optimizers = {name: torch.optim.AdamW(own, lr=LR, weight_decay=0.0) for name, own in self.own.items()}

    def _batch(self, ids_BT: Tensor) -> TargetBatch:
        return TargetBatch(with_positions(self.model, ids_BT, torch.ones_like(ids_BT)), ids_BT[:, -NUM_TARGETS:])

    def fused_losses(self) -> Tensor:
        """loss_J, with gradients in the factors."""
        with self.fused:
            loss_J = token_losses(self.model, self.batch).view(NUM_JOBS, -1).mean(dim=1)
            loss_J.sum().backward()
        return loss_J.detach()

    def fused_step(self) -> None:
        for run, loss in zip(self.running, self.fused_losses().tolist(), strict=True):
            run.take_step(loss, 0)

    def peft_loss(self, name: str) -> Tensor:
        """A job's loss, with gradients in its factors."""
        loss = token_losses(self.peft_base, self.batches[name]).mean()
        self.optimizers[name].zero_grad()
        loss.backward()
        return loss.detach()

    def peft_labelled_loss(self, name: str) -> Tensor:
        """The same, by the model's own loss of labels."""
        batch = self.batches[name]
        labels_BT = torch.full_like(batch.inputs["input_ids"], IGNORED)
        labels_BT[:, -NUM_TARGETS:] = batch.targets_BK
        loss = self.peft_base(**batch.inputs, labels=labels_BT, use_cache=False).loss
        self.optimizers[name].zero_grad()
        loss.backward()
        return loss.detach()

    def peft_steps(self, loss_of: Callable[[str], Tensor]) -> None:
        for name in self.batches:
            self.peft.set_adapter(name)
            loss_of(name)
            torch.nn.utils.clip_grad_norm_(self.own[name], CLIP)
            self.optimizers[name].step()

    def base_pass(self) -> None:
        """The frozen base's forward, and its backward down to the embeddings' output."""
        inputs = dict(self.batch.inputs)
        embedded_BTI = self.model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        length = embedded_BTI.shape[1]
        keep = torch.arange(length - NUM_TARGETS - 1, length - 1)
        logits = self.model(inputs_embeds=embedded_BTI, **inputs, logits_to_keep=keep, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.batch.targets_BK.flatten()).backward()

    def gates(self) -> list[Gate]:
        loss_J = self.fused_losses()
        own = [norm_of(job.parameters()) for job in self.fused.members]
        expected, labelled, norms = [], [], []
        for name in self.batches:
            self.peft.set_adapter(name)
            labelled.append(self.peft_labelled_loss(name))
            expected.append(self.peft_loss(name))
            norms.append(norm_of(self.own[name]))
        return [
            Gate("the losses of all jobs equal peft's", difference(loss_J, torch.stack(expected)), LIMIT),
            Gate("and those by labels", difference(loss_J, torch.stack(labelled)), LIMIT),
            Gate("and so do their gradients' norms", difference(torch.stack(own), torch.stack(norms)), LIMIT),
        ]


def norm_of(parameters: Sequence[Tensor]) -> Tensor:
    """Of all their gradients together."""
    return torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum().sqrt()


def main(
    targets: Annotated[Literal["qv", "all"], typer.Option(help="layers that are trained")] = "qv",
    rows: Annotated[int, typer.Option(help="of each job in a step")] = 8,
    tokens: Annotated[int, typer.Option(help="of each row")] = 24,
    rounds: Annotated[int, typer.Option(help="at most so many rounds")] = 15,
    seconds: Annotated[float, typer.Option(help="no round that would end later")] = 60.0,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="count processor time, for one thread on a busy machine")] = False,
    seed: Annotated[int, typer.Option(help="of the factors and the tokens")] = 0,
) -> None:
    """Tokens a second relative to four peft steps, and time relative to the base's own forward and backward."""
    torch.set_num_threads(threads)
    model, _ = base_model()
    model.requires_grad_(False)
    jobs = Jobs(model, ALL if targets == "all" else ATTENTION, rows, tokens, seed)
    require(jobs.gates())
    ways = {
        "base alone, forward + backward": Way(jobs.base_pass),
        f"loraweave, {NUM_JOBS} jobs in one step": Way(jobs.fused_step),
        f"peft, {NUM_JOBS} steps in sequence": Way(lambda: jobs.peft_steps(jobs.peft_loss)),
        "the same, with labels": Way(lambda: jobs.peft_steps(jobs.peft_labelled_loss)),
    }
    base, _, peft, _ = ways
    title = f"{NUM_JOBS} jobs x {rows} rows x {tokens} tokens, {targets}, {threads} thread(s)"
    tables = {"tokens a second, peft = 1": (peft, True), "time, base = 1": (base, False)}
    compare(title, ways, rounds=rounds, seconds=seconds, cpu=cpu, tables=tables)


if __name__ == "__main__":
    typer.run(main)
