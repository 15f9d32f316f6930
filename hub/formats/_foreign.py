"""What the formats of PEFT's other adapter types share: their config, their tensors by layer and part, and the conversion.

A format states the names of its tensors and config fields and gives one formula, `update`, for one layer. Everything here
is as strict as the reader of LoRA folders: safetensors only, sizes checked first, unknown names and fields refused.

Why formulas and not the installed PEFT's merge, against which the tests hold them: a formula gives exact factors where a
type has them, reads without a model where the file is enough, and checks the tensors' sizes before it makes anything. PEFT
makes its layers from the config, whose sizes a hostile file chooses, and BOFT compiles an extension where there is a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from loraweave.common.process import free_host_bytes
from loraweave.errors import AdapterCorrupt, AdapterUnsupported, BaseModelMismatch, LayerMismatch
from loraweave.hub.base import fingerprint
from loraweave.hub.formats._base_layer import BaseLayer, base_layer
from loraweave.hub.formats._card import base_model_of_readme, read_card
from loraweave.hub.formats._config import Config, config_fields, shorten
from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats._conversion import MAX_ERROR, Bound, Dense, cut
from loraweave.hub.formats._peft_config import stored_tensors
from loraweave.hub.formats._peft_heads import TASK_HEADS, check_heads, take_heads
from loraweave.hub.formats._safetensors import gather, require_finite
from loraweave.lowrank import algebra
from loraweave.types import Factors, Fingerprint

ROOT = "base_model."
MAX_VALUES = 2**31

# fields of every type that say where or how training happened, or that the common reader handles
COMMON = frozenset(
    {
        "peft_type",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "init_weights",
        "bias",
        "fan_in_fan_out",
    }
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a stored adapter: its tensors, those of the whole file, the config, and the base's layer if known.

    `position` counts the adapted layers in the order of the base model's modules; None where no model was given.
    """

    name: str
    where: str
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    config: Config
    known_base: BaseLayer | None
    position: int | None
    num_layers: int

    def has(self, name: str) -> bool:
        return name in self.tensors

    def part(self, name: str, *sizes: int | None) -> Tensor:
        """A tensor of this layer in float64 (int64 for places), after checking its sizes; None stands for any."""
        return self._check(self.tensors, name, sizes)

    def common(self, name: str, *sizes: int | None) -> Tensor:
        """A tensor that all layers share."""
        return self._check(self.shared, name, sizes)

    @property
    def base(self) -> BaseLayer:
        """The base's layer. Raises AdapterUnsupported naming model= where none was given."""
        if self.known_base is None:
            raise AdapterUnsupported(
                f"{self.where}: the file alone does not determine the update, which depends on the base layer; give the "
                "base model: Adapter.from_pretrained(..., model=model)"
            )
        return self.known_base

    def places(self, name: str, *sizes: int | None, below: int) -> Tensor:
        """A tensor of places, each from 0 to `below` - 1."""
        stored = self.part(name, *sizes)
        whole = stored.long()
        if bool((whole != stored).any()) or (whole.numel() and not 0 <= int(whole.min()) <= int(whole.max()) < below):
            raise AdapterCorrupt(f"{self.where}: {name!r} has places outside 0 to {below - 1}")
        return whole

    def _check(self, held: Mapping[str, Tensor], name: str, sizes: tuple[int | None, ...]) -> Tensor:
        if name not in held:
            raise AdapterCorrupt(f"{self.where} lacks the tensor {name!r}; it has {', '.join(sorted(self.tensors))}")
        tensor = held[name]
        fits = len(sizes) == tensor.dim() and all(size in (None, own) for size, own in zip(sizes, tensor.shape, strict=True))
        if sizes and not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            raise AdapterCorrupt(f"{self.where}: {name!r} has shape {tuple(tensor.shape)}, not ({wanted})")
        return tensor.double() if tensor.is_floating_point() else tensor


class ForeignFormat(ABC):
    """A format of one peft_type that is not LoRA. It is read only: what has been read is written as an ordinary LoRA."""

    peft_type: ClassVar[str]
    # names below a layer's path, and below the adapter itself
    parts: ClassVar[frozenset[str]]
    shared: ClassVar[frozenset[str]] = frozenset()
    # config fields that `update` reads, those that do not change what the tensors mean, and what has no form as factors
    handled: ClassVar[frozenset[str]] = frozenset()
    benign: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, str]] = {}
    # the formula holds for linear layers alone
    linear_only: ClassVar[bool] = False

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether the folder is of this type by its config; says nothing about the rest of its state."""
        return cls.claims(folder, config_fields(folder))

    @classmethod
    def claims(cls, folder: Path, fields: Mapping[str, Any]) -> bool:
        """`recognises` for a folder whose config has been read."""
        return fields.get("peft_type") == cls.peft_type

    @classmethod
    def read(
        cls,
        folder: Path,
        *,
        model: nn.Module | None = None,
        rank: int | None = None,
        max_error: float = MAX_ERROR,
        allow_pickle: bool = False,
    ) -> Contents:
        """The adapter as factors of a plain LoRA. `card["conversion"]` has rank and relative error of every layer.

        `model` is the base model, for types whose file does not determine the update. Updates that are not of low rank are
        cut to the smallest rank within `max_error` (Frobenius norm, relative to the layer's update) and at most `rank`.
        Raises AdapterUnsupported where the two contradict, and for features without a form as factors; AdapterCorrupt for
        damaged files; LayerMismatch and BaseModelMismatch for another model. A .bin is read with `allow_pickle` alone.
        """
        folder, bound = Path(folder), Bound(rank, max_error)
        config = cls._config(folder)
        card, stored_print, _ = read_card(folder)
        tensors, dtypes = gather(stored_tensors(folder, allow_pickle=allow_pickle, integers=True), folder)
        for key, tensor in tensors.items():
            require_finite(tensor, str(folder), repr(key))
        heads = _heads(tensors, config)
        layers = list(cls._layers(tensors, config, model))
        own_print = _same_base(stored_print, model, folder)
        factors: dict[str, Factors] = {}
        notes: dict[str, Any] = {}
        for layer in layers:
            factors[layer.name], notes[layer.name] = _convert_in_memory(cls, layer, bound)
        if not heads and all(algebra.is_zero(part) for part in factors.values()):
            raise AdapterUnsupported(f"{folder}: the adapter is without effect: every update is zero")
        card |= {"converted_from": cls.peft_type, "conversion": notes, "stored_dtype": dtypes}
        base_model = config.text("base_model_name_or_path") or base_model_of_readme(folder)
        return Contents(base_model, factors, own_print, card, heads)

    @classmethod
    @abstractmethod
    def update(cls, layer: Layer) -> Factors | Dense:
        """The update of one layer by the type's formula."""

    @classmethod
    def _own_config(cls, folder: Path) -> Config:
        config = Config.of(folder)
        if (kind := config.fields.get("peft_type")) != cls.peft_type:
            raise AdapterUnsupported(f"{folder}: peft_type is {shorten(kind)}, not {cls.peft_type!r}")
        return config

    @classmethod
    def _config(cls, folder: Path) -> Config:
        config = cls._own_config(folder)
        fields = config.fields
        config.check_fields(COMMON | cls.handled | cls.benign, cls.refused)
        if fields.get("bias", "none") != "none":
            raise AdapterUnsupported(
                f"{folder}: bias={shorten(fields['bias'])}: trained biases are read of LoRA adapters only"
            )
        return config

    @classmethod
    def _layers(cls, tensors: Mapping[str, Tensor], config: Config, model: nn.Module | None) -> Iterable[Layer]:
        held: dict[str, dict[str, Tensor]] = defaultdict(dict)
        shared: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            layer, part = cls._place(key, config.folder)
            target = shared if layer is None else held[layer]
            if part in target:
                raise AdapterCorrupt(f"{config.folder}: several tensors are {part!r} of layer {layer!r}, one is {key!r}")
            target[part] = tensor
        if not held:
            cls._refuse_without_layers(config)
        modules = None if model is None else dict(model.named_modules())
        places = {} if modules is None else {name: place for place, name in enumerate(modules)}
        known = {} if modules is None else {name: base_layer(modules, name, str(config.folder)) for name in held}
        order = sorted(held, key=lambda name: places[name]) if places else sorted(held)
        for number, name in enumerate(order):
            yield Layer(
                name,
                f"{config.folder}: layer {name!r}",
                held[name],
                shared,
                config,
                known.get(name),
                number if places else None,
                len(held),
            )

    @classmethod
    def _refuse_without_layers(cls, config: Config) -> NoReturn:
        raise AdapterCorrupt(f"{config.folder}: the file holds no layer of a {cls.peft_type} adapter")

    @classmethod
    def _place(cls, key: str, folder: Path) -> tuple[str | None, str]:
        """(layer or None, part) of a tensor name."""
        path = key.removeprefix(ROOT)
        for name in cls.shared:
            if path == name or (name.endswith(".") and path.startswith(name)):
                return None, path
        path = path.removeprefix("model.") if key.startswith(ROOT) else path
        pieces = path.split(".")
        for depth in range(1, min(len(pieces), 5)):
            part = ".".join(pieces[-depth:])
            if part in cls.parts and all(pieces[:-depth]):
                return ".".join(pieces[:-depth]), part
        raise AdapterCorrupt(
            f"{folder}: tensor {key!r} does not belong to a {cls.peft_type} adapter, whose layers have "
            f"{', '.join(sorted(cls.parts)[:12])}"
        )


def check_size(layer: Layer, rows: int, columns: int) -> None:
    """Raises AdapterUnsupported for a matrix beyond this machine, or any, which a small file can ask for."""
    free = free_host_bytes()
    # in float64, and as the factors or the error that are computed of it
    if free is not None and 16 * rows * columns > free:
        raise AdapterUnsupported(
            f"{layer.where}: the update would need a matrix of {rows} x {columns}, and more memory than the {free:,} free "
            "bytes; convert it on a larger machine"
        )
    if rows * columns > MAX_VALUES:
        raise AdapterUnsupported(
            f"{layer.where}: the update would need a matrix of {rows} x {columns}, above the limit of {MAX_VALUES} values"
        )


def _convert_in_memory(layout: type[ForeignFormat], layer: Layer, bound: Bound) -> tuple[Factors, dict[str, Any]]:
    """`_convert`, where a small file that stands for a matrix too large for this machine is a named error."""
    if layout.linear_only and layer.base.kind != "linear":
        raise AdapterUnsupported(f"{layer.where} is a {type(layer.base.module).__name__}; only linear layers can be read")
    try:
        return _convert(layer, layout.update(layer), bound)
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for this
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise AdapterUnsupported(
            f"{layer.where}: its {layout.peft_type} form stands for a matrix that needs more memory than there is; "
            "convert it on a larger machine"
        ) from error


def _convert(layer: Layer, update: Factors | Dense, bound: Bound) -> tuple[Factors, dict[str, Any]]:
    base = layer.known_base
    shape = update.delta_OI.shape if isinstance(update, Dense) else (update.b_OR.shape[0], update.a_RI.shape[1])
    if base is not None and tuple(shape) != (base.num_outputs, base.num_inputs):
        raise LayerMismatch(
            f"{layer.where}: the update has shape (O, I) = {tuple(shape)}, but the model's {type(base.module).__name__} has "
            f"{(base.num_outputs, base.num_inputs)}"
        )
    kind, kernel = ("linear", ()) if base is None else (base.kind, base.kernel)
    if isinstance(update, Factors):
        update = replace(update, kind=kind, kernel=kernel)
    return cut(update, bound, layer.where, kind=kind, kernel=kernel)


def _heads(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The heads (modules_to_save), taken out of `tensors`."""
    listed = config.names("modules_to_save")
    task = config.text("task_type")
    found = take_heads(tensors, (*listed, *TASK_HEADS.get(task, ())), "none", config.folder)
    heads = {parameter: tensor.float() for parameter, tensor in found.items()}
    check_heads(heads, listed, task, config.folder)
    return heads


def _same_base(stored: Fingerprint | None, model: nn.Module | None, folder: Path) -> Fingerprint | None:
    """The fingerprint of the model given. Raises BaseModelMismatch where the folder recorded another one."""
    if model is None:
        return stored
    own = fingerprint(model)
    if stored is not None and (why := stored.differs(own)):
        raise BaseModelMismatch(f"{folder}: the adapter was made for another base model than the one given: {why}")
    return own
