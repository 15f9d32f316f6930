"""An adapter: the low-rank updates of some layers of one base model, with a name and a card."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from loraweave.common.checks import entry
from loraweave.common.files import as_path
from loraweave.errors import AdapterUnsupported, CompositionError
from loraweave.hub.base import model_of
from loraweave.hub.formats import _reading
from loraweave.hub.formats._card import as_list
from loraweave.hub.formats._config import extension_module
from loraweave.hub.formats._contents import MAX_ERROR, Contents
from loraweave.hub.formats._files import as_kept_files
from loraweave.hub.formats.peft import Peft
from loraweave.hub.licenses import require_one_work, stated_license
from loraweave.hub.merge_report import MergeReport
from loraweave.hub.sources import ADAPTER_FILES, README, Repository, name_of, open_source, push, upload
from loraweave.lowrank import algebra
from loraweave.types import BaseKey, Factors, Fingerprint, Kind, own_memory

_NO_FILES: Mapping[str, bytes] = MappingProxyType({})
Form = tuple[tuple[str, int, int, Kind, tuple[int, ...], bool], ...]
# one tuple object for all equal tuples, so that equal forms can be recognised by identity
_one_tuple = lru_cache(maxsize=256)(tuple)


@dataclass(frozen=True)
class ExportReport:
    """The report of an export: the folder written, its errors, and how a server loads it.

    `rank` is the largest rank of any layer in the folder (for most targets, all layers have it). `errors` gives the relative
    Frobenius error of cutting each layer's rank, 0 without a cut; `relative_error`, that of the whole update. `flags` are
    the arguments that a server needs after `program`, its name and the base's; `modules` the layer names it must know.
    `license` is the card's, or that of all parents of a merge; None if unknown.
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
        self, repository: str, *, token: str | None = None, private: bool | None = None, commit_message: str | None = None
    ) -> str:
        """Upload the export to `owner/name` on the model hub; return the commit's id. Raises HubReadOnly if refused."""
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


@dataclass(frozen=True, eq=False)
class Adapter:
    """A stored LoRA. `layers` maps module paths, as in the base model's `named_modules()`, to their factors.

    `card` is JSON: description, examples, tags, license, recipe, scores. `heads` maps parameter names of the base model to
    whole trained tensors that replace the base's (PEFT's modules_to_save), fp32. `files` are the other files of its folder
    (tokenizer, chat template, a reward model's value_head.safetensors): they are kept and written back, but no computation
    uses them. `invocation` makes it an activated LoRA (aLoRA, Greenewald et al. 2025, arXiv 2504.12397): the adapter acts
    from the last occurrence of these token ids in the prompt onwards; an empty one makes it act everywhere. Two adapters
    with equal `hash` have equal factors, heads and invocation tokens.
    """

    name: str
    base_model: str
    layers: Mapping[str, Factors]
    fingerprint: Fingerprint | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise AdapterUnsupported(f"adapter {self.name!r} has no layers")
        object.__setattr__(self, "invocation", tuple(self.invocation))
        if not all(type(token) is int and token >= 0 for token in self.invocation):
            raise AdapterUnsupported(
                f"adapter {self.name!r}: invocation is {self.invocation!r:.60}, not a list of token ids"
            )
        for mapping in ("layers", "card", "heads"):
            object.__setattr__(self, mapping, MappingProxyType(dict(getattr(self, mapping))))
        object.__setattr__(self, "files", as_kept_files(self.files) if self.files else _NO_FILES)

    def __reduce__(self) -> tuple[Any, ...]:
        # a read-only view has no pickle
        views = {"layers": dict(self.layers), "card": dict(self.card), "files": self.files or {}}
        heads = {name: own_memory(head) for name, head in self.heads.items()}
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return type(self), tuple({**values, **views, "heads": heads}.values())

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Repository,
        *,
        name: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        model: Any = None,
        rank: int | None = None,
        max_error: float = MAX_ERROR,
        allow_pickle: bool = False,
    ) -> Adapter:
        """Read an adapter folder, a LoRA file or an archive (zip, tar), or download `owner/name` from the model hub.

        A folder that holds no adapter itself stands for the one adapter below it (`checkpoint-500/`). Weights that are only
        in adapter_model.bin, a pickle, are read with `allow_pickle`, by torch's safe loader, and refused without. After a
        download `card["source"]` has the repository, the commit as revision, and the revision asked for.

        Besides LoRA, most other types that PEFT trains become factors (docs/adapters.md). `model` is the base (or pipeline)
        for types whose file does not determine the update. An update that is not of low rank is cut to the smallest rank
        within `max_error` (Frobenius norm, relative to the layer's update) and at most `rank`; `card["conversion"]` has each
        layer's rank and error. Raises AdapterUnsupported if `rank` leaves a larger error, and for types without such a form.
        """
        wanted = (*ADAPTER_FILES, *_reading.file_patterns(allow_pickle=allow_pickle))
        with open_source(
            source, revision=revision, token=token, local_files_only=local_files_only, allow_patterns=wanted
        ) as opened:
            base = model_of(model)
            contents = _reading.read(opened.folder, model=base, rank=rank, max_error=max_error, allow_pickle=allow_pickle)
        own_name = name or contents.card.get("name") or name_of(source)
        card = {**contents.card, "source": dict(opened.origin)} if opened.origin else contents.card
        parts = contents.base_model, contents.layers, contents.fingerprint, card, contents.heads, contents.files
        return cls(own_name, *parts, contents.invocation)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write a PEFT folder, heads and files included, for `peft.PeftModel.from_pretrained`; return its path.

        A half-precision `dtype` halves the file and rounds the factors, so the adapter read back has another hash.
        """
        return Peft.write(self._contents(), as_path(folder, "the folder of an adapter"), dtype=dtype)

    def export(
        self,
        folder: str | Path,
        *,
        target: str = "peft",
        max_rank: int | None = None,
        base: Any = None,
        allow_licenses: bool = False,
    ) -> ExportReport:
        """Write a folder for a program that loads adapters: one of `lw.names("targets")`, such as "peft".

        Most targets need one rank for all layers, reached by adding zeros. `max_rank` cuts layers above it; without it the
        update is exact. `base` is the base model, its config, folder or id, for targets that must know its architecture; by
        default the base that the adapter names. Raises UnknownName for another target, WeightingError for a rank below 1,
        BaseModelMismatch for a base that cannot be read, AdapterUnsupported with the way out for what the target cannot
        express, InvalidLicense, unless `allow_licenses`, if the adapter was merged or is cut and its licenses exclude each
        other or derived works.
        """
        if not allow_licenses:
            self._require_license(max_rank)
        path = as_path(folder, "the folder of an export")
        export, contents = exporting(target).export, self._contents()
        report: ExportReport = export(contents, self.name, path, target=target, max_rank=max_rank, base=base)
        return report

    def push_to_hub(
        self,
        repository: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        allow_licenses: bool = False,
    ) -> str:
        """Upload the folder of `save_pretrained`, with its card, to `owner/name` on the model hub; return the commit's id.

        A new repository is public or private by the owner's settings, or as `private` says. Raises HubReadOnly if the token
        may not write there, SourceUnavailable if a retry may help, AdapterNotFound for an id of another form, and
        InvalidLicense, unless `allow_licenses`, for a merge of adapters whose licenses forbid it.
        """
        if not allow_licenses:
            self._require_license(None)

        def write(folder: Path) -> None:
            readme = self.save_pretrained(folder) / README
            code = f"import loraweave as lw\n\nadapter = lw.Adapter.from_pretrained({repository!r})"
            readme.write_text(f"{readme.read_text(encoding='utf-8')}\n```python\n{code}\n```\n", encoding="utf-8")

        message = commit_message or f"adapter {self.name}"
        return push(write, repository, token=token, private=private, message=message)

    def _require_license(self, max_rank: int | None) -> None:
        """Raise InvalidLicense if the adapter was merged from others or is cut to `max_rank`, and its licenses forbid it."""
        parents = as_list(entry(self.card.get("recipe"), "parents", object))
        # a merge of one adapter at weight 1 is that adapter
        made = any(entry(parent, "hash", str) != self.hash for parent in parents)
        if made or (max_rank is not None and self.rank > max_rank):
            require_one_work([(self.name, stated_license(self.card.get("license")))])

    def _contents(self) -> Contents:
        card = {**self.card, "name": self.name}
        return Contents(self.base_model, self.layers, self.fingerprint, card, self.heads, self.files, self.invocation)

    @property
    def base(self) -> BaseKey:
        """The base model's key: its id, the revision in PEFT's config, and its fingerprint."""
        return BaseKey(self.base_model, entry(self.card.get("peft"), "revision", str) or None, self.fingerprint)

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(factors.rank for factors in self.layers.values())

    @cached_property
    def report(self) -> MergeReport:
        """The report of the merge that made this adapter, layer by layer; empty for an adapter that was not merged."""
        return MergeReport.from_card(self.card)

    def delta(self, layer: str) -> Tensor:
        """Return the dense update (O, I) of one layer, fp32. Raises KeyError for a layer that has no update."""
        return algebra.delta(self.layers[layer])

    @cached_property
    def form(self) -> Form:
        """The tuple (layer, O, I, kind, kernel, bound) of each layer, which decides what the adapter fits.

        Adapters of one form share one tuple object, whatever their ranks.
        """
        return _one_tuple(
            tuple(
                (layer, factors.b_OR.shape[0], factors.a_RI.shape[1], factors.kind, factors.kernel, factors.bound)
                for layer, factors in self.layers.items()
            )
        )

    @cached_property
    def num_values(self) -> int:
        """The number of values in all factors and heads."""
        factors = [tensor for layer_factors in self.layers.values() for tensor in layer_factors.tensors().values()]
        return sum(tensor.numel() for tensor in (*factors, *self.heads.values()))

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of factors, heads and invocation tokens in a canonical order; names, cards and layout do not enter."""
        digest = hashlib.sha256()
        for layer, factors in sorted(self.layers.items()):
            digest.update(repr((layer, factors.kind, factors.kernel)).encode())
            for part, tensor in factors.tensors().items():
                digest.update(repr((part, tuple(tensor.shape))).encode())
                digest.update(algebra.on_host(tensor).contiguous().numpy().data)
        for parameter, tensor in sorted(self.heads.items()):
            digest.update(repr(("head", parameter, tuple(tensor.shape))).encode())
            digest.update(algebra.on_host(tensor).contiguous().numpy().data)
        if self.invocation:
            digest.update(repr(("invocation", self.invocation)).encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        invocation = f", invocation={list(self.invocation)}" if self.invocation else ""
        sizes = f"rank={self.rank}, layers={len(self.layers)}"
        return f"Adapter({self.name!r}, base_model={self.base_model!r}, {sizes}{invocation})"


def exporting(target: str, part: str = "export") -> Any:
    """Return module `part` of the extension that exports. Raises AdapterUnsupported, naming `target`, if there is none."""
    return extension_module(part, f"an export for {target!r:.80}", "engines", "writes for other programs")


def cosine(left: Adapter, right: Adapter) -> tuple[float, int]:
    """Return <D_left, D_right> / (|D_left| |D_right|) over all layers, D = b a, and the number of layers that both update.

    A layer that only one of them updates counts in its norm. Gains, biases and magnitudes are left out.
    """
    shared = [layer for layer in left.layers if layer in right.layers and _fits(left.layers[layer], right.layers[layer])]
    product = sum(algebra.inner(left.layers[layer], right.layers[layer]) for layer in shared)
    size = _norm(left) * _norm(right)
    return (product / size if size else 0.0), len(shared)


def _norm(adapter: Adapter) -> float:
    return math.hypot(*(algebra.norm(factors) for factors in adapter.layers.values()))


def _fits(left: Factors, right: Factors) -> bool:
    # adapters of other base models may use the same module paths with other sizes
    return left.a_RI.shape[1] == right.a_RI.shape[1] and left.b_OR.shape[0] == right.b_OR.shape[0]


def shared_invocation(parents: Sequence[Adapter]) -> tuple[int, ...]:
    """Return the invocation tokens that all parents share. Raises CompositionError if the parents differ in them."""
    first = parents[0]
    for other in parents[1:]:
        if other.invocation != first.invocation:
            said = [
                f"from {list(adapter.invocation)} on" if adapter.invocation else "on every token"
                for adapter in (first, other)
            ]
            raise CompositionError(
                f"cannot merge adapter {first.name!r}, which acts {said[0]}, and {other.name!r}, which acts {said[1]}: "
                "one adapter cannot do both; activate() them together, or merge those with the same invocation tokens"
            )
    return first.invocation


def parent_of(adapter: Adapter) -> dict[str, Any]:
    """Return the entry of a merge's recipe for one parent, without its weight: hash, name, license, and files if any."""
    files = {"files": list(adapter.files)} if adapter.files else {}
    license = stated_license(adapter.card["license"]) if "license" in adapter.card else None
    return {"hash": adapter.hash, "name": adapter.name, "license": license or "unknown", **files}
