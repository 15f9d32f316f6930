"""A saved expert model: experts.json has its description and base, model.safetensors its tensors.

A Trainer that resumes looks for the tensors under that name; format 1 had experts.safetensors.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.common.checks import is_whole
from loraweave.common.descent import tensor_bytes
from loraweave.common.files import as_path, replacing, storage_errors, whole_file
from loraweave.composer.experts.parts import RENAMED, asked_tensors
from loraweave.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterUnsupported,
    BaseModelMismatch,
    HubError,
    LoraweaveError,
    ScopeError,
    UnknownName,
    WeightingError,
)
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import base_id, fingerprint
from loraweave.hub.formats._files import listing, present, read_json
from loraweave.hub.formats._safetensors import hashed_tensors
from loraweave.lowrank.algebra import all_finite
from loraweave.routers.recipes._recipe import ExpertShape, Recipe
from loraweave.routers.tokens._saved import MAX_JSON_BYTES
from loraweave.routers.tokens._written import PACKAGES, finite, with_json_form
from loraweave.types import Fingerprint

FORMAT = 2
FILE, TENSORS, FIRST_TENSORS = "experts.json", "model.safetensors", "experts.safetensors"


@dataclass(frozen=True)
class SavedExperts:
    """The contents of experts.json, with the folder and the file of tensors."""

    folder: Path
    file: str
    recipe: str
    options: Mapping[str, Any]
    shapes: Mapping[str, ExpertShape]
    base_model: str
    fingerprint: Fingerprint
    sha256: str
    names: tuple[str, ...]
    report: Mapping[str, Any] | None

    def require_base(self, model: nn.Module) -> None:
        """Raise BaseModelMismatch if `model` is not the base that the experts were trained on."""
        if why := self.fingerprint.differs(fingerprint(model)):
            raise BaseModelMismatch(
                f"the experts in {self.folder} were trained on another base model ({self.base_model!r}) than this one: "
                f"{why}; load that model"
            )

    def require_same(self, recipe: Recipe, shapes: Mapping[str, ExpertShape]) -> None:
        """Raise WeightingError, naming it, if recipe, options (the seed aside) or shapes are not the saved ones."""
        instead = f"lw.experts({str(self.folder)!r}, base_model) makes the saved one"
        if recipe.name != self.recipe:
            raise WeightingError(f"{self.folder} has experts of recipe {self.recipe!r}, not {recipe.name!r}: {instead}")
        options = json.loads(json.dumps(recipe.options))
        # an option newer than the folder has its default, or the value in the recipe's `before`
        saved = {**json.loads(json.dumps({**type(recipe)().options, **recipe.before})), **self.options}
        for option in sorted(set(options) | set(saved)):
            if option != "seed" and options.get(option) != saved.get(option):
                raise WeightingError(
                    f"{self.folder} has recipe {self.recipe!r} with {option} {saved.get(option)!r}, but this model "
                    f"has {options.get(option)!r}: {instead}"
                )
        for site in sorted(set(shapes) | set(self.shapes)):
            if shapes.get(site) != self.shapes.get(site):
                raise WeightingError(
                    f"{self.folder} has {_described(self.shapes.get(site))} at {site!r}, but this model has "
                    f"{_described(shapes.get(site))}: {instead}"
                )

    def tensors(self, model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
        """Return the tensors of experts and gates by name, checked against the names and shapes that the recipe needs.

        Raises AdapterCorrupt for a file with other tensors, other shapes, or numbers that are not finite.
        """
        file = self.folder / self.file
        tensors = hashed_tensors(self.folder, self.file, self.sha256, said_by=FILE)
        try:
            expected_shapes = asked_tensors(model, recipe, self.shapes)
        except LoraweaveError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise AdapterCorrupt(f"{self.folder / FILE} is damaged ({type(error).__name__}: {error})") from error
        if odd := sorted(set(expected_shapes) ^ set(tensors)):
            where = "is missing from" if odd[0] in expected_shapes else "is in"
            raise AdapterCorrupt(f"tensor {odd[0]!r} {where} {file}, which is not what recipe {self.recipe!r} asks for")
        for name, value in tensors.items():
            if tuple(value.shape) != expected_shapes[name]:
                raise AdapterCorrupt(
                    f"{file} has {name!r} with shape {tuple(value.shape)}, but {FILE} asks for {expected_shapes[name]}: "
                    "copy or download the folder again"
                )
            if value.is_floating_point() and not all_finite(value):
                raise AdapterCorrupt(
                    f"{file} has numbers in {name!r} that are not finite: copy or download the folder again"
                )
        return tensors


def experts_as_files(
    base_model: nn.Module,
    recipe: Recipe,
    shapes: Mapping[str, ExpertShape],
    names: Sequence[str],
    state: Mapping[str, Tensor],
    report: Mapping[str, Any] | None,
) -> dict[str, bytes]:
    """Return {file name: content} of a saved expert model. Raises WeightingError for options that JSON cannot express."""
    raw = tensor_bytes(state)
    description = {
        "format": FORMAT,
        "recipe": recipe.name,
        "options": {name: with_json_form(f"recipe {recipe.name!r}", name, value) for name, value in recipe.options.items()},
        "sites": {name: asdict(shape) for name, shape in shapes.items()},
        "base_model": base_id(base_model),
        "fingerprint": fingerprint(base_model).to_json(),
        "names": list(names),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "report": finite(report),
        "versions": {package: version(package) for package in PACKAGES},
    }
    return {TENSORS: raw, FILE: json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False).encode()}


def write_experts(given: str | Path, files: Mapping[str, bytes], *, beside: bool = False) -> Path:
    """Write the folder whole or not at all; with `beside`, keep its other files and write experts.json last.

    Raises WeightingError if `given` is not a path, holds something else or cannot be written.
    """
    folder = as_path(given, "the folder to save an expert model in", WeightingError)
    is_other = folder.exists() and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir()))
    if is_other and not beside:
        raise WeightingError(f"{folder} holds something that is not an expert model; name another folder")
    try:
        if beside:
            with storage_errors(folder, "writing an expert model"):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / FILE).unlink(missing_ok=True)
                for name, data in files.items():
                    with whole_file(folder / name) as path:
                        path.write_bytes(data)
            return folder
        with replacing(folder) as new:
            for name, data in files.items():
                (new / name).write_bytes(data)
    except HubError as error:
        raise WeightingError(f"{folder} cannot be written ({error}): name another folder, or make room") from error
    return folder


def read_saved_experts(given: str | Path) -> SavedExperts:
    """Return the description of a saved expert model.

    Raises AdapterNotFound for anything but the folder of an expert model, AdapterCorrupt for a damaged one,
    AdapterUnsupported for one that a newer version wrote.
    """
    folder = as_path(given, "the folder that save_pretrained() wrote an expert model to", AdapterNotFound)
    if not present(folder, FILE):
        raise AdapterNotFound(f"{folder} is not a saved expert model: it has no {FILE}, and holds {listing(folder)}")
    description = read_json(folder, FILE, max_bytes=MAX_JSON_BYTES)
    if is_whole(description.get("format"), FORMAT + 1):
        raise AdapterUnsupported(
            f"{folder / FILE} has format {description['format']}, which a newer version of loraweave wrote: update it; this "
            f"one reads {FORMAT}"
        )
    try:
        if description["format"] not in (1, FORMAT):
            raise ValueError(f"its format is {description['format']!r}, not 1 or {FORMAT}")
        return SavedExperts(
            folder,
            FIRST_TENSORS if description["format"] == 1 else TENSORS,
            RENAMED.get(description["recipe"], str(description["recipe"])),
            dict(description["options"]),
            {str(name): _shape(shape) for name, shape in description["sites"].items()},
            str(description["base_model"]),
            Fingerprint.from_json(description["fingerprint"]),
            str(description["sha256"]),
            tuple(map(str, description["names"])),
            None if description["report"] is None else dict(description["report"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterCorrupt(f"{folder / FILE} is damaged ({type(error).__name__}: {error})") from error


def _described(shape: ExpertShape | None) -> str:
    return "no experts" if shape is None else f"experts of ranks {shape.ranks}"


def _shape(data: Mapping[str, Any]) -> ExpertShape:
    ranks = tuple(data["ranks"])
    if not ranks or not all(is_whole(rank, 0) for rank in ranks):
        raise ValueError(f"ranks {str(ranks)[:80]} are not whole numbers of at least 0")
    return ExpertShape(**{**data, "ranks": ranks})


def one_expert(base_model: nn.Module, recipe: Recipe, layers: Mapping[str, Any], number: int) -> Adapter:
    """Return expert `number` as an adapter, from {site: experts' module}. Raises what `ExpertModel.expert` raises."""
    require_updates(recipe, layers, f"expert {number}")
    factors = {
        name: layer.factors(torch.eye(layer.shape.num_experts)[number])
        for name, layer in layers.items()
        if is_whole(number, 0) and number < layer.shape.num_experts and layer.shape.ranks[number]
    }
    if not factors:
        most = max(layer.shape.num_experts for layer in layers.values())
        raise UnknownName(f"recipe {recipe.name!r} has no expert {number!r}; its experts are 0 to {most - 1}")
    return as_adapter(base_model, recipe, f"{recipe.name}-{number}", factors, {"expert": number})


def require_updates(recipe: Recipe, layers: Mapping[str, Any], what: str) -> None:
    """Raise ScopeError, naming `what`, for experts that are not updates of layers: no adapter can express them."""
    if not all(layer.is_update for layer in layers.values()):
        raise ScopeError(f"{what} of recipe {recipe.name!r} is not an update of layers: save_pretrained() the whole model")


def as_adapter(
    base_model: nn.Module, recipe: Recipe, name: str, layers: Mapping[str, Any], card: Mapping[str, Any]
) -> Adapter:
    """Return an adapter of these factors, {layer: Factors}, whose card has the recipe and the entries of `card`."""
    about = {"method": "loraweave.experts", "recipe": recipe.name, **card}
    base = base_id(base_model)
    return Adapter(name, base, layers, fingerprint(base_model), {"recipe": about})
