"""Tasks in their order, and what all ways of training one after the other share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from loraweave.common.rows import GivenRows
from loraweave.composer.model.batches import EncodedRow
from loraweave.composer.train.passes import JobTraining, LoraJobs, Losses, job_losses
from loraweave.composer.train.rows import encode_task
from loraweave.composer.train.state import load_adapter, save_adapter
from loraweave.errors import TrainingError
from loraweave.hub.adapter import Adapter
from loraweave.lowrank import algebra
from loraweave.types import Factors, Fingerprint, Task

Layers = Mapping[str, Factors]


@dataclass(frozen=True)
class Course:
    """`tasks` in the order in which they are learned; `start` is the adapter that the first one begins from.

    `layers` has (O, I) of each target layer, `settings` the options of this way of training. With `folder`, a checkpoint,
    what is made `once` is kept there.
    """

    way: str
    settings: Mapping[str, Any]
    training: JobTraining
    layers: Mapping[str, tuple[int, int]]
    tasks: Mapping[str, Task]
    rows: Mapping[str, Sequence[EncodedRow]]
    start: Adapter | None
    base: Fingerprint
    jobs_per_batch: int
    folder: Path | None

    @property
    def first(self) -> Layers:
        """What is in the model before the first task."""
        return {} if self.start is None else self.start.layers

    def jobs(self, names: Sequence[str], start: Layers | None = None) -> LoraJobs:
        """New factors for each name, or copies of `start`."""
        recipe, given = self.training.recipe, {} if start is None else dict.fromkeys(names, start)
        return LoraJobs(
            self.training.model, self.layers, names, rank=recipe.rank, alpha=recipe.alpha, seed=recipe.seed, start=given
        )

    @contextmanager
    def frozen(self, layers: Layers) -> Iterator[None]:
        """Within it the model has the update, which gets no gradient."""
        if not layers:
            yield
            return
        recipe = self.training.recipe
        held = LoraJobs(self.training.model, {}, [""], rank=1, alpha=1.0, seed=recipe.seed, start={"": layers})
        for tensor in held.parameters():
            tensor.requires_grad_(False)
        with held:
            yield

    def plain(self, jobs: LoraJobs, frozen: Layers) -> Losses:
        """Each job's loss on the rows of its task, over a frozen update."""
        training = self.training

        def losses(step: int) -> Tensor:
            chosen = [row for job in jobs.jobs for row in training.recipe.rows(self.rows[job], job, step)]
            with self.frozen(frozen), jobs:
                return job_losses(training.model, training.tokenizer, chosen, len(jobs.jobs))

        return losses

    def encoded(self, examples: Task | GivenRows) -> list[EncodedRow]:
        """Examples that an option brings, in token ids."""
        return encode_task(self.training.model, self.training.tokenizer, Task.of(examples))

    def once(self, name: str, make: Callable[[], Sequence[Layers]], kinds: Sequence[str] = ("",)) -> list[Adapter]:
        """The updates, one of each kind, that are known when task `name` is learned: made, or taken from the checkpoint."""
        keys = [self._key(name, kind) for kind in kinds]
        kept = [] if self.folder is None else [load_adapter(self.folder, key) for key in keys]
        if kept and None not in kept:
            return [self._ordered(adapter) for adapter in kept if adapter is not None]
        card = {"recipe": {**self._recipe, "after": self._until(name)}}
        path = self.training.model.name_or_path
        made = [Adapter(name, path, layers, self.base, card) for layers in make()]
        if self.folder is not None:
            for key, adapter in zip(keys, made, strict=True):
                save_adapter(self.folder, key, adapter)
        return made

    def _until(self, name: str) -> list[str]:
        names = list(self.tasks)
        return names[: names.index(name) + 1]

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.settings.items() if value is None or isinstance(value, int | float | str)}
        begin = {} if self.start is None else {"start": {"hash": self.start.hash, "name": self.start.name}}
        recipe = asdict(self.training.recipe)
        return {"method": "loraweave.train_adapters", **recipe, "continual": self.way, "settings": plain, **begin}

    def _key(self, name: str, kind: str) -> str:
        """A hash of all that an update which is known after `name` depends on."""
        until = [[task, *asdict(self.tasks[task]).values()] for task in self._until(name)]
        settings = sorted((key, repr(value)) for key, value in self.settings.items())
        content = json.dumps([self._recipe, settings, until, len(self.tasks), self.base.to_json(), kind], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _ordered(self, adapter: Adapter) -> Adapter:
        """Its layers in the model's order, as they were when it was made: sums over layers then round alike."""
        names = [name for name, _ in self.training.model.named_modules() if name in adapter.layers]
        return replace(adapter, layers={name: adapter.layers[name] for name in names})


def added(first: Layers, second: Layers) -> dict[str, Factors]:
    """The exact sum of two updates; the rank rows of the first come first."""
    names = dict.fromkeys([*first, *second])
    return {name: algebra.add([part[name] for part in (first, second) if name in part]) for name in names}


def require_within(name: str, value: Any, low: float, high: float) -> None:
    """Raises TrainingError for a value that is not a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise TrainingError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
