"""LoRA files without a config: the tensors' names tell their roles, and the scale is stored beside them."""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors
from loraweave.extend import algebra, fingerprint
from loraweave.extend.formats import (
    FLOATS,
    AdapterConfig,
    Bound,
    Contents,
    Dense,
    base_model_of_readme,
    cut_update,
    file_metadata,
    lora_factors,
    lora_files,
    names_in,
    read_card,
    read_tensors,
    words,
)
from loraweave.extend.models import BaseLayer
from loraweave.extensions.adapter_types.formats._foreign import ForeignFormat, Reader, StoredLayer, plain_factors
from loraweave.extensions.adapter_types.formats._placing import GIVE_MODEL, BaseNames, Placement, divide
from loraweave.extensions.adapter_types.formats.loha import loha
from loraweave.extensions.adapter_types.formats.lokr import lokr
from loraweave.extensions.adapter_types.pickles import is_pickle, read_pickle

MAX_NOTES = 40
MAX_NOTE_TEXT = 400
# a small file could ask for a huge matrix by a wide kernel
MAX_KERNEL = 16

# the tensors of one update, and those among them whose first size is its rank
MATRICES = words(
    "down up mid hada_w1_b hada_w1_a hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1_b lokr_w2_b lokr_w1 lokr_w1_a lokr_w2 "
    "lokr_w2_a lokr_t2"
)
RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")

Parts = Mapping[str, Tensor]
Held = dict[str, dict[str, Tensor]]
# LyCORIS' other forms, by the beginning of their tensors' names
FORMS: dict[str, type[ForeignFormat]] = {"hada_": loha, "lokr_": lokr}


class LoraFile(Reader):
    """A layout of one file of factors and scales, alone or in a folder, that is recognised by its tensors' names."""

    # the names of one layer's factors in such a file
    example: ClassVar[tuple[str, str]]
    # the names that its program gives such files (for downloads) and pickles (which a folder may have under these alone)
    files: ClassVar[tuple[str, ...]] = ()
    pickles: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def knows(cls, names: Collection[str]) -> bool:
        """Return True if these tensor names are of this layout; the tensors themselves are not checked."""

    @classmethod
    @abstractmethod
    def split(cls, name: str) -> tuple[str, str] | None:
        """Return (module as the file names it, one of MATRICES or "alpha") for a tensor's name; None in another layout."""

    @classmethod
    @abstractmethod
    def place(cls, module: str, base: BaseNames | None, where: str) -> Placement:
        """Return the paths in the base of the file's module. Raises AdapterUnsupported if only a guess could tell.

        `base` has the model's names, if one was given; `where` begins the error's text.
        """

    @classmethod
    def scales(cls, held: Mapping[str, Parts], metadata: Mapping[str, str], where: str) -> dict[str, float]:
        """Return {module: alpha / r}; 1 without alpha in the file, as in every program that reads such files.

        `held` is {module: {part: tensor}}, `metadata` the file's.
        """
        return {module: _alpha(parts, where, module) for module, parts in held.items()}

    @classmethod
    def base_id(cls, source: Path) -> str:
        """Return the base model's id from a folder's README; "" for a lone file, whose neighbours say nothing about it."""
        return base_model_of_readme(source) if source.is_dir() else ""

    @classmethod
    def recognises(cls, source: Path, *, allow_pickle: bool = False) -> bool:
        """Return True if `source` is, or contains, a file of this layout; pickles are looked at with `allow_pickle` only."""
        return bool(cls._files(source, allow_pickle))

    @classmethod
    def _read(cls, source: Path, bound: Bound, model: nn.Module | None, allow_pickle: bool) -> Contents:
        """Return the file's update of every module, under the paths of the base's modules.

        With `model`, its module names decide what the file's names mean. Raises AdapterUnsupported for names that only a
        guess could map, and for several such files in one folder.
        """
        path = cls._file(source, allow_pickle)
        metadata = {} if is_pickle(path.name) else file_metadata(path.parent, path.name)
        held, dtypes = cls._held(path.parent, path.name)
        where, scales = str(path), cls.scales(held, metadata, str(path))
        base = None if model is None else BaseNames(model)
        layers: dict[str, Factors] = {}
        notes: dict[str, Any] = {}
        for module in list(held):
            # popped one by one, so that the memory of each is freed: the factors are copies
            parts = held.pop(module)
            placement = cls.place(module, base, where)
            whole, note = _factors(module, parts, scales[module], placement, bound, base, where)
            for target, factors in zip(placement.targets, divide(whole, placement, module, where), strict=True):
                layer = target if base is None else base.path(target, where)
                if layer in layers:
                    raise AdapterCorrupt(f"{where}: several modules are layer {layer!r}, one is {module!r}")
                layers[layer] = factors if base is None else base.fitted(layer, factors, where)
                notes |= {layer: note} if note else {}
        # a lone file's neighbours say nothing about it
        card = read_card(source)[0] if source.is_dir() else {}
        texts = {key: text for key, text in sorted(metadata.items()) if len(text) <= MAX_NOTE_TEXT}
        card |= {"file_metadata": dict(list(texts.items())[:MAX_NOTES])} if texts else {}
        card["stored_dtype"] = "+".join(sorted(dtypes))
        card |= {"conversion": notes} if notes else {}
        return Contents(cls.base_id(source), layers, None if model is None else fingerprint(model), card)

    @classmethod
    def _files(cls, source: Path, allow_pickle: bool = False) -> list[str]:
        names = []
        for folder, name in lora_files(source):
            with suppress(AdapterCorrupt, AdapterUnsupported):
                if (allow_pickle or not is_pickle(name)) and cls.knows(names_in(folder, name)):
                    names.append(name)
        return names

    @classmethod
    def _file(cls, source: Path, allow_pickle: bool) -> Path:
        if source.is_file():
            if is_pickle(source.name) and not allow_pickle:
                raise AdapterUnsupported(f"{source} is a pickle, which can run code when it is read: allow_pickle=True")
            return source
        names = cls._files(source, allow_pickle)
        if len(names) > 1:
            raise AdapterUnsupported(
                f"{source}: {len(names)} files in it are adapters: {', '.join(names[:12])}; give the path of one, for "
                f"instance {str(source / names[0])!r}"
            )
        if not names:
            held = ", ".join(sorted(path.name for path in source.iterdir())[:12]) or "nothing"
            raise AdapterUnsupported(f"{source}: no LoRA file of {cls.__name__}'s layout; the folder holds {held}")
        return source / names[0]

    @classmethod
    def _held(cls, folder: Path, name: str) -> tuple[Held, set[str]]:
        """Return {module: {part: tensor}} of the file, and the names of the dtypes that its factors are stored in."""
        where = str(folder / name)
        held: Held = defaultdict(dict)
        dtypes: set[str] = set()
        stored = read_pickle(folder, name, integers=True) if is_pickle(name) else read_tensors(folder, [name], integers=True)
        for key, dtype, tensor in stored:
            place = cls.split(key)
            if place is None:
                raise AdapterUnsupported(f"{where}: tensor {key!r} is not part of {cls.__name__}'s layout")
            module, part = place
            if part in held[module]:
                raise AdapterCorrupt(f"{where}: several tensors are {part!r} of module {module!r}, one is {key!r}")
            if not tensor.numel() or not algebra.all_finite(tensor):
                raise AdapterCorrupt(f"{where}: {key!r} of shape {tuple(tensor.shape)} is empty, or has NaN or infinity")
            held[module][part] = tensor
            if dtype in FLOATS and part != "alpha":
                dtypes.add(str(FLOATS[dtype]).removeprefix("torch."))
        if not held:
            raise AdapterCorrupt(f"{where}: the file holds no tensors")
        return held, dtypes


def _alpha(parts: Parts, where: str, module: str) -> float:
    if "alpha" not in parts:
        return 1.0
    alpha = parts["alpha"]
    value = float(alpha.reshape(-1)[0]) if alpha.numel() == 1 else math.nan
    if not math.isfinite(value):
        raise AdapterCorrupt(f"{where}: alpha of {module!r} has shape {tuple(alpha.shape)}, not one number")
    # a Kronecker product of two whole matrices has no rank to divide by, and its trainer takes no scale there
    rank = rank_of(parts)
    return value / rank if rank else 1.0


def _factors(
    module: str, parts: Parts, scale: float, placement: Placement, bound: Bound, base: BaseNames | None, where: str
) -> tuple[Factors, dict[str, Any]]:
    """Return a module's update as factors, and a note for the card if it was cut or converted, else {}.

    `parts` are its tensors, `placement` its paths in the base.
    """
    known = None
    if base is not None and len(placement.targets) == 1:
        known = base.layers[base.path(placement.targets[0], where)]
    here = f"{where}: module {module!r}"
    matrices = {name: part for name, part in parts.items() if name != "alpha"}
    update = update_of(matrices, scale, placement.targets[0], known, here)
    if isinstance(update, Factors) and "down" in parts and (bound.rank is None or update.rank <= bound.rank):
        return update, {}
    return cut_update(update, bound, here, known)


def rank_of(parts: Parts) -> int | None:
    """Return the rank of an update by its tensors, or None if all are full matrices (in a Kronecker product)."""
    ranked = (parts[name] for name in RANKED if name in parts)
    # `update_of` refuses a single number, which is not a matrix
    return next((matrix.shape[0] for matrix in ranked if matrix.dim()), None)


def update_of(parts: Parts, scale: float, layer: str, base: BaseLayer | None, where: str) -> Factors | Dense:
    """Return the update of a layer, times `scale`, from its tensors `parts`, named as in MATRICES.

    `base` is the model's layer, if known. Raises AdapterCorrupt, with `where` first in its text, if they form no update.
    """
    if {"down", "up"} <= set(parts) <= {"down", "up", "mid"}:
        return _lora(parts, scale, where)
    for prefix, layout in FORMS.items():
        if parts and all(name.startswith(prefix) for name in parts):
            _require_linear(layer, base, where)
            rank = rank_of(parts) or 1
            config = AdapterConfig(Path(where), {"alpha": scale * rank, "r": rank})
            return layout.update(StoredLayer(layer, where, parts, {}, config, base, None, 1))
    raise AdapterCorrupt(f"{where} has {', '.join(sorted(parts)) or 'no matrices'}, which are not the parts of one update")


def _lora(parts: Parts, scale: float, where: str) -> Factors:
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        mid = parts["mid"]
        if down.dim() != 4 or mid.dim() != 4 or max(down.shape[2:]) > 1 or mid.shape[1] != down.shape[0]:
            raise AdapterCorrupt(
                f"{where}: lora_down has shape {tuple(down.shape)} and lora_mid {tuple(mid.shape)}, which are not the first "
                "two of three convolutions in a row"
            )
        if max(mid.shape[2:]) > MAX_KERNEL:
            raise AdapterUnsupported(f"{where}: a kernel of {tuple(mid.shape[2:])}, above the limit of {MAX_KERNEL}")
        # a convolution of width 1 before another is one convolution
        down = torch.einsum("srkl,ri->sikl", mid.double(), down[:, :, 0, 0].double())
    factors = lora_factors(down, up, False, where)
    return plain_factors(factors.a_RI, factors.b_OR.double() * scale, kind=factors.kind, kernel=factors.kernel)


def _require_linear(layer: str, base: BaseLayer | None, where: str) -> None:
    last = layer.rsplit(".", 1)[-1]
    if base is None and layer.startswith("unet.") and (last.startswith("conv") or last in ("proj_in", "proj_out")):
        raise AdapterUnsupported(
            f"{where}: LoHa and LoKr do not say whether {layer!r} is a convolution, nor of which kernel; {GIVE_MODEL}"
        )
