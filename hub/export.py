"""Giving an adapter away: a plain PEFT folder for peft itself, or one that also keeps the rules of vLLM's loader.

vLLM (its PEFTHelper, LoRAConfig and LoRAModel, as of 2025 and 2026) takes one `r` and one `lora_alpha` for all layers,
since most releases pass over rank_pattern and alpha_pattern without a word; an `r` up to `--max-lora-rank`, which must be
one of a few sizes; no DoRA, no bias, no whole modules; and tensors called lora_A and lora_B of layers that it has under
that name.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loraweave.errors import AdapterUnsupported, UnknownName, WeightingError
from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats.peft import Peft
from loraweave.hub.licenses import stated_license
from loraweave.lowrank import algebra
from loraweave.registry import nearest
from loraweave.types import Factors

TARGETS = ("peft", "vllm")
# those that every release of vLLM takes for --max-lora-rank; recent ones also have 1
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# layers that vLLM computes as one; its loader packs the factors of the parts itself
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# modules whose weights many base models share with each other
TIED = {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "lm_head", "embed_out"}


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    `rank` is the largest of any layer in the folder (that of every layer for vLLM). `errors` has each layer's relative
    Frobenius error by the cut of its rank, 0 where nothing was cut, and `relative_error` that of the whole update.
    `flags` are the arguments that `vllm serve BASE` needs, `modules` the layer names that it must know. `license` is what
    the card says, of a merge that of all its parents; None where it is not known.
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

    @property
    def command(self) -> str:
        """The server's command line for a shell; empty if the target is not a server."""
        return shlex.join(["vllm", "serve", self.base_model, *self.flags]) if self.flags else ""

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


def require_target(target: str) -> None:
    """Raises UnknownName for anything but a target of an export."""
    if target not in TARGETS:
        hint = nearest(target, TARGETS)
        raise UnknownName(f"no export target {target!r}{hint}; there are {', '.join(TARGETS)}")


def export(contents: Contents, name: str, folder: Path, *, target: str, max_rank: int | None) -> ExportReport:
    """Writes the folder and reports what that took; `name` is the adapter's name in requests to a server.

    Layers above `max_rank` are cut to it, the best approximation in the Frobenius norm; nothing is cut without it.
    Raises UnknownName for a target, WeightingError for a rank below 1, and AdapterUnsupported for what the target cannot
    express; nothing is written then.
    """
    require_target(target)
    if max_rank is not None and max_rank < 1:
        raise WeightingError(f"max_rank={max_rank} is below 1; leave it out to keep the exact rank")
    layers = dict(contents.layers)
    if target == "vllm":
        _check_for_vllm(contents, name)
        layers = {layer: replace(factors, bias_O=None) for layer, factors in layers.items() if factors.rank}
    cut = {layer: _cut_rank(f"layer {layer!r} of adapter {name!r}", factors, max_rank) for layer, factors in layers.items()}
    errors = {layer: error for layer, (_, error) in cut.items()}
    total = _total_error(layers, errors)
    rank = max((factors.rank for factors, _ in cut.values()), default=0)
    written = {layer: factors for layer, (factors, _) in cut.items()}
    if target == "vllm":
        if rank > VLLM_RANKS[-1]:
            raise AdapterUnsupported(
                f"adapter {name!r} has rank {rank}, but vLLM takes at most {VLLM_RANKS[-1]}: pass max_rank={VLLM_RANKS[-1]} "
                f"or less (one of {', '.join(map(str, VLLM_RANKS))}) to cut it; the report shows the error"
            )
        written = {layer: _pad(factors, rank) for layer, factors in written.items()}
    card = {**contents.card, "export": {"target": target, "rank": rank, "relative_error": total}}
    Peft.write(replace(contents, layers=written, card=card), folder)
    modules = tuple(sorted({layer.rpartition(".")[2] for layer in written}))
    return ExportReport(
        folder,
        target,
        contents.base_model,
        rank,
        errors,
        total,
        modules,
        _flags(name, folder, contents.base_model, rank) if target == "vllm" else (),
        tuple(_notes(contents, modules, rank, target)),
        stated_license(contents.card.get("license")),
    )


def _check_for_vllm(contents: Contents, name: str) -> None:
    if contents.heads:
        raise AdapterUnsupported(
            f"vLLM loads no trained heads, but adapter {name!r} has {', '.join(sorted(contents.heads))}: merge it into the "
            "base with peft and serve that model, or export dataclasses.replace(adapter, heads={}) without them"
        )
    for layer, factors in contents.layers.items():
        where = f"layer {layer!r} of adapter {name!r}"
        if factors.magnitude_O is not None or factors.gain_O is not None:
            what = "is DoRA" if factors.magnitude_O is not None else "has a gain (bound DoRA, or (IA)3)"
            raise AdapterUnsupported(
                f"{where} {what}, which vLLM does not load: lw.to_lora(adapter, model) gives a plain LoRA of it"
            )
        if factors.base_bias_O is not None or (factors.bias_O is not None and bool(factors.bias_O.any())):
            raise AdapterUnsupported(
                f"{where} has a trained bias, which vLLM does not load: merge the adapter into the base with peft and "
                "serve that model, or leave the biases out of its layers with dataclasses.replace"
            )
        if factors.kind == "conv":
            raise AdapterUnsupported(
                f"{where} is a convolution, which vLLM has no LoRA for: merge the adapter into the base with peft and serve "
                "that model"
            )
    if not contents.base_model:
        raise AdapterUnsupported(
            f"adapter {name!r} names no base model, by which vLLM's resolvers find it: "
            "give it one with dataclasses.replace(adapter, base_model=...)"
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
    """Rank rows of zeros added: the same update, to the bit."""
    missing = rank - factors.rank
    a_RI, b_OR = factors.a_RI, factors.b_OR
    return replace(
        factors,
        a_RI=torch.cat([a_RI, a_RI.new_zeros(missing, a_RI.shape[1])]),
        b_OR=torch.cat([b_OR, b_OR.new_zeros(b_OR.shape[0], missing)], dim=1),
    )


def _flags(name: str, folder: Path, base_model: str, rank: int) -> tuple[str, ...]:
    limit = next(size for size in VLLM_RANKS if size >= rank)
    path = str(folder.absolute())
    called = name or folder.absolute().name
    module = f"{called}={path}"
    # vLLM reads name=path only where neither has one of these
    if any(mark in called + path for mark in "=,{"):
        module = json.dumps({"name": called, "path": path, "base_model_name": base_model})
    # one adapter and a free slot
    return ("--enable-lora", "--max-lora-rank", str(limit), "--max-loras", "2", "--lora-modules", module)


def _notes(contents: Contents, modules: Iterable[str], rank: int, target: str) -> list[str]:
    beside = [f"kept beside the adapter: {', '.join(contents.files)}"] if contents.files else []
    if target == "vllm" and "value_head.safetensors" in contents.files:
        beside.append("vLLM does not load value_head.safetensors")
    present = set(modules)
    tied = sorted(present & TIED)
    if target == "peft":
        heads = [
            f"the trained head {head!r} is a copy of its own: on a base that ties its embeddings peft computes with it "
            "alone, but merging it into the base and saving that loses the head or the tie"
            for head in sorted(contents.heads)
            if set(head.split(".")) & TIED
        ]
        both = "on a base that ties its embeddings, merging it into the base changes both sides"
        return [*beside, *heads, *(f"{module!r} has an update: {both}" for module in tied)]
    only = (
        "vLLM loads it only for architectures that list it among their embedding_modules, and refuses the adapter for others"
    )
    notes = [*beside, *(f"{module!r} has an update: {only}" for module in tied)]
    for packed, parts in PACKED.items():
        if own := sorted(present & set(parts)):
            notes.append(
                f"vLLM computes {', '.join(parts)} as one {packed}; it packs the factors of {', '.join(own)} by itself"
            )
    notes.append(
        "--max-loras is the number of adapters and one more: with every slot taken, vLLM 0.32 on CPU answers requests for "
        "the base with an adapter when both share a batch (its pull requests 48421 and 49656); each adapter added takes one "
        "slot more"
    )
    if rank not in VLLM_RANKS:
        limit = next(size for size in VLLM_RANKS if size >= rank)
        notes.append(f"vLLM reserves rank {limit} for this rank {rank}, since --max-lora-rank has only certain sizes")
    return notes
