"""What a composition's folder says of it, read without a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraweave.composer.report import Report, ReportRow
from loraweave.errors import AdapterCorrupt, AdapterNotFound, CompositionError
from loraweave.hub.as_path import as_path
from loraweave.types import Fingerprint, Task

FORMAT, FORMAT_WITH_ROUTER = 2, 3
FILE = "composition.json"


@dataclass(frozen=True)
class SavedRecipe:
    """The task, the report and the base of a composition that was saved; `fields` has the rest of the file."""

    task: Task
    report: Report
    base: Fingerprint
    base_model: str
    fields: dict[str, Any]

    @property
    def has_router(self) -> bool:
        return bool(self.fields["format"] == FORMAT_WITH_ROUTER)

    @classmethod
    def read(cls, folder: str | Path) -> SavedRecipe:
        """Raises AdapterNotFound without a composition, AdapterCorrupt, and CompositionError for a newer one."""
        path = as_path(folder, "the folder of a composition", CompositionError) / FILE
        if not path.is_file():
            raise AdapterNotFound(f"{folder} holds no {FILE}; save_pretrained() of a composition writes it")
        try:
            recipe = json.loads(path.read_text())
            if recipe["format"] not in (FORMAT, FORMAT_WITH_ROUTER):
                raise CompositionError(
                    f"{path} has format {recipe['format']}, but this version reads {FORMAT} and {FORMAT_WITH_ROUTER}"
                )
            task = Task([(text, target) for text, target in recipe["task"].pop("examples")], **recipe["task"])
            rows = tuple(ReportRow(**{**row, "losses": tuple(row["losses"])}) for row in recipe["report"].pop("rows"))
            report = Report(rows, **{**recipe["report"], "candidates": tuple(map(tuple, recipe["report"]["candidates"]))})
            return cls(task, report, Fingerprint.from_json(recipe["fingerprint"]), recipe["base_model"], recipe)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterCorrupt(f"{path} is damaged ({type(error).__name__}: {error})") from error
