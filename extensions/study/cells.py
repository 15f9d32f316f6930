"""The cells of a study: a task, a method, a number of examples and a seed, each named by the hash of all that matters."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraweave import BaseModelMismatch, Composition, Hub, base_key
from loraweave.extend import text_digest, whole_file
from loraweave.extend.scoring import encode_pairs
from loraweave.extensions.study.methods import Method
from loraweave.extensions.study.study_file import Study, StudyTask

# to be changed whenever the same cell would give other answers
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a study: a task, a method, a number of examples (`shots`) and a seed.

    `key` is a hash; cells whose answers cannot differ, such as the base model's for every seed, share one key.
    """

    task: StudyTask
    method: Method
    shots: int
    seed: int
    key: str

    @property
    def named(self) -> dict[str, Any]:
        """The names of the task and the method, the number of examples and the seed, as the study's files have them."""
        return {"task": self.task.name, "method": self.method.name, "shots": self.shots, "seed": self.seed}

    def __str__(self) -> str:
        return f"{self.task.name}, {self.method.name}, {self.shots} examples, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a cell: a text, a mean loss and a number of target tokens for each test row, in the order of the rows.

    `seconds` and `cpu_seconds` (of the process) are what making the method's composition took, without answering.
    `measured` is the date of the answers, as YYYY-MM-DD.
    """

    answers: tuple[str, ...]
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    seconds: float
    cpu_seconds: float
    chosen: str
    weights: Mapping[str, float]
    measured: str


def cells(study: Study, hub: Hub) -> list[Cell]:
    """Return all cells in the order in which they run: all tasks and methods for one seed, then the next seed."""
    return [
        Cell(task, method, shots, seed, _key(study, hub, task, method, shots, seed))
        for shots in study.shots
        for seed in study.seeds
        for task in study.tasks
        for method in study.methods
        if method.applies(task.oracle)
    ]


def _key(study: Study, hub: Hub, task: StudyTask, method: Method, shots: int, seed: int) -> str:
    drawn = task.drawn(shots, seed)
    about = {
        "format": FORMAT,
        "loraweave": version("loraweave"),
        "base": [study.base, study.dtype],
        "method": method.identity(),
        "limits": [study.k, study.budget, study.seconds],
        "asked": [task.task_fields, study.max_new_tokens],
        "test": task.test,
        "adapters": sorted(method.adapters(hub, task.oracle).items()),
        "examples": drawn.examples if method.reads_examples else None,
        "seed": seed if method.reads_seed else None,
        "rows": _digest(study.pool_data) if method.said.get("fit") == "pool" else None,
    }
    return text_digest(json.dumps(about, sort_keys=True, default=str))[:32]


@cache
def _digest(folder: Path | None) -> list[tuple[str, str]]:
    """Return the name and sha256 of each .jsonl file in the folder."""
    files = sorted(folder.glob("*.jsonl")) if folder is not None else []
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


class Store:
    """A folder with one file for the answers of each cell; a file is written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, cell: Cell) -> bool:
        return self._path(cell).is_file()

    def read(self, cell: Cell) -> Answers:
        said = json.loads(self._path(cell).read_text(encoding="utf-8"))
        texts, losses, tokens = (tuple(said[key]) for key in ("answers", "losses", "tokens"))
        # files of earlier versions have no date but their own
        measured = said.get("measured") or date.fromtimestamp(self._path(cell).stat().st_mtime).isoformat()
        named = {key: said[key] for key in ("seconds", "cpu_seconds", "chosen", "weights")}
        return Answers(texts, losses, tokens, **named, measured=measured)

    def keep(self, cell: Cell, found: Answers) -> None:
        write_whole(self._path(cell), json.dumps({**cell.named, **asdict(found)}, ensure_ascii=False))

    def require_base(self, model: Any) -> None:
        """Raise BaseModelMismatch if the folder has answers of a base model with other weights, even under the same name."""
        path, fingerprint = self.folder.parent / "base.json", base_key(model).fingerprint
        assert fingerprint is not None
        if path.is_file():
            known = type(fingerprint).from_json(json.loads(path.read_text(encoding="utf-8")))
            if why := known.differs(fingerprint):
                raise BaseModelMismatch(
                    f"{self.folder.parent} has answers of another base model ({why}): name another 'out'"
                )
        write_whole(path, json.dumps(fingerprint.to_json()))

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}.json"


def answered(cell: Cell, study: Study, composition: Composition, spent: tuple[float, float]) -> Answers:
    """Return the composition's answers to the task's test rows; `spent` is (seconds, cpu_seconds) of making it."""
    pairs = list(cell.task.test)
    score = composition.score(pairs, max_new_tokens=study.max_new_tokens)
    rows = encode_pairs(composition.model, composition.tokenizer, composition.task, pairs)
    by_size = sorted(composition.mean_weights.items(), key=lambda item: -abs(item[1]))
    return Answers(
        score.answers,
        tuple(round(loss, 6) for loss in score.losses),
        tuple(len(row.target) for row in rows),
        round(spent[0], 3),
        round(spent[1], 3),
        composition.report.chosen,
        {name: round(weight, 6) for name, weight in by_size},
        date.today().isoformat(),
    )


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically, so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
