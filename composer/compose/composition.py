"""A composition: what was chosen for a task, ready to be refined, kept and given away."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from loraweave.common.chat import prompt_json
from loraweave.common.files import as_path, replacing
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.refine import (
    STEP_COST,
    Tuning,
    byom,
    example_loss,
    loss_with,
    num_scalars,
    pool_of,
    prune_mixture,
    rises_without_each,
    targets_of,
    tuned_adapters,
)
from loraweave.composer.compose.report import (
    FILE,
    FORMAT,
    FORMAT_WITH_ROUTER,
    PACKAGES,
    PARTS,
    Report,
    ReportRow,
    SavedRecipe,
    task_json,
)
from loraweave.composer.compose.settings import router_name
from loraweave.composer.compose.task_mixture import TaskMixture
from loraweave.composer.model.layers import with_magnitudes
from loraweave.errors import CompositionError, ScopeError, WeightingError
from loraweave.hub.adapter import Adapter, ExportReport, parent_of
from loraweave.hub.base import base_id, fingerprint
from loraweave.hub.formats._card import shared_card
from loraweave.hub.licenses import require_one_work, stated_license
from loraweave.hub.pool import ExpertPool
from loraweave.hub.sources import ADAPTER_FILES, README, find_folder, push
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

# the files of a repository that are downloaded: in its folder, in members' folders, and in those of a router's adapters
FILES = tuple(f"*{name}" for name in (FILE, "router.json", "router.safetensors", *ADAPTER_FILES))


@dataclass(frozen=True, eq=False, repr=False)
class Composition(TaskMixture):
    """The result of `compose`: a mixture for a task that can be refined, saved and shared.

    Its fields, weights, adapter and answers are those of `TaskMixture`.
    """

    members: Mapping[str, Composition] = field(default_factory=dict)
    steps: Mapping[str, Composition] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        task: Task,
        what: Adapter | TokenRouter | Mapping[str, Composition] | None = None,
        *,
        pool: ExpertPool | None = None,
        name: str = "base",
        reason: str = "as asked",
        seed: int = 0,
    ) -> Composition:
        """Return the composition that answers a task with `what`, without any search.

        `what` is an adapter, a router over the adapters of `pool`, {name: member} for an average of the members'
        probabilities, or None for the base model. `name` and `reason` are the chosen name and the reason in its report.
        Raises WeightingError for anything else, ScopeError for a member that is more than one adapter.
        """
        fields: dict[str, Any]
        match what:
            case None:
                fields = {}
            case Adapter():
                fields = {"stored": what}
            case TokenRouter() if pool is not None:
                fields = {"router": what, "pool": pool}
            case Mapping() if what and all(isinstance(member, Composition) for member in what.values()):
                fields = {"members": what}
            case _:
                raise WeightingError(
                    f"a composition is of an adapter, a router and its pool, or compositions by name, not of {what!r:.80}"
                )
        for member, composition in fields.get("members", {}).items():
            if composition.router is not None or composition.members:
                raise ScopeError(
                    f"member {member!r} of an average is not one adapter: a router or an average answers by itself"
                )
        report = Report((), name, reason, (), 0.0, 0)
        return replace(cls(model, tokenizer, task, None, {}, "linear", report, seed), **fields)

    def leave_one_out(self) -> dict[str, float]:
        """Return {name: by how much the examples' mean loss rises without that adapter}; the other weights stay as they are.

        A rise is negative if the composition is better without the adapter. All are measured in one pass, with a mixture per
        row; with a router, in a pass for each adapter, and the other adapters have the weights that the router gives.
        """
        if self.router is not None:
            return self.engine.leave_one_out(self.task, self.router, progress=False)
        return rises_without_each(*self._loss_and_mixture("leave adapters out of"))

    def prune(self, tolerance: float = 0.01, *, progress: bool = True) -> Composition:
        """Return the composition without the adapters missed least, as long as the loss rises by at most `tolerance` nats.

        The limit is on the total rise. Raises CompositionError for a composition that has only its merged adapter,
        ScopeError for a composition with a router, WeightingError for a tolerance below 0.
        """
        started = time.perf_counter()
        pruned = prune_mixture(*self._loss_and_mixture("prune"), tolerance, progress=progress)
        kept, count = pruned.mixture, len(pruned.mixture.experts)
        return self._renew(
            "pruned",
            f"{len(pruned.left_out)} of {count} adapters left out; loss {pruned.loss_before:.3f} became {pruned.loss:.3f}",
            started,
            loss=pruned.loss,
            evaluations=pruned.evaluations,
            all_weights=kept.means(),
            by_layer=kept.by_layer() if kept.layers else None,
        )

    def cut(self, rank: int) -> Composition:
        """Return the composition with every layer's update cut to at most `rank`: its best approximation in Frobenius norm.

        The report's reason has the rank before, the relative error of all layers together, and the loss before and after.
        Raises CompositionError when the composition is the base model itself.
        """
        if self.is_base:
            raise CompositionError("cannot cut the rank of this composition: it is the base model itself")
        started = time.perf_counter()
        whole = self.adapter
        smaller = replace(byom(whole, rank), name=whole.name)
        error = smaller.card["compression"]["relative_error"]
        before, after = loss_with(*self._on, whole), loss_with(*self._on, smaller)
        return self._renew(
            "cut",
            f"rank {whole.rank} became {smaller.rank}, relative error {error:.3f}; loss {before:.3f} became {after:.3f}",
            started,
            loss=after,
            evaluations=2,
            stored=smaller,
        )

    def tune(
        self,
        steps: int = Tuning.steps,
        *,
        lr: float = Tuning.lr,
        rank: int = Tuning.rank,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> Composition:
        """Train the merged adapter, cut to `rank` where it is higher, on the examples for `steps` steps.

        Where the composition is the base model itself, train a new adapter of the linear layers that the pool's update.
        Raises what `train_adapters` raises: AdapterUnsupported where the adapter is more than factors of linear layers.
        """
        started = time.perf_counter()
        start = None if self.is_base else self.adapter
        before = loss_with(*self._on, start)
        trained = tuned_adapters(
            *self._on,
            {"composition": start},
            {"composition": range(len(self.task.examples))},
            Tuning(steps, lr, rank, seed=self.seed),
            target_modules=targets_of(self.pool),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            progress=progress,
        )["composition"]
        after = loss_with(*self._on, trained)
        return self._renew(
            "tuned",
            f"{steps} steps on the examples from {self.report.chosen}; loss {before:.3f} became {after:.3f}",
            started,
            loss=after,
            evaluations=STEP_COST * steps + 2,
            num_trained=num_scalars(trained),
            stored=trained,
            tuned_steps=self.tuned_steps + steps,
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write composition.json, a README.md and, unless it is the base model, the merged adapter as a PEFT folder.

        A composition with a router has the router and its adapters there instead; raises ScopeError for a router that
        `lw.router` cannot make. Members of an average and steps of a program go to folders inside this one.
        """
        target = as_path(folder, "the folder of a composition", CompositionError)
        if target.exists() and not (target / FILE).is_file() and any(target.iterdir()):
            raise CompositionError(f"{target} holds something that is not a composition; name another folder")
        with replacing(target) as new:
            if self.router is not None:
                if not isinstance(self.router, TokenRouter):
                    raise ScopeError(
                        f"loraweave cannot write router {router_name(self.router)!r} to a file: only routers of lw.router() "
                        "can be saved"
                    )
                self.router.save_pretrained(new / "router", pool=pool_of(self.router, self.engine))
            elif not self.is_base and not self.parts:
                with_magnitudes(self.adapter, self.model).save_pretrained(new / "adapter")
            for number, part in enumerate([*self.members.values(), *self.steps.values()]):
                part.save_pretrained(new / f"member-{number}")
            (new / FILE).write_text(json.dumps(self._recipe(), indent=1, ensure_ascii=False))
            # no path and no table, whose width is the terminal's: equal compositions are equal files
            (new / README).write_text(self._card("."), encoding="utf-8")
        return target

    def export(
        self, folder: str | Path, *, target: str = "peft", max_rank: int | None = None, allow_licenses: bool = False
    ) -> ExportReport:
        """Write the composition as one adapter for one of `lw.names("targets")`, and return what `Adapter.export` returns.

        If prompts show demonstrations, or are a chat, the card's `prompts` are the whole prompts, texts or messages, one for
        each order of the demonstrations, with "{input}" for the input. Raises CompositionError when the composition is the
        base model itself.
        """
        allow = allow_licenses or self.allow_licenses
        portable = with_magnitudes(self.adapter, self.model)
        if self.task.demonstrations or self.task.chat:
            prompts = [prompt_json(task.prompt("{input}")) for task in self.task.in_orders()]
            portable = replace(portable, card={**portable.card, "prompts": prompts})
        return portable.export(folder, target=target, max_rank=max_rank, base=self.model, allow_licenses=allow)

    def push_to_hub(
        self, repository: str, *, token: str | None = None, private: bool | None = None, commit_message: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes, with a card, to `owner/name` on the model hub; return the commit's id.

        The card states base, licence, parents with their weights and licences, and the report's scores. Raises what
        `Adapter.push_to_hub` raises, and InvalidLicense for licenses that exclude each other unless `allow_licenses`.
        """
        if not self.allow_licenses:
            require_one_work((name, stated_license(adapter.card.get("license"))) for name, adapter in self._used.items())

        def write(folder: Path) -> None:
            self.save_pretrained(folder)
            parents = [{key: parent.get(key) for key in ("name", "weight", "license", "hash")} for parent in self._parents()]
            text = self._card(repository, Parents=json.dumps(parents, indent=1), Scores=str(self.report.table()))
            (folder / README).write_text(text, encoding="utf-8")

        message = commit_message or f"composition, {self.report.chosen}"
        return push(write, repository, token=token, private=private, message=message)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        model: Any = None,
        tokenizer: Any = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Composition:
        """Read a saved composition, from its folder or `owner/name` on the model hub, for the same base model.

        Without a model and tokenizer, load the base that the composition recorded. Raises BaseModelMismatch for another
        model or a base that cannot be loaded, AdapterNotFound if there is no composition, and what a download raises.
        Warns if only the names and shapes of layers, neither weights nor ids, show that the model is the same.
        """
        wanted = {"revision": revision, "token": token, "local_files_only": local_files_only}
        folder = find_folder(source, f"a composition, which has a {FILE}", FILES, **wanted)  # type: ignore[arg-type]
        recipe = SavedRecipe.read(folder)
        if model is None and tokenizer is None:
            model, tokenizer = recipe.load_base()
        elif model is None or tokenizer is None:
            raise CompositionError("a composition is read with a model and its tokenizer: pass both, or neither")
        fields = recipe.fields_on(model)
        for number, name in enumerate(recipe.part_names):
            fields[str(recipe.parts)][name] = cls.from_pretrained(folder / f"member-{number}", model, tokenizer)
        return cls(model, tokenizer, **fields)

    def _loss_and_mixture(self, verb: str) -> tuple[ExampleLoss, MixtureWeights]:
        """Return the loss on the examples as a function of the adapters that have a weight, and their mixture.

        Raises CompositionError for a composition without a pool, and for one that is more than its weights say.
        """
        self._require_one(verb)
        if self.stored is not None or self.pool is None:
            raise CompositionError(
                f"cannot {verb} a composition that was read from a folder, cut or tuned: only the merged adapter is left "
                "of it. Do it before, on what compose() returned"
            )
        if self.is_base:
            raise CompositionError(f"cannot {verb} this composition: it is the base model itself")
        pool = self.pool.subset(self.mean_weights)
        by_layer = self.by_layer is not None
        mixture = cast(MixtureWeights, self.weights) if by_layer else MixtureWeights.of(self.mean_weights, pool.names)
        return example_loss(*self._on, pool, self.merge_method), mixture

    def _renew(
        self, name: str, reason: str, started: float, *, loss: float, evaluations: int, num_trained: int = 0, **fields: Any
    ) -> Composition:
        """Return the composition with other `fields`; its report gets a row of that name, without held-out figures."""
        seconds, new = time.perf_counter() - started, replace(self, **fields)
        row = ReportRow(name, new.all_weights, loss, None, None, seconds, evaluations, new.by_layer, num_trained)
        return replace(new, report=self.report.with_choice(row, reason))

    def _parents(self) -> list[dict[str, Any]]:
        weights = self.mean_weights
        used = [{**parent_of(adapter), "name": name, "weight": weights.get(name)} for name, adapter in self._used.items()]
        return used or [dict(parent) for parent in self.parents]

    def _card(self, source: str, **sections: str) -> str:
        """Return the README.md of the saved composition: Python that reads it from `source` and answers, and its figures."""
        loss = next((row.loss for row in self.report.rows if row.name == self.report.chosen), None)
        figures = [f"chosen: {self.report.chosen} ({self.report.reason})", f"examples: {len(self.task.examples)}"]
        figures += [f"mean loss on them: {'not measured' if loss is None else format(loss, '.3f')}"]
        figures += [f"{'members' if self.members else 'steps'}: {', '.join(self.parts)}"] if self.parts else []
        inputs = [prompt_json(prompt) for prompt, _ in self.task.examples[:1]] or ["..."]
        code = f"composition = lw.Composition.from_pretrained({source!r})\nprint(composition.predict({inputs!r}))"
        title, told = f"Composition by {self.merge_method}", {"Figures": "\n".join(figures), **sections}
        return shared_card(title, base_id(self.model), self.license, "composition", code, told)

    def _recipe(self) -> dict[str, Any]:
        """Return the content of composition.json."""
        parts = {name: list(getattr(self, name)) for name in dict.fromkeys(PARTS.values())}
        alone = FORMAT if self.router is None else FORMAT_WITH_ROUTER
        fields = ("by_layer", "tuned_steps", "license", "merge_method", "seed", "share")
        return {
            "format": max((number for number, name in PARTS.items() if parts[name]), default=alone),
            "base_model": base_id(self.model),
            "fingerprint": fingerprint(self.model).to_json(),
            **parts,
            **{name: getattr(self, name) for name in fields},
            "weights": self.mean_weights,
            "parents": self._parents(),
            "task": task_json(self.task),
            "report": self.report.to_json(),
            "versions": {package: version(package) for package in PACKAGES},
        }
