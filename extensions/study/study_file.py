"""The strict reader of a study's file: base, adapters, tasks and methods, and the settings of answering and scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from loraweave import InvalidTask, PackageMissing, Task
from loraweave.extend import Prompt, Row, check_options, is_list, is_whole, read_rows, read_yaml
from loraweave.extensions.study.methods import Method
from loraweave.extensions.study.metrics import Metric, metric_of

NUM_TEST = 100
DTYPES = ("float32", "bfloat16", "float16")
# the fields of a Task that a task of the study's file may set
TASK_FIELDS = ("instruction", "labels", "template", "stop", "chat", "system")
TASK_KEYS = ("name", "file", "test", "dataset", "columns", "oracle", "metrics", *TASK_FIELDS)
DATASET_KEYS = ("path", "name", "train", "test")


@dataclass(frozen=True, eq=False)
class StudyTask:
    """A task with rows to draw examples from (`train`) and rows to answer (`test`), the same for every seed and method."""

    name: str
    train: tuple[tuple[Prompt, str], ...]
    test: tuple[tuple[Prompt, tuple[str, ...]], ...]
    task_fields: Mapping[str, Any]
    oracle: str | None
    metrics: tuple[Metric, ...]

    def drawn(self, shots: int, seed: int) -> Task:
        """Return the task with `shots` examples drawn by the seed; a smaller draw is the beginning of a larger one."""
        if shots > len(self.train):
            raise InvalidTask(f"task {self.name!r} has {len(self.train)} rows to draw {shots} examples from; ask for fewer")
        order = np.random.default_rng(seed).permutation(len(self.train))[:shots]
        return Task([self.train[place] for place in order], **self.task_fields)


@dataclass(frozen=True)
class Study:
    """The settings of a study; the names of the fields are the keys of its file."""

    tasks: tuple[StudyTask, ...]
    methods: tuple[Method, ...]
    base: str | None = None
    dtype: str | None = None
    device: str | None = None
    hub: str | None = None
    pool: tuple[Path, ...] = ()
    pool_data: Path | None = None
    shots: tuple[int, ...] = (5,)
    seeds: tuple[int, ...] = (0,)
    metrics: tuple[Metric, ...] = ()
    num_test: int = NUM_TEST
    k: int = 20
    budget: int | None = 40
    seconds: float | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    normalise: tuple[str, ...] | None = None
    reference: str = ""
    allow_licenses: bool = False
    out: Path = field(default=Path("study"))

    @property
    def limits(self) -> dict[str, Any]:
        """The arguments of compose() that bound a search."""
        return {"k": self.k, "budget": self.budget, "seconds": self.seconds}

    @property
    def used_metrics(self) -> list[Metric]:
        """The metrics of all tasks, each once, in the order in which tasks name them."""
        return list({metric.name: metric for task in self.tasks for metric in task.metrics}.values())

    @classmethod
    def read(cls, given: str | Path | Mapping[str, Any], metrics: Mapping[str, Callable[..., float]]) -> Study:
        """Read a study from a YAML file, with paths relative to it, or from a mapping with the same keys.

        `metrics` is {name: function} of additional metrics. Raises InvalidTask, or the error of a method's own check, for a
        study that cannot be run; unknown names come with their nearest match.
        """
        match given:
            case Mapping():
                place, said, whose = Path(), dict(given), "the study"
            case str() | Path():
                place = Path(given)
                said, whose = read_yaml(place, InvalidTask), str(place)
            case _:
                raise InvalidTask(f"a study is the path of a YAML file, or a mapping, and not {given!r:.80}")
        _require_known(whose, said, [key.name for key in fields(cls)])
        return _Reader(whose, place.parent, said, metrics).study(place.stem or "study")


@dataclass(frozen=True)
class _Reader:
    whose: str
    folder: Path
    said: Mapping[str, Any]
    functions: Mapping[str, Callable[..., float]]

    def study(self, stem: str) -> Study:
        said = self.said
        settings: dict[str, Any] = {key: self._text(key) for key in ("base", "device", "hub")}
        # a base model may be an id of the model hub, and a hub a URL
        if settings["base"] and (self.folder / settings["base"]).is_dir():
            settings["base"] = str(self.folder / settings["base"])
        if settings["hub"] and "://" not in settings["hub"]:
            settings["hub"] = str(self.folder / settings["hub"])
        settings["dtype"] = dtype = self._text("dtype")
        if dtype not in (None, *DTYPES):
            raise self._wrong(f"has dtype {dtype!r}; it is one of {', '.join(DTYPES)}")
        settings["pool"] = tuple(self.folder / path for path in self._texts("pool"))
        settings["pool_data"] = self.folder / said["pool_data"] if self._text("pool_data") else None
        if settings["hub"] and settings["pool"]:
            raise self._wrong("has a hub and a pool; leave one out")
        for key, default, least in (("shots", 5, 1), ("seeds", 0, 0)):
            settings[key] = tuple(dict.fromkeys(self._wholes(key, default, least)))
        for key, number in (("num_test", NUM_TEST), ("k", 20), ("max_new_tokens", None)):
            (settings[key],) = self._wholes(key, number, 1)
        # compose() checks both
        settings["budget"], settings["seconds"] = said.get("budget", 40), said.get("seconds")
        for key in ("stop", "normalise"):
            settings[key] = tuple(self._texts(key)) if key in said else None
        settings["allow_licenses"] = said.get("allow_licenses", False)
        if not isinstance(settings["allow_licenses"], bool):
            raise self._wrong(f"has allow_licenses {settings['allow_licenses']!r:.40}; it is true or false")
        settings["metrics"] = self._metrics(said.get("metrics", "exact_match"), settings["normalise"])
        settings["methods"] = self._methods()
        settings["reference"] = self._reference([method.name for method in settings["methods"]])
        settings["tasks"] = self._tasks(settings)
        settings["out"] = self.folder / (self._text("out") or f"{stem}-results")
        return Study(**settings)

    def _tasks(self, settings: Mapping[str, Any]) -> tuple[StudyTask, ...]:
        entry = self.said.get("tasks")
        listed = [entry] if isinstance(entry, str | Mapping) else entry if is_list(entry) else []
        tasks = tuple(self._task({"file": task} if isinstance(task, str) else task, settings) for task in listed)
        self._require_names("tasks", [task.name for task in tasks])
        return tasks

    def _methods(self) -> tuple[Method, ...]:
        listed = self.said.get("methods")
        methods = tuple(Method.read(entry) for entry in (listed if is_list(listed) else [listed] if listed else []))
        self._require_names("methods", [method.name for method in methods])
        return methods

    def _require_names(self, key: str, names: Sequence[str]) -> None:
        if not names:
            raise self._wrong(f"has no {key}; list at least one")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise self._wrong(f"has two {key} of the name {twice[0]!r}; give one of them a 'name' of its own")

    def _reference(self, names: Sequence[str]) -> str:
        reference = self._text("reference") or names[0]
        _require_known(
            f"{self.whose}: reference {reference!r} is none of its methods: it", [reference], names, noun="method"
        )
        return reference

    def _task(self, said: Any, settings: Mapping[str, Any]) -> StudyTask:
        if not isinstance(said, Mapping):
            raise self._wrong(f"has {said!r:.60} as a task, neither a path nor a mapping")
        _require_known(f"{self.whose}: a task", said, TASK_KEYS)
        if ("file" in said) == ("dataset" in said):
            raise self._wrong(f"has a task with {', '.join(said) or 'nothing'}: it takes a 'file' or a 'dataset'")
        name = said.get("name") or (Path(str(said["file"])).stem if "file" in said else _dataset_name(said["dataset"]))
        train, test = self._rows(said, str(name), settings["num_test"])
        labels = said.get("labels")
        if labels is not None and not is_list(labels, str):
            raise self._wrong(
                f"has labels {labels!r:.80} for task {name!r}; list texts, in quotes where YAML reads yes or 1"
            )
        metrics = self._metrics(said["metrics"], settings["normalise"]) if "metrics" in said else settings["metrics"]
        task_fields: dict[str, Any] = {key: said[key] for key in ("template", "chat", "system") if key in said}
        # rows of messages have their system turn in the messages themselves
        task_fields["instruction"] = said.get("instruction") or shared_instruction(
            [row for row in (*train, *test) if row.chat is None]
        )
        task_fields["labels"] = None if labels is None else tuple(labels)
        stop = said.get("stop")
        task_fields["stop"] = (
            settings["stop"] if "stop" not in said else (stop,) if isinstance(stop, str) else tuple(stop or ())
        )
        task = StudyTask(
            str(name),
            tuple((row.asked, row.targets[0]) for row in train),
            tuple((row.asked, row.targets) for row in test),
            task_fields,
            said.get("oracle"),
            metrics,
        )
        # a bad field is refused here, before anything runs
        for shots in settings["shots"]:
            task.drawn(shots, 0)
        return task

    def _rows(self, said: Mapping[str, Any], name: str, num_test: int) -> tuple[list[Row], list[Row]]:
        """Return (train, test) rows: from two files or splits, from the column `split`, or drawn once from all rows.

        Raises InvalidTask if either is empty.
        """
        if "dataset" in said:
            train, test = self._of_dataset(said, name)
        else:
            train = _read(said, name, self.folder / str(said["file"]), "file")
            test = _read(said, name, self.folder / str(said["test"]), "test") if "test" in said else []
        if not test:
            # if rows have a split column, those of the test split are answered
            test = [row for row in train if row.split == "test"]
            if test:
                train = [row for row in train if row.split in ("", "train")]
            else:
                order = np.random.default_rng(0).permutation(len(train))
                mixed = [train[place] for place in order]
                test, train = mixed[:num_test], mixed[num_test:]
        if not (train and test):
            raise InvalidTask(
                f"{self.whose}: task {name!r} has {len(train)} rows to draw examples from and {len(test)} to answer; "
                "it needs both, so give more rows, a 'test' file or a smaller num_test"
            )
        return train, test[:num_test]

    def _of_dataset(self, task: Mapping[str, Any], name: str) -> tuple[list[Row], list[Row]]:
        dataset = task["dataset"]
        said = {"path": dataset} if isinstance(dataset, str) else dict(dataset)
        _require_known(f"{self.whose}: dataset of task {name!r}", said, DATASET_KEYS)
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise PackageMissing(f"task {name!r} is a data set: pip install 'loraweave[study]'") from error
        # like every path, it is relative to the study's file
        path = str(self.folder / said["path"]) if (self.folder / said["path"]).exists() else said["path"]
        read = [
            _read(task, name, load_dataset(path, said.get("name"), split=said[split]), split) if split in said else []
            for split in ("train", "test")
        ]
        if not read[0]:
            raise InvalidTask(f"{self.whose}: dataset of task {name!r} needs 'train', the split to draw examples from")
        return read[0], read[1]

    def _metrics(self, given: Any, normalise: tuple[str, ...] | None) -> tuple[Metric, ...]:
        names = [given] if isinstance(given, str) else given
        if not (is_list(names, str) and names):
            raise self._wrong(f"has {given!r:.60} as metrics; list names")
        return tuple(metric_of(name, normalise, self.functions) for name in dict.fromkeys([*names, *self.functions]))

    def _text(self, key: str) -> str | None:
        value = self.said.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(f"has {value!r:.60} as {key!r}, which is not a text")
        return value

    def _texts(self, key: str) -> list[str]:
        value = self.said.get(key, ())
        listed = [value] if isinstance(value, str) else value
        if not is_list(listed, str):
            raise self._wrong(f"has {value!r:.60} as {key!r}; give a text or a list of texts")
        return list(listed)

    def _wholes(self, key: str, default: int | None, least: int) -> list[Any]:
        value = self.said.get(key, default)
        listed = list(value) if is_list(value) else [value]
        single = key not in ("shots", "seeds")
        known = all(number == default or is_whole(number, least) for number in listed)
        if not listed or (single and len(listed) > 1) or not known:
            kind = "a whole number" if single else "whole numbers"
            raise self._wrong(f"has {value!r:.60} as {key!r}; it takes {kind} of at least {least}")
        return listed

    def _wrong(self, problem: str) -> InvalidTask:
        return InvalidTask(f"{self.whose} {problem}")


def shared_instruction(rows: Sequence[Row]) -> str:
    """Return the instruction that all rows share. Raises InvalidTask if they differ."""
    plain = [{"input": row.input, "target": row.targets[0], "instruction": row.instruction} for row in rows]
    return Task(plain).instruction  # type: ignore[arg-type]


def _require_known(whose: str, given: Iterable[str], known: Sequence[str], *, noun: str = "key") -> None:
    """Raise InvalidTask for an unknown name, with the nearest known name and a list of all."""
    check_options(whose, dict.fromkeys(given), dict.fromkeys(known, Any), noun=noun, error=InvalidTask)


def _dataset_name(given: Any) -> str:
    return str(given.get("path", "dataset") if isinstance(given, Mapping) else given).rpartition("/")[2]


def _read(task: Mapping[str, Any], name: str, given: Any, of: str) -> list[Row]:
    return read_rows(given, of=f"{of} of task {name!r}", targets="several", columns=task.get("columns"), one_split=False)
