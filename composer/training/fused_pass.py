"""Several training jobs in one pass through a frozen base, as ASPEN's BatchFusion: each has its own rows of a batch.

The base runs once for all jobs. A job's gradients are those of training it alone, because no row of one job reaches the
parameters of another (Ye et al. 2023, arXiv 2312.02515).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.mixing.begun import arguments_of
from loraweave.composer.training.row_products import RowRange, add_products
from loraweave.composer.training.training_job import TrainingJob
from loraweave.routers.routing.prompts import current_prompts


class FusedPass:
    """A context manager: inside it the model's layers add each job's update to that job's rows of the batch.

    `row_counts` has the number of rows of each job, in the order of the jobs; without it all have as many. Leaving removes
    every hook, also after an exception.
    """

    def __init__(self, model: nn.Module, jobs: Sequence[TrainingJob], row_counts: Sequence[int] | None = None) -> None:
        self.model = model
        self.members = tuple(jobs)
        self.row_counts = tuple(row_counts or [1] * len(jobs))
        self._handles: list[Any] = []

    def __enter__(self) -> FusedPass:
        try:
            self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            for layer in dict.fromkeys(layer for job in self.members for layer in job.layers):
                module = self.model.get_submodule(layer)
                self._handles.append(module.register_forward_hook(self._hook(layer)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs, known = arguments_of(model, args, kwargs), current_prompts()
        start, num_rows = 0, sum(self.row_counts)
        for job, count in zip(self.members, self.row_counts, strict=True):
            place = (start, start + count, num_rows)
            own = {name: _cut(value, *place) if isinstance(value, Tensor) else value for name, value in inputs.items()}
            job.begin(own, None if known is None else _cut(known.mask_BT, *place))
            start += count

    def _hook(self, layer: str) -> Any:
        def add_updates(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self.added(layer, args[0], output)

        return add_updates

    def added(self, layer: str, x: Tensor, y: Tensor) -> Tensor:
        """y, the layer's output for x, with all jobs' updates, maybe in its own memory."""
        num_tokens, num_rows = x.numel() // x.shape[-1], sum(self.row_counts)
        ends = list(accumulate([count * num_tokens // num_rows for count in self.row_counts], initial=0))
        ranges, factors, others = [], [], []
        for job, (start, stop) in zip(self.members, pairwise(ends), strict=True):
            if layer not in job.layers:
                continue
            if (product := job.low_rank(layer)) is None:
                others.append((job, start, stop))
            else:
                ranges.append(RowRange(start, stop, product.scale))
                factors.append((product.a_RI, product.b_OR))
        if ranges:
            y = add_products(y, x, ranges, factors)
        return self._with_others(layer, others, x, y) if others else y

    def _with_others(self, layer: str, jobs: Sequence[tuple[TrainingJob, int, int]], x: Tensor, y: Tensor) -> Tensor:
        num_rows, num_tokens = sum(self.row_counts), x.numel() // x.shape[-1]
        x_BTI, y_NO = x.reshape(num_rows, -1, x.shape[-1]), y.reshape(num_tokens, -1)
        parts, end = [], 0
        for job, start, stop in jobs:
            rows = slice(start * num_rows // num_tokens, stop * num_rows // num_tokens)
            update_NO = job.update(layer, x_BTI[rows]).reshape(stop - start, -1).to(y.dtype)
            parts += [y_NO[end:start], y_NO[start:stop] + update_NO]
            end = stop
        return torch.cat([*parts, y_NO[end:]]).view_as(y)


def _cut(value: Tensor, start: int, stop: int, num_rows: int) -> Tensor:
    """The part of its first axis that is a job's, where that has the batch's rows; what has not is for all."""
    if value.ndim == 0 or len(value) % num_rows:
        return value
    copies = len(value) // num_rows
    return value[start * copies : stop * copies]
