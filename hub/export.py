"""Export: a folder for a program that loads adapters, exact, or cut to a rank with the error reported."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loraweave.errors import AdapterUnsupported, UnknownName, WeightingError
from loraweave.hub.formats._contents import Contents
from loraweave.hub.licenses import stated_license
from loraweave.hub.sources import upload
from loraweave.hub.targets._target import Target, module_names
from loraweave.lowrank import algebra
from loraweave.registry import get, names, nearest
from loraweave.types import Factors


@dataclass(frozen=True)
class ExportReport:
    """The report of an export: the folder written, its errors, and how a server loads it.

    `rank` is the largest of any layer in the folder (that of every layer for most targets). `errors` has each layer's
    relative Frobenius error from the cut of its rank, 0 if nothing was cut, and `relative_error` that of the whole update.
    `flags` are the arguments that a server needs after `program`, its name and the base's; `modules` the layer names that it
    must know. `license` is that of the card, for a merge that of all its parents; None if it is not known.
    """

    folder: Path
    target: str
    base_model: str
    rank: int
    errors: Mapping[str, float]
    relative_error: float = 0.0
    modules: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    license: str | None = None
    program: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The server's command line for a shell; empty if the target is not a server."""
        return shlex.join([*self.program, *self.flags])

    def push_to_hub(
        self,
        repository: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the folder to `owner/name` on the model hub; return the commit's id. Raises as `Adapter.push_to_hub`."""
        message = commit_message or f"an export for {self.target}"
        return upload(self.folder, repository, token=token, private=private, message=message)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "command": self.command}

    def __str__(self) -> str:
        cut = [layer for layer, error in self.errors.items() if error]
        lines = [f"wrote {len(self.errors)} layers of rank up to {self.rank} for {self.target} to {self.folder}"]
        if cut:
            worst = max(cut, key=lambda layer: self.errors[layer])
            lines.append(
                f"rank cut in {len(cut)} layers: relative error {self.relative_error:.3g} of the whole update, at worst "
                f"{self.errors[worst]:.3g} in {worst}"
            )
        else:
            lines.append("no rank was cut: the update is exact")
        lines.append(f"modules: {', '.join(self.modules)}")
        lines.append(f"license: {self.license or 'unknown'}")
        lines.extend(f"note: {text}" for text in self.warnings)
        if self.command:
            lines.append(f"serve it: {self.command}")
        return "\n".join(lines)


def require_target(target: str) -> type[Target]:
    """Return the target of that name. Raises UnknownName for anything but a target of an export."""
    known = names("targets")
    if target not in known:
        raise UnknownName(f"no export target {target!r}{nearest(target, known)}; there are {', '.join(known)}")
    target_class: type[Target] = get("targets", target)
    return target_class


def export(
    contents: Contents, name: str, folder: Path, *, target: str, max_rank: int | None, base: Any = None
) -> ExportReport:
    """Write the folder of an adapter, called `name` in requests to a server, and return the report.

    Layers above `max_rank` are cut to it by the best approximation in the Frobenius norm; nothing is cut without it. `base`
    is the base model, its config, folder or id, by default the base that the adapter names. Raises UnknownName for a target,
    WeightingError for a rank below 1, BaseModelMismatch for a base that a target must know and that cannot be read, and
    AdapterUnsupported for what the target cannot express; nothing is written then.
    """
    kind = require_target(target)
    if max_rank is not None and max_rank < 1:
        raise WeightingError(f"max_rank={max_rank} is below 1; leave it out to keep the exact rank")
    base = contents.base_model if base is None else base
    kind.check(contents, name, base)
    layers = dict(contents.layers)
    if kind.drops_zeros:
        layers = {layer: replace(factors, bias_O=None) for layer, factors in layers.items() if factors.rank}
    cut = {layer: _cut_rank(f"layer {layer!r} of adapter {name!r}", factors, max_rank) for layer, factors in layers.items()}
    errors = {layer: error for layer, (_, error) in cut.items()}
    total = _total_error(layers, errors)
    rank = max((factors.rank for factors, _ in cut.values()), default=0)
    if kind.limit is not None and rank > kind.limit:
        raise AdapterUnsupported(
            f"adapter {name!r} has rank {rank}, but {target} takes at most {kind.limit}: pass max_rank={kind.limit} or less "
            "to cut it; the report shows the error"
        )
    written = {layer: _pad(factors, rank) if kind.one_rank else factors for layer, (factors, _) in cut.items()}
    card = {**contents.card, "export": {"target": target, "rank": rank, "relative_error": total}}
    out = replace(contents, layers=written, card=card)
    kind.write(out, name, folder, base)
    beside = [f"kept beside the adapter: {', '.join(contents.files)}"] if contents.files else []
    return ExportReport(
        folder,
        target,
        contents.base_model,
        rank,
        errors,
        total,
        module_names(written),
        kind.flags(out, name, folder, rank),
        (*beside, *kind.notes(out, folder, rank)),
        stated_license(contents.card.get("license")),
        kind.program(out),
    )


def _cut_rank(where: str, factors: Factors, max_rank: int | None) -> tuple[Factors, float]:
    if max_rank is None or factors.rank <= max_rank:
        return factors, 0.0
    if factors.magnitude_O is not None:
        raise AdapterUnsupported(
            f"{where} is DoRA of rank {factors.rank}, whose magnitude belongs to that update: it cannot be cut to "
            f"{max_rank}; lw.to_lora(adapter, model) gives a plain LoRA, which can"
        )
    return algebra.compress(factors, max_rank)


def _total_error(layers: Mapping[str, Factors], errors: Mapping[str, float]) -> float:
    if not any(errors.values()):
        return 0.0
    norms = {layer: algebra.norm(factors) for layer, factors in layers.items()}
    lost = math.hypot(*(errors[layer] * norms[layer] for layer in layers))
    return lost / math.hypot(*norms.values())


def _pad(factors: Factors, rank: int) -> Factors:
    """Return the same update, to the bit, with rows and columns of zeros up to `rank`."""
    missing = rank - factors.rank
    a_RI, b_OR = factors.a_RI, factors.b_OR
    return replace(
        factors,
        a_RI=torch.cat([a_RI, a_RI.new_zeros(missing, a_RI.shape[1])]),
        b_OR=torch.cat([b_OR, b_OR.new_zeros(b_OR.shape[0], missing)], dim=1),
    )
