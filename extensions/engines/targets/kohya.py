"""kohya's sd-scripts, as ComfyUI and WebUIs read it: `lora_unet_..._to_q.lora_down.weight` with an alpha for each module.

In such a file underscores stand for dots and for themselves. A layer is written only if this package's own reader, which
looks names up in a table, finds the very same layer again. The transformers of FLUX.1 and Stable Diffusion 3 have their
authors' names, in which one module is several of diffusers' layers (networks/convert_flux_lora.py of sd-scripts): A has the
rows of all of them, and B is zero outside their blocks.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraweave import AdapterUnsupported, Factors, names
from loraweave.extend import get, traits
from loraweave.extend.formats import Contents
from loraweave.extensions.engines.export import Target
from loraweave.extensions.engines.targets._writing import place, require_plain, stored_factors, tensors_file
from loraweave.extensions.engines.targets.diffusers import WEIGHTS, pipeline_path

PREFIXES = {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
# the prefix of a text encoder that is the only one, beside a UNet
SINGLE = "lora_te_"
ELSEWHERE = "use target='diffusers'"


class _Rule(NamedTuple):
    """A naming rule of the reader: a module's name in the file, its paths in the base, and their shares of B's rows."""

    source: str
    targets: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    turned: bool = False


class _Module(NamedTuple):
    """A module of the file: the rule of its name, and the layers that it joins, None for a path without an update."""

    rule: _Rule
    layers: tuple[str | None, ...]


def _reader() -> Any:
    """Return this package's reader of such files. Raises AdapterUnsupported if the extension that has it is missing."""
    if "kohya" not in names("formats"):
        raise AdapterUnsupported(
            f"kohya's layout is written where it can be read back, by a format 'kohya' that is not installed: {ELSEWHERE}"
        )
    return get("formats", "kohya")


@traits("images")
class Kohya(Target):
    """A folder for ComfyUI, WebUIs and, except for Stable Diffusion 3, diffusers' `load_lora_weights`."""

    one_rank = True
    file = WEIGHTS

    @classmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        require_plain(contents, name, "kohya's layout", kinds=("linear", "conv"))
        for module, joined in _modules(contents, name, base).items():
            _joined(module, joined, contents, name)

    @classmethod
    def write(cls, contents: Contents, name: str, folder: Path, base: Any) -> None:
        tensors: dict[str, Tensor] = {}
        for module, joined in _modules(contents, name, base).items():
            factors = _joined(module, joined, contents, name)
            tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"] = stored_factors(factors)
            tensors[f"{module}.alpha"] = torch.tensor(float(factors.rank))
        place(contents, folder, "diffusers", {WEIGHTS: tensors_file(tensors)})

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        return [f"ComfyUI, WebUIs and pipeline.load_lora_weights({str(folder)!r}) read the file {WEIGHTS}"]


def _modules(contents: Contents, name: str, base: Any) -> dict[str, _Module]:
    """Return {name in the file: the module} for the layers of an adapter called `name`; `base` is the model, if given."""
    paths = {layer: pipeline_path(layer, name) for layer in contents.layers}
    single = not any(path.startswith(("text_encoder_2.", "transformer.")) for path in paths.values())
    prefixes = {**PREFIXES, "text_encoder": SINGLE} if single else PREFIXES
    rules = _rules([path for path in paths.values() if path.startswith("transformer.")], name, base)
    reader = _reader()
    modules: dict[str, _Module] = {}
    for layer, path in paths.items():
        part, _, rest = path.partition(".")
        where = f"layer {layer!r} of adapter {name!r}"
        if part not in prefixes:
            raise AdapterUnsupported(f"{where} is of a {part}, for which kohya's layout has no names here: {ELSEWHERE}")
        rule, number = rules[path] if part == "transformer" else (_Rule(rest, (path,)), "")
        module = prefixes[part] + rule.source.replace("#", number).replace(".", "_")
        targets = tuple(target.replace("#", number) for target in rule.targets)
        try:
            read = reader.place(module, None, where).targets
        except AdapterUnsupported as error:
            raise AdapterUnsupported(f"{where} would be {module!r}, which cannot be read back: {ELSEWHERE}") from error
        if read != targets:
            raise AdapterUnsupported(f"{where} would be {module!r}, which is read as {read[0]!r}: {ELSEWHERE}")
        known = modules.get(module, _Module(rule, (None,) * len(targets))).layers
        modules[module] = _Module(
            rule, tuple(layer if target == path else known_layer for known_layer, target in zip(known, targets, strict=True))
        )
    return modules


def _rules(paths: list[str], name: str, base: Any) -> dict[str, tuple[_Rule, str]]:
    """Return {path in a transformer: (its rule, its block's number)} for the one family of models that has all paths."""
    kind = type(getattr(base, "transformer", base)).__name__
    # by the first letters of diffusers' classes
    families: dict[str, list[_Rule]] = _reader().family_rules
    named = [family for family in families if kind.startswith(family)]
    tables = {family: {path: _rule(path, families[family]) for path in paths} for family in named or families}
    fits = {family: table for family, table in tables.items() if all(table.values())}
    if paths and len(fits) > 1:
        raise AdapterUnsupported(
            f"the layers of adapter {name!r} can lie in a transformer of {' or of '.join(fits)}, and kohya's layout has "
            "other names in each: say which by base=pipe, the pipeline or its transformer"
        )
    if not fits:
        layer = next(path for table in tables.values() for path, rule in table.items() if rule is None)
        raise AdapterUnsupported(
            f"layer {layer!r} of adapter {name!r} is of a transformer, for which kohya's layout has no names here "
            f"({' and '.join(tables)} are known): {ELSEWHERE}"
        )
    return {path: rule for table in fits.values() for path, rule in table.items() if rule is not None}


def _rule(path: str, table: list[_Rule]) -> tuple[_Rule, str] | None:
    number = next(iter(re.findall(r"\.(\d+)\.", path)), "")
    for rule in table:
        if path in (target.replace("#", number, 1) for target in rule.targets):
            return rule, number
    return None


def _joined(module: str, joined: _Module, contents: Contents, name: str) -> Factors:
    """Return the factors of a module that joins several layers: their B stacked if they share A, else in blocks."""
    parts = [None if layer is None else contents.layers[layer] for layer in joined.layers]
    known = [part for part in parts if part is not None]
    first = known[0]
    if len(parts) == 1:
        factors: Factors = _reader().turned(first) if joined.rule.turned else first
        return factors
    shares = joined.rule.shares
    unit = max(len(part.b_OR) // share for part, share in zip(parts, shares, strict=True) if part is not None)
    if any(part is not None and len(part.b_OR) != unit * share for part, share in zip(parts, shares, strict=True)):
        rows = {layer: len(contents.layers[layer].b_OR) for layer in joined.layers if layer is not None}
        raise AdapterUnsupported(
            f"adapter {name!r}: {module!r} would join layers of {rows} outputs, which are not in the proportion "
            f"{' : '.join(map(str, shares))}: {ELSEWHERE}"
        )
    if all(part is not None and torch.equal(part.a_RI, first.a_RI) for part in parts):
        return replace(first, b_OR=torch.cat([part.b_OR for part in known]))
    blocks = [torch.zeros(unit * share, 0) if part is None else part.b_OR for part, share in zip(parts, shares, strict=True)]
    return replace(first, a_RI=torch.cat([part.a_RI for part in known]), b_OR=torch.block_diag(*blocks))  # type: ignore[no-untyped-call]
