"""The folder of a composition: composition.json, read without a model, and what lies beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraweave.common.chat import prompt_json
from loraweave.common.checks import is_number
from loraweave.common.files import as_path
from loraweave.composer.compose.report import Report, ReportRow
from loraweave.composer.composer import Composer
from loraweave.errors import AdapterCorrupt, AdapterNotFound, BaseModelMismatch, CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import base_id, base_key, fingerprint, require_model, warn_unverified
from loraweave.hub.formats._files import read_bytes
from loraweave.hub.pool import ExpertPool
from loraweave.types import BaseKey, Fingerprint, Task

FORMAT, FORMAT_WITH_ROUTER = 2, 3
# the kind of parts by the format of a composition of others; members have equal shares in 4, and may have any in 6
PARTS = {4: "members", 5: "steps", 6: "members"}
FORMATS = (FORMAT, FORMAT_WITH_ROUTER, *PARTS)
FILE = "composition.json"
MAX_FILE_BYTES = 2**26
PACKAGES = ("loraweave", "torch", "transformers", "cma")
# the fields of a task that are kept, beside those that make it a chat
TASK_FIELDS = ("examples", "instruction", "labels", "metric", "template", "demonstrations", "orders", "calibrated", "stop")


@dataclass(frozen=True)
class SavedRecipe:
    """The task, the report and the base of a composition that was saved; `rest` has what else the file says.

    `parts` is "members", "steps" or None; those in `part_names` have the folders member-0, member-1 and so on.
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
        """Read a recipe. Raises AdapterNotFound without one, AdapterCorrupt, and CompositionError for a newer format."""
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

    def fields_on(self, model: Any) -> dict[str, Any]:
        """Return the composition's fields on the model, without its members. Raises BaseModelMismatch for another base.

        Warns where neither weights nor ids say that the model is the same, and names and shapes do.
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
            raise AdapterCorrupt(
                f"{self.folder} has the share {fields['share']!r}, which is no number above 0; compose again"
            )
        # the model is the one that it was composed on, whatever its experts say of their base
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


def recipe_of(
    model: Any, task: Task, report: Report, *, router: bool, parts: Mapping[str, Sequence[str]], **fields: Any
) -> dict[str, Any]:
    """Return what composition.json holds for a composition with these fields; `parts` are the names of members and steps."""
    return {
        "format": max(
            (number for number, name in PARTS.items() if parts[name]), default=FORMAT_WITH_ROUTER if router else FORMAT
        ),
        "base_model": base_id(model),
        "fingerprint": fingerprint(model).to_json(),
        **parts,
        **fields,
        "task": task_json(task),
        "report": report.to_json(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def task_json(task: Task) -> dict[str, Any]:
    """Return what Task() takes, as JSON."""
    fields = {name: getattr(task, name) for name in TASK_FIELDS}
    for name in ("examples", "demonstrations"):
        fields[name] = [[prompt_json(prompt), target] for prompt, target in fields[name]]
    if not isinstance(task.calibrated, bool):
        fields["calibrated"] = [
            prompt_json(prompt) if label is None else [prompt_json(prompt), label] for prompt, label in task.neutral
        ]
    return {**fields, "chat": True, "system": task.system} if task.chat else fields
