"""The page's experiments on the base model: mixtures set by sliders, weights searched on examples, routers on a text.

The model is loaded when it is first needed and belongs to one thread. Numbers are those of the library's public calls.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, Self
from uuid import uuid4

import torch
from pydantic import Field, model_validator
from rich.progress import Progress, TaskID

from loraweave import (
    AdapterNotFound,
    Composer,
    Composition,
    ExpertPool,
    Factors,
    Hub,
    MixtureWeights,
    PackageMissing,
    Task,
    WeightingError,
    compose,
    names,
    parse,
    router,
)
from loraweave.extend import Prompt, brought
from loraweave.extend.composing import Named, Stored
from loraweave.extend.merging import MergeReport, by_number, interference
from loraweave.extend.routing import TokenRouter, router_class, router_names
from loraweave.extensions.ui.catalogue import Name, Query, block_and_kind, grid
from loraweave.extensions.ui.snippets import by_block, texts_of

MAX_PICKED = 8
# the name of the file and function by which an extension shows the weights of tokens
PANEL = "panel"
# the number of explanations that are kept
MAX_KEPT = 8
Text = Annotated[str, Field(max_length=20_000)]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-100, le=100)]
Tell = Callable[[dict[str, Any]], None]
# what a panel returns: HTML, {adapter: share}, the mean entropy, and (token, {adapter: share}) of the answer's tokens
Shown = tuple[str, dict[str, float], float, list[tuple[str, dict[str, float]]]]


class Part(Query):
    """An adapter's weight, and its weights in those blocks where they differ."""

    name: Name
    weight: Finite
    blocks: dict[str, Finite] = Field(default_factory=dict)


class Picked(Query):
    names: Annotated[list[Name], Field(min_length=1, max_length=MAX_PICKED)]


class Mixed(Query):
    """A mixture as the page's sliders are set."""

    parts: Annotated[list[Part], Field(min_length=1, max_length=MAX_PICKED)]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.names)) < len(self.parts):
            raise ValueError("an adapter is there twice; give each once")
        return self

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def by_block(self) -> bool:
        return any(part.blocks for part in self.parts)

    @property
    def formula(self) -> str:
        """The mixture as a formula; "" for weights by block, which no formula has."""
        return self._formula(repr)

    @property
    def shown(self) -> str:
        """The formula with weights of three digits, to be read; "" for weights by block."""
        return self._formula("{:.3g}".format)

    def _formula(self, written: Callable[[float], str]) -> str:
        terms = (f"{written(part.weight)}*{Named(part.name)}" for part in self.parts)
        return "" if self.by_block else str(parse(" + ".join(terms)))

    def require_some(self) -> None:
        """Raise WeightingError if all weights are zero."""
        if not any(part.weight or any(part.blocks.values()) for part in self.parts):
            raise WeightingError("all weights are zero, which is the base model: move a slider first")

    def by_layer(self, layers: Sequence[str]) -> dict[str, dict[str, float]]:
        block = {layer: block_and_kind(layer)[0] for layer in layers}
        return {layer: {p.name: p.blocks.get(block[layer], p.weight) for p in self.parts} for layer in layers}


class Asked(Query):
    instruction: Text = ""
    text: Text
    max_new_tokens: Annotated[int, Field(ge=1, le=512)] = 40

    @property
    def prompt(self) -> str:
        """The prompt in a task's form if there is an instruction; else the bare text."""
        return str(Task([], instruction=self.instruction).prompt(self.text)) if self.instruction.strip() else self.text


class Question(Asked):
    chat: bool = False

    @property
    def question(self) -> Prompt:
        """The prompt, or in chat mode the user's turn."""
        return Task([], instruction=self.instruction, chat=True).prompt(self.text) if self.chat else self.prompt


class Answered(Mixed, Question):
    """A question to the base and to a mixture."""


class Copied(Question):
    """A formula to copy, or the parts of a mixture by block, which has none."""

    formula: Annotated[str, Field(max_length=4096)] = ""
    parts: Annotated[list[Part], Field(max_length=MAX_PICKED)] = Field(default_factory=list)


class Found(Picked):
    instruction: Text = ""
    examples: Annotated[list[tuple[Text, Text]], Field(min_length=1, max_length=200)]
    per: Literal["adapter", "block"] = "adapter"
    budget: Annotated[int, Field(ge=4, le=400)] = 40
    held_out: bool = False
    chat: bool = False


class Kept(Mixed):
    instruction: Text = ""
    allow_licenses: bool = False


class Saved(Kept):
    name: Name
    replace: bool = False


class Exported(Kept):
    target: str = "peft"


class Routed(Asked):
    names: list[Name] = Field(default_factory=list, max_length=MAX_PICKED)
    router: str = "arrow"
    max_new_tokens: Annotated[int, Field(ge=0, le=512)] = 0


class Workbench:
    """The experiments on one hub and one base; `load` returns (model, tokenizer). Only some methods may run in any thread.

    These are `picked`, `mixed`, `copied` and `explanation`; all others need one thread. `base` is the base model's name in
    texts to copy, None for the default.
    """

    def __init__(self, hub: Hub, load: Callable[[], tuple[Any, Any]], base: str | None = None) -> None:
        self._hub = hub
        self._load = load
        self._base = base
        self._loaded: tuple[Any, Any] | None = None
        self._engine: Composer | None = None
        self._engine_of: tuple[tuple[str, str], ...] = ()
        self._pages: OrderedDict[str, str] = OrderedDict()

    def choices(self) -> dict[str, Any]:
        """Return the names that the page offers: targets of exports, and routers that need neither training nor data."""
        kinds = {name: router_class(name) for name in router_names()}
        ready = [name for name, kind in kinds.items() if not kind.learned and kind.fit is TokenRouter.fit]
        return {"targets": names("targets"), "routers": ready if brought(PANEL) else []}

    def picked(self, asked: Picked) -> dict[str, Any]:
        """Return the blocks of the picked adapters, for their sliders, and a text to try them on."""
        pool = self._hub.pool(asked.names)
        records = [self._hub.record(name) for name in asked.names]
        first = next((record for record in records if record.examples), records[0])
        return {
            "blocks": sorted({block_and_kind(layer)[0] for layer in pool.layer_names}, key=by_number),
            "instruction": first.description,
            "text": first.examples[0] if first.examples else "",
            "licenses": {record.name: record.license or "" for record in records},
        }

    def mixed(self, asked: Mixed) -> dict[str, Any]:
        """Measure how far the weighted updates point the same way (cosines and norms); needs no model."""
        pool = self._hub.pool(asked.names)
        by_layer = {layer: list(row.values()) for layer, row in asked.by_layer(pool.layer_names).items()}
        report = mixture_interference({name: pool[name].layers for name in pool.names}, by_layer)
        return {
            "names": list(pool.names),
            "cosines": report.cosines(),
            "norms": [sum(row.norms[at] ** 2 for row in report.values()) ** 0.5 for at in range(len(pool))],
            "conflict": grid({layer: row.sign_conflict for layer, row in report.items()}),
            "agreement": grid({layer: fmean(row.cosines) for layer, row in report.items() if row.cosines}),
            "shares": [grid({layer: row.norms[at] for layer, row in report.items()}) for at in range(len(pool))],
            "formula": asked.formula,
            "shown": asked.shown,
        }

    def copied(self, asked: Copied) -> dict[str, str]:
        """Return the formula as texts to copy, keyed by their kind; of parts by block, Python alone."""
        about: tuple[Any, ...] = (asked.question, asked.max_new_tokens)
        if asked.parts:
            weights = {part.name: part.weight for part in asked.parts}
            blocks = {
                block: {p.name: p.blocks[block] for p in asked.parts if block in p.blocks}
                for part in asked.parts
                for block in part.blocks
            }
            return {"python": by_block(self._hub, self._base, weights, blocks, *about)}
        return texts_of(self._hub, self._base, asked.formula, *about)

    def answer(self, asked: Answered, tell: Tell) -> None:
        """Stream two answers to one prompt, generated as one batch: the base's and the mixture's."""
        engine = self._composer(asked.names, tell)
        experts, layers = engine.pool.names, engine.pool.layer_names
        rows = MixtureWeights.of_layers(asked.by_layer(layers), experts).values_BTLE
        mixture = MixtureWeights(torch.cat([torch.zeros_like(rows), rows]), experts, layers)
        stream = engine.stream([asked.question] * 2, mixture=mixture, max_new_tokens=asked.max_new_tokens, do_sample=False)
        # closing the stream when the client has gone ends the generation at its next token
        with closing(stream) as pieces:  # type: ignore[type-var]
            for base, composition in pieces:
                tell({"base": base, "composition": composition})

    def find(self, asked: Found, tell: Tell) -> None:
        """Stream the progress of a search of weights, and then the weights and the candidates that were compared."""
        engine = self._composer(asked.names, tell)
        options: dict[str, Any] = {"by_layer": False}
        if asked.per == "block":
            groups: dict[str, list[str]] = {}
            for layer in engine.pool.layer_names:
                groups.setdefault(block_and_kind(layer)[0], []).append(layer)
            options = {"groups": groups}
        composition = compose(
            engine.model,
            engine.tokenizer,
            engine.pool,
            Task(asked.examples, instruction=asked.instruction, chat=asked.chat),
            method="gradient" if len(engine.pool) > 1 else "grid",
            budget=asked.budget,
            folds=3 if asked.held_out else 0,
            # licenses are not checked for a look at weights: saving and exporting check them
            allow_licenses=True,
            progress=ToldProgress(tell),
            **(options if len(engine.pool) > 1 else {}),
        )
        chosen = composition.report.chosen
        rows = [
            {"name": row.name, "loss": row.loss, "held_out_loss": row.held_out_loss, "chosen": row.name == chosen}
            for row in composition.report.rows
        ]
        parts = [_part(name, composition.all_weights, composition.by_layer) for name in engine.pool.names]
        tell({"parts": parts, "rows": rows, "reason": composition.report.reason})

    def save(self, asked: Saved, tell: Tell) -> None:
        """Save the mixture in the hub: as a formula, or with weights by block as a composition."""
        asked.require_some()
        kept = parse(asked.formula) if asked.formula else self._composition(asked, tell)
        stored = self._hub.save_composition(asked.name, kept, replace=asked.replace)
        tell({"name": stored.name, "hash": stored.hash, "formula": str(Stored(stored.name))})

    def export(self, asked: Exported) -> Path:
        """Export the mixture as one adapter for a target program to a temporary zip file, which the caller deletes."""
        composition = self._composition(asked)
        with tempfile.TemporaryDirectory(prefix="loraweave-") as temporary:
            folder = Path(temporary) / "export"
            composition.export(folder, target=asked.target)
            place = Path(tempfile.mkstemp(prefix="loraweave-", suffix=".zip")[1])
            with zipfile.ZipFile(place, "w") as archive:
                for path in sorted(folder.rglob("*")):
                    archive.write(path, path.relative_to(folder))
        return place

    def route(self, asked: Routed, tell: Tell) -> None:
        """Make a page that shows which adapter counts for which token, and tell its number, which `explanation` takes."""
        names = asked.names or [hit.name for hit in self._hub.search(asked.prompt, k=MAX_PICKED)]
        engine = self._composer(names, tell)
        made = router(asked.router, engine.bound_pool)
        title = f"{asked.router} over {', '.join(names)}"
        # the last token of an answer is never read, so that no router weighs it: one more shows all that were asked for
        tokens = asked.max_new_tokens + 1 if asked.max_new_tokens else 0
        page, shares, entropy, answer = _panel()(engine, asked.prompt, made, max_new_tokens=tokens, title=title)
        number = uuid4().hex
        self._pages[number] = page
        while len(self._pages) > MAX_KEPT:
            self._pages.popitem(last=False)
        told = [{"name": name, "share": share} for name, share in shares.items()]
        formula = f"{asked.router}({', '.join(str(Named(name)) for name in names)})"
        pieces = [{"token": token, "shares": of_token} for token, of_token in answer]
        tell({"page": number, "shares": told, "entropy": entropy, "answer": pieces, "formula": str(parse(formula))})

    def explanation(self, number: str) -> str:
        """Return the page of that number. Raises AdapterNotFound for an unknown or dropped number."""
        try:
            return self._pages[number]
        except KeyError:
            raise AdapterNotFound(f"the page {number!r:.40} is gone: only the last {MAX_KEPT} stay; ask again") from None

    def _composer(self, names: Sequence[str], tell: Tell = lambda event: None) -> Composer:
        """Return the composer of the named adapters in their present versions; the last composer is cached."""
        if self._loaded is None:
            tell({"what": "Loading the base model"})
            self._loaded = self._load()
        wanted = tuple((name, self._hub.record(name).hash) for name in names)
        if self._engine is None or wanted != self._engine_of:
            tell({"what": "Reading the adapters"})
            model, tokenizer = self._loaded
            # names are the hub's, not those in the files
            self._engine = Composer(model, ExpertPool({n: self._hub[n] for n in names}), tokenizer=tokenizer)
            self._engine_of = wanted
        return self._engine

    def _composition(self, asked: Kept, tell: Tell = lambda event: None) -> Composition:
        asked.require_some()
        engine = self._composer(asked.names, tell)
        by_layer = asked.by_layer(engine.pool.layer_names)
        mixture = MixtureWeights.of_layers(by_layer, engine.pool.names)
        task = Task([], instruction=asked.instruction)
        base = Composition.of(engine.model, engine.tokenizer, task, name="manual", reason="weights chosen by hand")
        return replace(
            base,
            pool=engine.pool,
            all_weights=mixture.means(),
            by_layer=by_layer if asked.by_block else None,
            allow_licenses=asked.allow_licenses,
        )


class ToldProgress(Progress):
    """A progress bar that sends events: the label, the steps done, the total, and the seconds left."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(disable=True)
        self._tell = tell

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        (task,) = (candidate for candidate in self.tasks if candidate.id == task_id)
        left = task.time_remaining
        self._tell({"what": task.description, "done": task.completed, "total": task.total, "seconds_left": left})


def _panel() -> Callable[..., Shown]:
    """Return the function `panel`, which shows weights by token, from an installed package with a file `panel`."""
    modules = brought(PANEL)
    if not modules:
        raise PackageMissing("no extension that is installed shows the weights of tokens; loraweave comes with one")
    shows: Callable[..., Shown] = getattr(import_module(min(modules.values())), PANEL)
    return shows


def _part(name: str, weights: Mapping[str, float], by_layer: Mapping[str, Mapping[str, float]] | None) -> dict[str, Any]:
    """Return the slider settings of an adapter: its weight, and its weight in each block."""
    blocks = {block_and_kind(layer)[0]: float(row.get(name, 0.0)) for layer, row in (by_layer or {}).items()}
    return {"name": name, "weight": float(weights.get(name, 0.0)), "blocks": blocks}


def mixture_interference(
    experts: Mapping[str, Mapping[str, Factors]], by_layer: Mapping[str, Sequence[float]]
) -> MergeReport:
    """Return a report on how far a mixture's weighted updates agree in each layer; its ranks are 0, as nothing is merged.

    `experts` maps names to an adapter's layers, `by_layer` maps each layer to one weight per adapter; the report's `weights`
    are their means over the layers.
    """
    rows = {
        layer: interference([layers.get(layer) for layers in experts.values()], weights)
        for layer, weights in by_layer.items()
    }
    means = tuple(map(fmean, zip(*by_layer.values(), strict=True)))
    return MergeReport("linear", tuple(experts), means, rows)
