"""Export: a folder for a program that loads adapters, exact, or cut to a rank with the error reported."""

from __future__ import annotations

import math
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch.nn.functional import pad

from loraweave.errors import AdapterUnsupported, UnknownName, WeightingError
from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats._peft_config import path_of
from loraweave.hub.formats.peft import Peft
from loraweave.hub.licenses import stated_license
from loraweave.hub.sources import upload
from loraweave.lowrank import algebra
from loraweave.registry import get, names, nearest
from loraweave.types import Factors

# modules whose weights many base models share with each other
TIED_MODULES = {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "lm_head", "embed_out"}


class Target(ABC):
    """A program that loads adapters.

    `limit` is the largest rank that it takes, None for no limit. With `one_rank` every layer gets the largest rank of any by
    rows of zeros. `base` is a model, its config, folder or id, for targets that must know its architecture.
    """

    limit: ClassVar[int | None] = None
    one_rank: ClassVar[bool] = False
    # a file that every folder of this target has, by which an earlier one is known
    file: ClassVar[str] = "adapter_config.json"
    # whether layers without an update and biases of zeros are left out
    drops_zeros: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def check(cls, contents: Contents, name: str, base: Any) -> None:
        """Raise AdapterUnsupported, with the way out, for anything that the program cannot compute exactly."""

    @classmethod
    def write(cls, contents: Contents, name: str, folder: Path, base: Any) -> None:
        """Write the folder, whole or not at all: PEFT's, unless the program has its own layout."""
        Peft.write(contents, folder)

    @classmethod
    def program(cls, contents: Contents) -> tuple[str, ...]:
        """Return the words that start a server with the base, before `flags`; none without such a command."""
        return ()

    @classmethod
    def flags(cls, contents: Contents, name: str, folder: Path, rank: int) -> tuple[str, ...]:
        """Return the server's arguments."""
        return ()

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        """Return what a user must know about the folder, one sentence each."""
        return []


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
        told = "no rank was cut: the update is exact"
        if cut := [layer for layer, error in self.errors.items() if error]:
            worst = max(cut, key=lambda layer: self.errors[layer])
            told = (
                f"rank cut in {len(cut)} layers: relative error {self.relative_error:.3g} of the whole update, at worst "
                f"{self.errors[worst]:.3g} in {worst}"
            )
        lines = [
            f"wrote {len(self.errors)} layers of rank up to {self.rank} for {self.target} to {self.folder}",
            told,
            f"modules: {', '.join(self.modules)}",
            f"license: {self.license or 'unknown'}",
            *(f"note: {text}" for text in self.warnings),
        ]
        return "\n".join([*lines, f"serve it: {self.command}"] if self.command else lines)


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


def module_names(layers: Mapping[str, Factors]) -> tuple[str, ...]:
    """Return the last steps of the layers' paths, such as q_proj, sorted; for an expert, those of its parameter."""
    return tuple(sorted({path_of(layer, factors).rpartition(".")[2] for layer, factors in layers.items()}))


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
    return replace(factors, a_RI=pad(factors.a_RI, (0, 0, 0, missing)), b_OR=pad(factors.b_OR, (0, missing)))
