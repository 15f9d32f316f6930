"""The report of what compose() measured and chose, and the folder that keeps it with the task: composition.json.

A report has rows and a table. The folder is read without a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loraweave.common.chat import prompt_json
from loraweave.common.checks import is_number
from loraweave.common.display import ShownTable
from loraweave.common.files import as_path
from loraweave.composer.composer import Composer
from loraweave.errors import AdapterCorrupt, AdapterNotFound, BaseModelMismatch, CompositionError, PackageMissing
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import base_key, load_base, require_model, warn_unverified
from loraweave.hub.formats._files import read_bytes
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.fusion import share_text
from loraweave.types import BaseKey, Fingerprint, Task


@dataclass(frozen=True)
class ReportRow:
    """One way to answer the task, measured on its examples.

    `held_out_loss` is the mean loss of examples that had no part in choosing the weights (cross-validated), `loss` that of
    all examples, with weights chosen on all; `held_out_hits` is the share of those `num_held_out` examples that greedy
    decoding would write. Both held-out figures are None for a way that learned without folds, and for a composition that was
    refined. `weights` are means over the layers where `by_layer` is given. `num_trained` counts the scalars that were
    chosen, `losses` are those of a search's candidates, terms for the weights included, and None for the `failed` ones that
    could not be scored.
    """

    name: str
    weights: Mapping[str, float]
    loss: float | None
    held_out_loss: float | None
    held_out_hits: float | None
    seconds: float
    evaluations: int
    by_layer: Mapping[str, Mapping[str, float]] | None = None
    num_trained: int = 0
    failed: int = 0
    losses: tuple[float | None, ...] = ()
    num_held_out: int = 0


@dataclass(frozen=True)
class Report:
    """The rows that were compared, the `chosen` row's name and the reason, and the candidates that retrieval found."""

    rows: tuple[ReportRow, ...]
    chosen: str
    reason: str
    candidates: tuple[tuple[str, float], ...]
    seconds: float
    evaluations: int

    def __getitem__(self, name: str) -> ReportRow:
        return next(row for row in self.rows if row.name == name)

    @property
    def spending(self) -> str:
        """The number of evaluations made, and that of each search, as a phrase."""
        searched = [f", {row.evaluations} in the search {row.name!r}" for row in self.rows if row.losses]
        return f"{self.evaluations} evaluations{''.join(searched)}"

    def with_choice(self, row: ReportRow, reason: str) -> Report:
        """Return the report with `row` as its choice; it replaces an earlier row of the same name."""
        return replace(
            self,
            rows=(*(other for other in self.rows if other.name != row.name), row),
            chosen=row.name,
            reason=reason,
            seconds=self.seconds + row.seconds,
            evaluations=self.evaluations + row.evaluations,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON, with None for a loss that is not finite, since JSON has no number for it."""
        fields = asdict(self)
        for row in fields["rows"]:
            row |= {name: None for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        return fields

    def table(self) -> ShownTable:
        """Return the rows as a table; the chosen one is marked. Hits have their 95 % interval in per cent (Wilson's)."""

        def cell(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        table = ShownTable(title=f"chosen: {self.chosen} ({self.reason})", title_justify="left")
        for column in ("", "loss", "held-out loss", "held-out hits", "evaluations", "seconds", "trained"):
            table.add_column(column, justify="left" if not column else "right")
        for row in self.rows:
            hits = "-" if row.held_out_hits is None else share_text(row.held_out_hits, row.num_held_out)
            spent = (str(row.evaluations), f"{row.seconds:.1f}", str(row.num_trained))
            style = "bold" if row.name == self.chosen else ""
            table.add_row(row.name, cell(row.loss), cell(row.held_out_loss), hits, *spent, style=style)
        return table

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


FORMAT, FORMAT_WITH_ROUTER = 2, 3
# the kind of parts by the format of a composition of others; members have equal shares in 4, and may have any in 6
PARTS = {4: "members", 5: "steps", 6: "members"}
FORMATS = (FORMAT, FORMAT_WITH_ROUTER, *PARTS)
FILE = "composition.json"
MAX_FILE_BYTES = 2**26
PACKAGES = ("loraweave", "torch", "transformers", "cma")
# the fields of a task that are saved, beside `chat` and `system`
TASK_FIELDS = ("examples", "instruction", "labels", "metric", "template", "demonstrations", "orders", "calibrated", "stop")


@dataclass(frozen=True)
class SavedRecipe:
    """The task, the report and the base of a saved composition; `rest` has all other entries of its file.

    `parts` is "members", "steps" or None; the parts in `part_names` have the folders member-0, member-1 and so on.
    """

    folder: Path
    task: Task
    report: Report
    base: Fingerprint
    base_model: str
    rest: dict[str, Any]
    parts: str | None
    part_names: tuple[str, ...]

    @classmethod
    def read(cls, folder: str | Path) -> SavedRecipe:
        """Read the file. Raises AdapterNotFound if it is missing, AdapterCorrupt, CompositionError for a newer format."""
        path = as_path(folder, "the folder of a composition", CompositionError) / FILE
        if not path.is_file():
            raise AdapterNotFound(f"{folder} holds no {FILE}; save_pretrained() of a composition writes it")
        try:
            recipe = json.loads(read_bytes(path.parent, FILE, MAX_FILE_BYTES))
            if recipe["format"] not in FORMATS:
                known = ", ".join(map(str, FORMATS))
                raise CompositionError(f"{path} has format {recipe['format']}, but this version reads {known}")
            task = Task([(text, target) for text, target in recipe["task"].pop("examples")], **recipe["task"])
            rows = tuple(ReportRow(**{**row, "losses": tuple(row["losses"])}) for row in recipe["report"].pop("rows"))
            report = Report(rows, **{**recipe["report"], "candidates": tuple(map(tuple, recipe["report"]["candidates"]))})
            base = Fingerprint.from_json(recipe["fingerprint"])
            parts = PARTS.get(recipe["format"])
            names = () if parts is None else tuple(recipe[parts])
            return cls(path.parent, task, report, base, recipe["base_model"], recipe, parts, names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterCorrupt(f"{path} is damaged ({type(error).__name__}: {error})") from error

    def load_base(self) -> tuple[Any, Any]:
        """Load (model, tokenizer) of the recorded base. Raises BaseModelMismatch if it has no name or cannot be loaded."""
        try:
            # the embedded default must not stand in for a base without a name
            return load_base(self.base_model or self.folder / "a base without a name")
        except (BaseModelMismatch, PackageMissing) as error:
            raise BaseModelMismatch(
                f"{self.folder} was composed for the base model {self.base_model!r}, which cannot be loaded: load it "
                f"yourself, and call Composition.from_pretrained(source, model, tokenizer) ({error})"
            ) from error

    def fields_on(self, model: Any) -> dict[str, Any]:
        """Return the composition's fields on the model, without its members. Raises BaseModelMismatch for another base.

        Warns if only the names and shapes of layers, neither weights nor ids, show that the model is the same.
        """
        require_model(model)
        recipe, model_base, its = self.rest, base_key(model), BaseKey(str(self.base_model), None, self.base)
        if why := its.contradicts(model_base):
            raise BaseModelMismatch(f"{self.folder} was composed for {its.id!r}, and this model is another: {why}")
        if not its.proves(model_base):
            warn_unverified([str(self.folder)], its, model_base)
        fields = {key: recipe[key] for key in ("seed", "parents", "merge_method")}
        fields |= {"task": self.task, "report": self.report, "pool": None, "all_weights": {}, "members": {}, "steps": {}}
        fields["share"] = recipe.get("share", 1.0)
        if not is_number(fields["share"], 0) or not fields["share"]:
            raise AdapterCorrupt(f"{self.folder} has the share {fields['share']!r}, not a number above 0; compose again")
        # the model was just checked, so experts get its fingerprint, whatever base they name
        if recipe["format"] == FORMAT_WITH_ROUTER:
            # every router that can be read is loaded with it
            from loraweave.routers.tokens._saved import router as read_router

            router = read_router(self.folder / "router")
            if router.pool is None:
                raise AdapterCorrupt(f"{self.folder} has a router without its adapters; compose again")
            experts = router.pool.adapters.items()
            pool = ExpertPool({name: replace(adapter, fingerprint=model_base.fingerprint) for name, adapter in experts})
            return {**fields, "router": router, "pool": pool}
        if self.parts is not None:
            return fields
        fields |= {"all_weights": recipe["weights"], "by_layer": recipe["by_layer"], "tuned_steps": recipe["tuned_steps"]}
        kept = self.folder / "adapter"
        if kept.is_dir():
            read = replace(Adapter.from_pretrained(kept, name="composition"), fingerprint=model_base.fingerprint)
            fields["stored"] = Composer(model, [read]).bound_pool["composition"]
        elif recipe["weights"] or recipe["tuned_steps"]:
            raise AdapterCorrupt(f"{self.folder} has weights, but its folder adapter is gone; compose again")
        return fields


def task_json(task: Task) -> dict[str, Any]:
    """Return the arguments of Task() that make this task, as JSON."""
    fields = {name: getattr(task, name) for name in TASK_FIELDS}
    for name in ("examples", "demonstrations"):
        fields[name] = [[prompt_json(prompt), target] for prompt, target in fields[name]]
    if not isinstance(task.calibrated, bool):
        fields["calibrated"] = [
            prompt_json(prompt) if label is None else [prompt_json(prompt), label] for prompt, label in task.neutral
        ]
    return {**fields, "chat": True, "system": task.system} if task.chat else fields
