"""A composition: what was chosen for a task, ready to answer, to be kept and to be given away."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loraweave.composer import scoring
from loraweave.composer.composer import Composer
from loraweave.composer.introspection.explain import pieces, reading
from loraweave.composer.introspection.explanation import Explanation
from loraweave.composer.merge import merge
from loraweave.composer.report import Report, ReportRow
from loraweave.errors import AdapterCorrupt, AdapterNotFound, BaseModelMismatch, CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.hub.export import ExportReport
from loraweave.hub.fingerprint import fingerprint
from loraweave.hub.pool import ExpertPool
from loraweave.types import Fingerprint, Task

FORMAT = 1
FILE = "composition.json"
PACKAGES = ("loraweave", "torch", "transformers", "cma")


@dataclass(frozen=True, eq=False)
class Composition:
    """Weights over the adapters of a pool for one task, on one model.

    `weights` is {name: weight}; adapters of weight 0 are left out. `pool` is None when nothing but the base is used, or when
    the composition was read from a folder. `merge_method` says what the weights mean (a name of `names("methods")`).
    """

    model: Any
    tokenizer: Any
    task: Task
    pool: ExpertPool | None
    all_weights: Mapping[str, float]
    merge_method: str
    report: Report
    seed: int = 0
    stored: Adapter | None = None
    parents: Sequence[Mapping[str, Any]] = ()

    @property
    def weights(self) -> dict[str, float]:
        return {name: float(weight) for name, weight in self.all_weights.items() if weight}

    @cached_property
    def adapter(self) -> Adapter:
        """The composition as one adapter. CompositionError when it is the base model itself, which no adapter expresses."""
        if self.stored is not None:
            return self.stored
        if not self.weights or self.pool is None:
            raise CompositionError("this composition is the base model itself: there is no adapter to give")
        used = self.pool.subset(self.weights)
        return merge(list(used.adapters.values()), list(self.weights.values()), method=self.merge_method, name="composition")

    def predict(self, inputs: Sequence[str]) -> list[str]:
        """One answer for each input: a label when the task has labels, else the first line of a greedy generation."""
        with self._active():
            return scoring.predict(self.model, self.tokenizer, self.task, inputs)

    def evaluate(self, pairs: Sequence[tuple[str, str | Sequence[str]]]) -> dict[str, float]:
        """Scores answers to (input, target) pairs; a target may be a list of accepted ones.

        `value` is the share of right answers under the task's metric, `low` and `high` its 95 % bootstrap interval over the
        pairs, `loss` the mean loss of the target tokens, `count` the number of pairs.
        """
        with self._active():
            score = scoring.evaluate(self.model, self.tokenizer, self.task, pairs)
        return {"value": score.value, "low": score.low, "high": score.high, "loss": score.loss, "count": score.count}

    def explain(self, text: str, *, max_new_tokens: int = 0) -> Explanation:
        """What each token of the prompt for an input gets from each adapter: the composition's weights, in every layer.

        With `max_new_tokens`, tokens of the greedy continuation are explained too; Composer.explain says which.
        """
        prompt = self.task.prompt(text)
        if not self.weights:
            with torch.no_grad():
                ids = torch.cat(reading(self.model, self.tokenizer, prompt, max_new_tokens).parts).tolist()
            return Explanation(pieces(self.tokenizer, ids), (), (), torch.empty(len(ids), 0, 0))
        engine = Composer(self.model, [self.adapter], tokenizer=self.tokenizer)
        merged = engine.explain(prompt, {self.adapter.name: 1.0}, max_new_tokens=max_new_tokens)
        weights_E = torch.tensor(list(self.weights.values()))
        return replace(merged, experts=tuple(self.weights), w_TLE=merged.w_TLE * weights_E)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes composition.json and, unless it is the base model, the merged adapter as a PEFT folder."""
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not (target / FILE).is_file() and any(target.iterdir()):
            raise CompositionError(f"{target} holds something that is no composition; name another folder")
        temporary = target.parent / f".{target.name}-{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            if self.weights:
                self.adapter.save_pretrained(temporary / "adapter")
            (temporary / FILE).write_text(json.dumps(self._recipe(), indent=1, ensure_ascii=False))
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def export(self, folder: str | Path, *, target: str = "peft", max_rank: int | None = None) -> ExportReport:
        """Writes the composition as one adapter for "peft" or "vllm"; what `Adapter.export` does with it.

        CompositionError when the composition is the base model itself.
        """
        return self.adapter.export(folder, target=target, max_rank=max_rank)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: Any, tokenizer: Any) -> Composition:
        """Reads a saved composition for the same base model; BaseModelMismatch for another, AdapterNotFound without one."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise AdapterNotFound(f"{folder} holds no {FILE}; save_pretrained() of a composition writes it")
        try:
            recipe = json.loads(path.read_text())
            if recipe["format"] != FORMAT:
                raise CompositionError(f"{path} has format {recipe['format']}, but this version reads {FORMAT}")
            task = Task([(text, target) for text, target in recipe["task"].pop("examples")], **recipe["task"])
            rows = tuple(ReportRow(**row) for row in recipe["report"].pop("rows"))
            report = Report(rows, **{**recipe["report"], "candidates": tuple(map(tuple, recipe["report"]["candidates"]))})
            base = Fingerprint.from_json(recipe["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterCorrupt(f"{path} is damaged ({type(error).__name__}: {error})") from error
        if why := base.differs(fingerprint(model)):
            raise BaseModelMismatch(f"{folder} was composed for {recipe['base_model']!r}, and this model is another: {why}")
        stored = Adapter.from_pretrained(Path(folder) / "adapter", name="composition") if recipe["weights"] else None
        return cls(
            model,
            tokenizer,
            task,
            None,
            recipe["weights"],
            recipe["merge_method"],
            report,
            recipe["seed"],
            stored,
            recipe["parents"],
        )

    def _active(self) -> Any:
        if not self.weights:
            # no Composer can exist without an adapter: the model as it is answers
            return nullcontext()
        return Composer(self.model, [self.adapter]).activate({self.adapter.name: 1.0})

    def _recipe(self) -> dict[str, Any]:
        members = self.pool.subset(self.weights).adapters if self.pool and self.weights else {}
        parents = [{"name": name, "hash": a.hash, "weight": self.weights[name]} for name, a in members.items()]
        return {
            "format": FORMAT,
            "base_model": getattr(self.model, "name_or_path", ""),
            "fingerprint": fingerprint(self.model).to_json(),
            "weights": self.weights,
            "parents": parents or list(self.parents),
            "merge_method": self.merge_method,
            "seed": self.seed,
            "task": {
                "examples": self.task.examples,
                "instruction": self.task.instruction,
                "labels": self.task.labels,
                "metric": self.task.metric,
                "template": self.task.template,
            },
            "report": self.report.to_json(),
            "versions": {package: version(package) for package in PACKAGES},
        }
