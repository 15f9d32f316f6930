"""What a shared step of several training jobs costs, beside peft's steps one after the other and the base's own pass.

    python -m benchmarks training speed
    python -m benchmarks training speed --targets all --rows 4 --tokens 128
    python -m benchmarks training memory --jobs 4 --rows 4 --tokens 64       the estimate of a step's memory beside its peak

Four jobs of rank 8, 8 rows of 24 tokens each, the last 6 being the target. All begin from the same factors; losses and
gradients are compared before anything is timed. A step is forward, backward, clipping and AdamW; the base's pass is its
forward and its backward through the activations, with frozen weights, over the rows of all jobs.

peft runs twice: on our batches, whose logits are made where a target is predicted, and as its users run it, with labels,
where the model makes the logits of all tokens. Memory is measured for one size a process, since on a CPU the peak is the
whole process's since it began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

import loraweave as lw
from benchmarks._models import ALL, ATTENTION, LIMIT, RANK, base_model, difference, gradient_norm, in_peft, tokens
from benchmarks._run import Run, Table
from benchmarks._timing import Gate, Way, compare, require
from loraweave.composer.model.batches import IGNORED, TargetBatch, token_losses, with_positions
from loraweave.composer.model.kinds import linear
from loraweave.composer.train.jobs import LoraJobs, LoraSettings, Pace
from loraweave.composer.train.state import JobProgress, PlannedJob

NUM_JOBS = 4
NUM_TARGETS = 6
CLIP = 1.0
LR = 1e-4
MEMORY_STEPS = 2

app = typer.Typer()
Targets = Annotated[Literal["qv", "all"], typer.Option(help="layers that are trained")]
Rows = Annotated[int, typer.Option(help="of each job in a step")]


class Jobs:
    """The same jobs, fused in our batch and as trainable adapters of one PeftModel."""

    def __init__(self, model: Any, endings: tuple[str, ...], rows: int, length: int, seed: int) -> None:
        self.model = model
        layers = {
            name: shape[:2]
            for name, module in model.named_modules()
            if name.endswith(endings) and (shape := linear.shape(module))
        }
        names = [f"job{number}" for number in range(NUM_JOBS)]
        self.fused = LoraJobs(model, layers, names, LoraSettings(rank=RANK, alpha=float(RANK), seed=seed))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, b_OR in (pair for job in self.fused.members for pair in job.factors.values()):
                # not zero as at the start, or a would have no gradient to compare
                b_OR.copy_(torch.randn(b_OR.shape, generator=generator) * 0.02)
        adapters = [lw.Adapter(name, model.name_or_path, self.fused.layers_of(name)) for name in names]
        self.peft = in_peft(model, adapters, trainable=True)
        self.peft_base = self.peft.get_base_model()
        ids_BT = tokens(model, NUM_JOBS * rows, length, seed)
        self.batch = self._batch(ids_BT)
        self.batches = {name: self._batch(ids) for name, ids in zip(names, ids_BT.chunk(NUM_JOBS), strict=True)}
        pace = Pace(1_000_000, LR, rows, seed)
        self.running = [
            JobProgress(PlannedJob(job.name, lambda job=job: job, 0, [], pace))  # type: ignore[misc]
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
        own = [gradient_norm(job.parameters()) for job in self.fused.members]
        expected, labelled, norms = [], [], []
        for name in self.batches:
            self.peft.set_adapter(name)
            labelled.append(self.peft_labelled_loss(name))
            expected.append(self.peft_loss(name))
            norms.append(gradient_norm(self.own[name]))
        return [
            Gate("the losses of all jobs equal peft's", difference(loss_J, torch.stack(expected)), LIMIT),
            Gate("and those by labels", difference(loss_J, torch.stack(labelled)), LIMIT),
            Gate("and so do their gradients' norms", difference(torch.stack(own), torch.stack(norms)), LIMIT),
        ]


@app.command()
def speed(
    context: typer.Context,
    targets: Targets = "qv",
    rows: Rows = 8,
    tokens: Annotated[int, typer.Option(help="of each row")] = 24,
) -> None:
    """Tokens a second relative to four peft steps, and time relative to the base's own forward and backward."""
    run: Run = context.obj
    model, _ = base_model()
    jobs = Jobs(model, ALL if targets == "all" else ATTENTION, rows, tokens, run.seed)
    require(jobs.gates())
    ways = {
        "base alone, forward + backward": Way(jobs.base_pass),
        f"loraweave, {NUM_JOBS} jobs in one step": Way(jobs.fused_step),
        f"peft, {NUM_JOBS} steps in sequence": Way(lambda: jobs.peft_steps(jobs.peft_loss)),
        "the same, with labels": Way(lambda: jobs.peft_steps(jobs.peft_labelled_loss)),
    }
    base, _, peft, _ = ways
    tables = {"tokens a second, peft = 1": (peft, True), "time, base = 1": (base, False)}
    compare(run, f"{NUM_JOBS} jobs x {rows} rows x {tokens} tokens, {targets}", ways, tables)


@app.command()
def memory(
    context: typer.Context,
    jobs: Annotated[int, typer.Option(help="that share a step")] = NUM_JOBS,
    rows: Rows = 4,
    tokens: Annotated[int, typer.Option(help="of each row, about")] = 64,
    targets: Targets = "qv",
) -> None:
    """The memory that a step of fused training was estimated to take, beside what it took."""
    model, tokenizer = base_model()
    # about a token a word
    words = " ".join(["word"] * (tokens - 16))
    tasks = {f"task {number}": lw.Task([(f"{words} {number}", "one two three")] * rows) for number in range(jobs)}
    size: dict[str, Any] = {
        "batch_size": rows,
        "jobs_per_batch": jobs,
        "target_modules": ALL if targets == "all" else ATTENTION,
    }
    report = lw.train_adapters(model, tokenizer, tasks, steps=MEMORY_STEPS, progress=False, **size).report
    if report.peak_bytes is None:
        raise SystemExit("no peak was measured: the process had used more before")
    computed = report.num_computed // (report.num_steps * jobs * rows)
    table = Table(f"{jobs} jobs x {rows} rows x {computed} tokens, {targets}", ("estimated, MB", "measured, MB", "ratio"))
    megabytes = (f"{value / 1e6:,.0f}" for value in (report.estimated_bytes, report.peak_bytes))
    table.add(*megabytes, f"{report.estimated_bytes / report.peak_bytes:.2f}")
    context.obj.show(table)
