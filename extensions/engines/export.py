"""The export of an adapter as a folder for another program, exact, or cut to a rank with the error reported."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch.nn.functional import pad

from loraweave import AdapterUnsupported, Factors, UnknownName, WeightingError, names
from loraweave.extend import algebra, get, nearest
from loraweave.extend.formats import Contents, ExportReport, module_names
from loraweave.extend.hubs import stated_license

# modules whose weights many base models share with each other
TIED_MODULES = {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "lm_head", "embed_out"}


class Target(ABC):
    """The base class of a program that loads adapters.

    `limit` is the largest rank that it takes, None for no limit. With `one_rank` every layer gets the largest rank of any by
    rows of zeros. `base` is a model, its config, folder or id, for targets that must know its architecture.
    """

    limit: ClassVar[int | None] = None
    one_rank: ClassVar[bool] = False
    # a file that every folder of this target has, by which an earlier export is recognised
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
        get("formats", "peft").write(contents, folder)

    @classmethod
    def program(cls, contents: Contents) -> tuple[str, ...]:
        """Return the words of the command that starts a server with the base, before `flags`; () if there is none."""
        return ()

    @classmethod
    def flags(cls, contents: Contents, name: str, folder: Path, rank: int) -> tuple[str, ...]:
        """Return the server's arguments for an adapter called `name` in this folder, of this `rank`."""
        return ()

    @classmethod
    def notes(cls, contents: Contents, folder: Path, rank: int) -> list[str]:
        """Return what a user must know about the folder, one sentence each."""
        return []


def require_target(target: str) -> type[Target]:
    """Return the export target of that name. Raises UnknownName for any other name."""
    known = names("targets")
    if target not in known:
        raise UnknownName(f"no export target {target!r}{nearest(target, known)}; there are {', '.join(known)}")
    target_class: type[Target] = get("targets", target)
    return target_class


def export(
    contents: Contents, name: str, folder: Path, *, target: str, max_rank: int | None, base: Any = None
) -> ExportReport:
    """Write an adapter's folder for the program `target`; return the report. Requests call the adapter `name`.

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
    """Return the same update, to the bit, as factors of this `rank`, padded with zeros."""
    missing = rank - factors.rank
    return replace(factors, a_RI=pad(factors.a_RI, (0, 0, 0, missing)), b_OR=pad(factors.b_OR, (0, missing)))
