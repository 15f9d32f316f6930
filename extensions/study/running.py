"""The function `study`: run the missing cells of a study, and write tables of all its cells."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from loraweave import Adapter, AdapterNotFound, Hub, InvalidTask, Task, load_base
from loraweave.extend import Failed, progress_bar, read_rows, spread, tracked
from loraweave.extend.commands import open_hub
from loraweave.extend.models import base_loader
from loraweave.extensions.study.cells import Answers, Cell, Store, answered, cells
from loraweave.extensions.study.methods import Case, made
from loraweave.extensions.study.report import write_report
from loraweave.extensions.study.results import StudyResults, results_of
from loraweave.extensions.study.study_file import Study, shared_instruction

# the file that every adapter folder has
CONFIG = "adapter_config.json"


def study(
    study: str | Path | Mapping[str, Any],
    *,
    model: Any = None,
    tokenizer: Any = None,
    hub: Hub | Iterable[Adapter] | None = None,
    metrics: Mapping[str, Callable[..., float]] | None = None,
    out: str | Path | None = None,
    n_jobs: int | None = None,
    progress: bool = True,
) -> StudyResults:
    """Compare methods on tasks, as a YAML file or a mapping says (docs/extensions/study.md), and return the figures.

    Every cell (task, method, number of examples, seed) is written whole to `out`/cells when it is done, under the hash of
    all that its answers depend on: a study that was interrupted goes on, and one that was changed runs what is new. A cell
    that fails is named in `failures` and tried again by the next call; the others go on. Then the tables, the plots, the
    report and all answers are written to `out`, by default the file's name with "-results".

    `model` and `tokenizer` stand for the file's `base`, `hub`, a Hub or adapters, for its `hub` or `pool`. `metrics` are
    functions by name, of an answer and the list of accepted targets, the higher the better. `n_jobs` workers, or those that
    `joblib.parallel_config` names, answer the cells, as one process would (docs/howto/many_machines.md). Raises InvalidTask
    for a file that cannot be followed, and what unknown names, adapters and options raise, before a model is loaded;
    BaseModelMismatch where `out` has answers of another base, WorkersFailed if workers are unavailable or lost.
    """
    read = Study.read(study, metrics or {})
    folder = Path(out) if out is not None else read.out
    with _opened(read, hub, progress) as opened:
        _check(read, opened)
        wanted = cells(read, opened)
        store = Store(folder / "cells")
        missing = list({cell.key: cell for cell in wanted if not store.has(cell)}.values())
        failures: dict[str, str] = {}
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            if model is None:
                model, tokenizer = load_base(read.base, dtype=read.dtype, device=read.device)
            store.require_base(model)
            failures = _run(read, missing, opened, store, model, tokenizer, n_jobs, progress)
    results = results_of(read, wanted, store, failures, folder)
    write_report(results)
    return results


def _run(
    read: Study,
    missing: list[Cell],
    hub: Hub,
    store: Store,
    model: Any,
    tokenizer: Any,
    n_jobs: int | None,
    progress: bool,
) -> dict[str, str]:
    """Answer the missing cells by workers and store the answers; return {key: error text} of cells that failed."""
    load = base_loader(model, tokenizer, n_jobs)
    # metrics are not sent to workers, as their functions may not pickle
    settings = replace(read, tasks=(), methods=(), metrics=())
    pieces = {str(cell): replace(cell, task=replace(cell.task, metrics=())) for cell in missing}
    work = partial(_answer, load, settings, hub, token_hex(8))
    failures: dict[str, str] = {}
    with progress_bar(progress) as bar:
        for name, outcome in spread(work, pieces, n_jobs=n_jobs, label="answering", bar=bar):
            if isinstance(outcome, Failed):
                failures[pieces[name].key] = f"{type(outcome.error).__name__}: {outcome.error}"
            else:
                store.keep(pieces[name], outcome)
    _fitted.cache_clear()
    return failures


@lru_cache(maxsize=1)
def _fitted(study: str) -> dict[Any, Any]:
    """Return a dict, kept by this process while it answers the cells of one call of `study`, for trained routers."""
    return {}


def _answer(load: Callable[[], tuple[Any, Any]], read: Study, hub: Hub, call: str, cell: Cell) -> Answers:
    model, tokenizer = load()
    case = Case(
        model,
        tokenizer,
        hub,
        cell.task.name,
        cell.task.drawn(cell.shots, cell.seed),
        cell.task.oracle,
        cell.seed,
        read.limits,
        lambda name: _rows_of(read, name),
        read.allow_licenses,
        _fitted(call),
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    composition = made(cell.method, case)
    spent = time.perf_counter() - started, time.process_time() - cpu_started
    return answered(cell, read, composition, spent)


def _rows_of(read: Study, name: str) -> Task:
    """Return the training rows of an adapter of the pool as a task. Raises InvalidTask if there are none."""
    path = None if read.pool_data is None else read.pool_data / f"{name}.jsonl"
    if path is None or not path.is_file():
        where = "names no pool_data" if path is None else f"has no {path}"
        raise InvalidTask(
            f"a router is to learn from the pool, but the study {where}: the folder of NAME.jsonl for each adapter"
        )
    rows = read_rows(path, targets="several", one_split=False)
    kept = [row for row in rows if row.split in ("", "train")]
    return Task([(row.input, row.targets[0]) for row in kept], instruction=shared_instruction(kept))


def _check(read: Study, hub: Hub) -> None:
    """Raise the error of the first unknown oracle (a task's best adapter), or of a method that fails on every task."""
    for task in read.tasks:
        if task.oracle is not None:
            hub.record(task.oracle)
    for method in read.methods:
        problems: list[Exception] = []
        for task in read.tasks:
            try:
                method.check(hub, task.drawn(read.shots[0], read.seeds[0]), read.limits)
            except Exception as error:
                problems.append(error)
        if len(problems) == len(read.tasks):
            raise problems[0]


@contextmanager
def _opened(read: Study, given: Hub | Iterable[Adapter] | None, progress: bool) -> Iterator[Hub]:
    """Open the hub passed by the caller or named by the study; else a temporary one of the adapters passed or the pool's."""
    if isinstance(given, Hub):
        yield given
        return
    if given is None and read.hub is not None:
        with open_hub(read.hub) as opened:
            yield opened
        return
    sources: list[Any] = list(given) if given is not None else _folders(read)
    with tempfile.TemporaryDirectory(prefix="loraweave-study-") as folder, Hub(folder) as made:
        for source in tracked(sources, "reading adapters", total=len(sources), shown=progress):
            made.add(source)
        yield made


def _folders(read: Study) -> list[Path]:
    """Return the adapter folders that the pool names or has inside. Raises AdapterNotFound for a folder without any."""
    folders: list[Path] = []
    for folder in read.pool:
        inside = [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        if not inside:
            raise AdapterNotFound(f"no adapter folder in {folder}, which the study names as its pool")
        folders += inside
    return folders
