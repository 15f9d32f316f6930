"""LORAUTER (Dhasade et al. 2026, arXiv 2601.21795): a text is compared with tasks, whose best adapters are mixed.

The adapters' training data are not needed: a few examples of each task represent it, and tell which adapters solve it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from loraweave import Composer, CompositionError, ExpertPool, InvalidTask, Task, WeightingError
from loraweave.extend import Count, GivenRows, Positive, progress_bar, prompt_texts
from loraweave.extend.routing import Members, TextRouter, labelled_tasks
from loraweave.extend.scoring import TargetBatch, batch, encode_pairs, mean_losses, untouched

# our default: the abstract, on which this is based, names none
NUM_TASKS = 3
TEMPERATURE = 0.05


class Lorauter(TextRouter):
    """A router with w = sum over the `num_tasks` nearest tasks n of softmax(cos_n / `temperature`), shared by n's `best`.

    cos_n is the cosine of the text's vector and the mean of the vectors of task n's prompts; its best adapters are those of
    the lowest loss on its examples. `fit` measures these; `tasks` {task: prompts} and `losses` {task: {expert: loss}} are
    a table that was measured elsewhere, perhaps with more experts. By default 3 tasks, or all of fewer, and 1 adapter each.

    Raises WeightingError for a table that lacks a task or an expert.
    """

    by_expert: ClassVar[tuple[str, ...]] = ("losses_",)
    counts: ClassVar[tuple[str, ...]] = ("best",)

    keys_: Tensor
    losses_: Tensor

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        tasks: Mapping[str, Iterable[str]] | None = None,
        losses: Mapping[str, Mapping[str, float]] | None = None,
        embedder: str = "sentence",
        num_tasks: Count = NUM_TASKS,
        best: Count = 1,
        temperature: Positive = TEMPERATURE,
    ) -> None:
        super().__init__(pool, embedder)
        self.num_tasks, self.best, self.temperature = num_tasks, best, temperature
        self.register_buffer("keys_", torch.empty(0))
        self.register_buffer("losses_", torch.empty(0))
        if tasks is not None or losses is not None:
            self._learn({name: list(prompts) for name, prompts in (tasks or {}).items()}, losses or {})

    def fit(self, engine: Any, dataset: Any, *, progress: bool = True) -> Self:
        """Measure every adapter on the examples of every task; return self.

        `engine` is a Composer with a tokenizer and the router's pool, `dataset` {task: rows or a Task}, of any names, or
        rows that name an "expert", as for `Composer.fit`. The table is in `report["losses"]`.
        """
        self.require_engine(engine)
        tasks = labelled_tasks(dataset)
        losses = expert_losses(engine, tasks, progress=progress)
        prompts = {name: [task.prompt(text) for text, _ in task.examples] for name, task in tasks.items()}
        self._learn({name: prompt_texts(engine.tokenizer, task_prompts) for name, task_prompts in prompts.items()}, losses)
        return self

    def weights_of(self, vectors_ND: Tensor) -> Tensor:
        scores_NT = vectors_ND @ self.keys_.double().T
        nearest_NK = scores_NT.argsort(dim=1, descending=True, stable=True)[:, : self.num_tasks]
        shares_NK = (scores_NT.gather(1, nearest_NK) / self.temperature).softmax(dim=1)
        # stable: of equal losses the expert that stands first is better
        best_MT = self.losses_.argsort(dim=0, stable=True)[: self.best]
        answers_ET = torch.zeros_like(self.losses_, dtype=torch.float64).scatter(0, best_MT, 1 / self.best)
        return torch.einsum("nk,nke->ne", shares_NK, answers_ET.T[nearest_NK]).float()

    def _learn(self, prompts: Mapping[str, list[str]], losses: Mapping[str, Mapping[str, float]]) -> None:
        if prompts.keys() != losses.keys() or not prompts:
            odd = sorted(prompts.keys() ^ losses.keys())
            raise WeightingError(
                f"router 'lorauter' needs the prompts and the losses of the same tasks, but {odd} have only one of them; "
                "fit() measures the losses"
            )
        self.losses_ = torch.tensor([self._row(name, losses[name]) for name in prompts]).T.contiguous()
        if empty := [name for name, texts in prompts.items() if not texts]:
            raise InvalidTask(f"task {empty[0]!r} of router 'lorauter' has no prompts to know it by")
        keys = [functional.normalize(self.vectors(texts).mean(dim=0), dim=0) for texts in prompts.values()]
        self.keys_ = torch.stack(keys).float()
        self.remember_embedder()
        self.report = {"losses": {name: dict(losses[name]) for name in prompts}}

    def _row(self, task: str, losses: Mapping[str, float]) -> list[float]:
        """Return one task's losses in the order of the experts, infinity for those that are not finite.

        Raises WeightingError if an expert is missing or no loss is finite.
        """
        if missing := [name for name in self.experts if name not in losses]:
            raise WeightingError(f"the losses of task {task!r} lack {', '.join(map(repr, missing))}: measure all experts")
        row = [float(losses[name]) if math.isfinite(losses[name]) else math.inf for name in self.experts]
        if min(row) == math.inf:
            raise WeightingError(f"no expert has a finite loss on task {task!r}: look at its examples, or leave it out")
        return row


# rows of one forward pass, an example under one expert each
MAX_ROWS = 64


@torch.no_grad()
def expert_losses(
    engine: Composer, tasks: Mapping[str, Task | GivenRows], *, progress: bool = True
) -> dict[str, dict[str, float]]:
    """Return {task: {expert: loss}}, a mean over examples of their target tokens' mean loss, with that expert alone at 1.

    Raises CompositionError for an engine without a tokenizer, InvalidTask for a task without examples or with unreadable
    ones, AlreadyActive while a mixture is fused.
    """
    model, tokenizer, names = engine.model, engine.tokenizer, engine.pool.names
    if tokenizer is None:
        raise CompositionError("expert_losses() needs a tokenizer: make the Composer with tokenizer=...")
    task_by_name = {name: Task.of(task) for name, task in tasks.items()}
    if empty := [name for name, task in task_by_name.items() if not task.examples]:
        raise InvalidTask(f"a task without examples, {empty[0]!r}, tells nothing about experts: give some")
    batches = {name: list(_batches(model, tokenizer, task)) for name, task in task_by_name.items()}
    table: dict[str, dict[str, float]] = {name: dict.fromkeys(names, 0.0) for name in task_by_name}
    with untouched(model), progress_bar(progress) as bar:
        shown = bar.add_task("measuring experts", total=len(names) * len(batches))
        for name, task in task_by_name.items():
            for first in range(0, len(names), chunk := max(1, MAX_ROWS // len(task.examples))):
                some = names[first : first + chunk]
                for part in batches[name]:
                    num_rows = len(part.targets_BK)
                    with engine.activate([{expert: 1.0} for expert in some for _ in range(num_rows)]):
                        losses_B = mean_losses(model, part.tile(len(some)))
                    sums_E = losses_B.view(len(some), num_rows).double().sum(dim=1)
                    for expert, total in zip(some, sums_E.tolist(), strict=True):
                        table[name][expert] += total / len(task.examples)
                bar.update(shown, advance=len(some))
    return table


def _batches(model: Any, tokenizer: Any, task: Task) -> Iterator[TargetBatch]:
    rows = sorted(encode_pairs(model, tokenizer, task, task.examples), key=len)
    for start in range(0, len(rows), MAX_ROWS):
        yield batch(model, tokenizer, rows[start : start + MAX_ROWS])
