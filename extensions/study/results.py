"""The figures of a study: values with 95 % intervals, and differences from one method, over the same resampled items.

A share of right answers, a metric that is 0 or 1 for each item, has Wilson's interval, which has a width also where all
answers are right. Other values, and all differences, have that of bootstrap draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loraweave.extend import ShownTable
from loraweave.extend.scoring import wilson
from loraweave.extensions.study.cells import Answers, Cell, Store
from loraweave.extensions.study.metrics import Metric
from loraweave.extensions.study.study_file import Study, StudyTask

RESAMPLES = 2000
# the row of a method over all tasks
ALL = "mean"


@dataclass(frozen=True)
class Figure:
    """A method's value on a task, or its mean over all tasks, with its 95 % interval.

    `difference` is that from the reference, and nan for the reference itself or where it has no answers. Its interval is
    the 2.5 and 97.5 percentiles of draws that resample the seeds and the test items of every task, the same for all methods.
    """

    shots: int
    metric: str
    task: str
    method: str
    value: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    num_seeds: int
    num_items: int
    seconds: float
    cpu_seconds: float


class Draws(NamedTuple):
    """A value, followed in `values_R` by its value on each bootstrap draw.

    `share_of` is the number of items if the value is a share of them, else None; `are_independent` is True if each of these
    items was answered once, with one task and one seed.
    """

    values_R: np.ndarray
    share_of: int | None
    are_independent: bool

    def summed(self) -> tuple[float, float, float]:
        """Return (value, low, high), the value with its 95 % interval."""
        value, drawn_R = float(self.values_R[0]), self.values_R[1:]
        if self.share_of is None:
            low, high = (float(limit) for limit in np.percentile(drawn_R, [2.5, 97.5]))
        else:
            low, high = wilson(value, self.share_of, None if self.are_independent else drawn_R)
        return value, low, high

    @classmethod
    def mean(cls, parts: Sequence[Draws]) -> Draws:
        """Return the mean of values that were drawn independently of each other."""
        counts = [part.share_of for part in parts]
        share_of = None if None in counts else sum(count or 0 for count in counts)
        values_R = np.mean([part.values_R for part in parts], axis=0)
        return cls(values_R, share_of, len(parts) == 1 and parts[0].are_independent)


@dataclass(frozen=True)
class StudyResults:
    """The results of a study so far: its figures, the answers of its cells, and {cell: reason} of those that failed."""

    study: Study
    figures: tuple[Figure, ...]
    answers: Mapping[Cell, Answers]
    failures: Mapping[str, str]
    folder: Path

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"StudyResults({len(self.answers)} cells{failed}, in {str(self.folder)!r})\n{self.table()!r}"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Return (title, column names, rows) of the table of each metric and number of examples that has figures."""
        having = {(figure.metric, figure.shots) for figure in self.figures}
        return [
            (f"{metric.name}{' (%)' if metric.percent else ''}, {shots} examples", *self.cells(metric.name, shots))
            for shots in self.study.shots
            for metric in self.study.used_metrics
            if (metric.name, shots) in having
        ]

    def table(self, metric: str | None = None, shots: int | None = None) -> ShownTable:
        """Return a table of methods by tasks for a metric and a number of examples, by default the study's first ones."""
        columns, rows = self.cells(
            metric or self.study.used_metrics[0].name, self.study.shots[0] if shots is None else shots
        )
        return ShownTable.of(columns, rows)

    def cells(self, metric: str, shots: int) -> tuple[list[str], list[list[str]]]:
        """Return (column names, rows of texts) of the table of methods by tasks for a metric and a number of examples."""
        figures = {(row.task, row.method): row for row in self.figures if (row.metric, row.shots) == (metric, shots)}
        shown = next(used for used in self.study.used_metrics if used.name == metric)
        tasks = [
            name for name in [ALL, *(task.name for task in self.study.tasks)] if any(task == name for task, _ in figures)
        ]
        if len(tasks) == 2:
            # the mean over one task is that task
            tasks = tasks[1:]
        columns = ["method", *tasks, f"less {self.study.reference}", "seconds"]
        rows = []
        for method in self.study.methods:
            row = [figures.get((task, method.name)) for task in tasks]
            cells = ["-" if one is None else _with_bounds((one.value, one.low, one.high), shown) for one in row]
            less = seconds = "-"
            if row and (first := row[0]) is not None:
                seconds = f"{first.seconds:.1f}"
                if not np.isnan(first.difference):
                    less = _with_bounds((first.difference, first.difference_low, first.difference_high), shown, sign="+")
            rows.append([method.name, *cells, less, seconds])
        return columns, rows


def _with_bounds(numbers: Sequence[float], metric: Metric, sign: str = "") -> str:
    """Return "value [low, high]"."""
    scale, digits = (100, 1) if metric.percent else (1, 3)
    value, low, high = (f"{scale * number:{sign}.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def results_of(study: Study, cells: Sequence[Cell], store: Store, failures: Mapping[str, str], folder: Path) -> StudyResults:
    """Return the results of the study, with the figures of all cells that have answers in the store."""
    read = {cell.key: store.read(cell) for cell in {cell.key: cell for cell in cells}.values() if store.has(cell)}
    answers = {cell: read[cell.key] for cell in cells if cell.key in read}
    failed = {str(cell): failures[cell.key] for cell in cells if cell.key in failures}
    figures = []
    for shots in study.shots:
        of_shots = {cell: cell_answers for cell, cell_answers in answers.items() if cell.shots == shots}
        for metric in study.used_metrics:
            figures += _figures(study, shots, metric, of_shots)
    return StudyResults(study, tuple(figures), answers, failed, folder)


def _figures(study: Study, shots: int, metric: Metric, answers: Mapping[Cell, Answers]) -> list[Figure]:
    tasks = [task for task in study.tasks if metric.name in [used.name for used in task.metrics]]
    sizes = {task.name: len(task.test) for task in tasks}
    by_seed: dict[tuple[str, str], dict[int, Answers]] = {}
    for cell, cell_answers in answers.items():
        by_seed.setdefault((cell.task.name, cell.method.name), {})[cell.seed] = cell_answers
    draws = {
        (task.name, method.name): _draws(task, metric, by_seed[task.name, method.name], study.seeds)
        for task in tasks
        for method in study.methods
        if (task.name, method.name) in by_seed
    }
    figures = []
    for method in study.methods:
        having = [name for name in sizes if (name, method.name) in draws]
        # means over different tasks cannot be compared
        whole = [(ALL, having)] if having and len(having) == len(tasks) else []
        for row, of_row in [*((name, [name]) for name in having), *whole]:
            drawn = Draws.mean([draws[name, method.name] for name in of_row])
            reference = [draws[name, study.reference] for name in of_row if (name, study.reference) in draws]
            less_R = np.full(len(drawn.values_R), np.nan)
            if len(reference) == len(of_row) and method.name != study.reference:
                less_R = drawn.values_R - Draws.mean(reference).values_R
            spent = [by_seed[name, method.name] for name in of_row]
            numbers = min(map(len, spent)), sum(sizes[name] for name in of_row)
            times = [(cell.seconds, cell.cpu_seconds) for of_task in spent for cell in of_task.values()]
            bounds = (*drawn.summed(), *Draws(less_R, None, False).summed())
            means = np.mean(times, axis=0).tolist()
            figures.append(Figure(shots, metric.name, row, method.name, *bounds, *numbers, *means))
    return figures


def _draws(task: StudyTask, metric: Metric, answers: Mapping[int, Answers], seeds: Sequence[int]) -> Draws:
    """Return the metric's value on a task and on every resample: the mean over seeds of the value over items."""
    targets = [accepted for _, accepted in task.test]
    # cells that share a key share their answers
    parts: dict[Answers, np.ndarray] = {}
    is_share = metric.is_mean
    for cell_answers in dict.fromkeys(answers.values()):
        counts_NK = metric.parts(cell_answers.answers, targets, cell_answers.losses, cell_answers.tokens)
        parts[cell_answers] = _values(task, metric, counts_NK)
        is_share = is_share and bool(np.isin(counts_NK, (0, 1)).all())
    values_SR = np.array([parts[answers[seed]] for seed in seeds if seed in answers])
    generator = np.random.default_rng(zlib.crc32(f"seeds of {task.name}".encode()))
    drawn_RS = generator.integers(0, len(values_SR), (RESAMPLES, len(values_SR)))
    resampled_R = values_SR[drawn_RS, np.arange(1, RESAMPLES + 1)[:, None]].mean(axis=1)
    values_R = np.concatenate([values_SR[:, 0].mean()[None], resampled_R])
    return Draws(values_R, len(targets) if is_share else None, len(values_SR) == 1)


def _values(task: StudyTask, metric: Metric, counts_NK: np.ndarray) -> np.ndarray:
    """Return the metric's value over all items, then over each resample of the items."""
    num_items = len(counts_NK)
    with_count_NK = np.concatenate([counts_NK, np.ones((num_items, 1))], axis=1)
    generator = np.random.default_rng(zlib.crc32(task.name.encode()))
    drawn_RN = generator.integers(0, num_items, (RESAMPLES, num_items))
    times_RN = np.apply_along_axis(np.bincount, 1, drawn_RN, minlength=num_items)
    sums_RK = np.concatenate([with_count_NK.sum(axis=0)[None], times_RN @ with_count_NK])
    return metric.value(sums_RK)
