"""The base classes of formats that are only read: `Reader`, `ForeignFormat` for PEFT's types, `LoraVariant`.

A format states the names of its tensors and config fields and gives one formula, `update`, for one layer. Everything here is
as strict as the reader of LoRA folders: safetensors only, sizes checked first, unknown names and fields refused.

These are formulas and not the installed PEFT's merge, with which the tests compare them: a formula gives exact factors where
a type has them, reads without a model if the file is enough, and checks the tensors' sizes before it makes anything. PEFT
makes its layers from the config, whose sizes a hostile file chooses, and BOFT compiles an extension if there is a GPU.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from loraweave import AdapterCorrupt, AdapterUnsupported, BaseModelMismatch, Factors
from loraweave.extend import fingerprint, free_host_bytes
from loraweave.extend.formats import (
    FLOATS,
    AdapterConfig,
    Bound,
    Contents,
    Dense,
    base_model_of_readme,
    config_fields,
    cut_update,
    parse_lora,
    read_card,
    require_finite,
    stored_tensors,
    words,
)
from loraweave.extend.models import BaseLayer, base_layer
from loraweave.extensions.adapter_types.formats._placing import GIVE_MODEL
from loraweave.extensions.adapter_types.peft_heads import take_heads

ROOT = "base_model."
MAX_VALUES = 2**31

# fields of every type that describe the training, or that the common reader handles
COMMON = words(
    "peft_type base_model_name_or_path revision task_type auto_mapping peft_version inference_mode target_modules "
    "exclude_modules layers_to_transform layers_pattern modules_to_save init_weights bias fan_in_fan_out"
)


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """One layer of a stored adapter: its `tensors`, those `shared` by all layers, the config, and the base's layer if known.

    `where` begins error messages. `position` is the layer's index, of `num_layers`, in the order of the base model's
    modules; None if no model was given.
    """

    name: str
    where: str
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    config: AdapterConfig
    known_base: BaseLayer | None
    position: int | None
    num_layers: int

    def has(self, name: str) -> bool:
        return name in self.tensors

    def part(self, name: str, *sizes: int | None, empty: bool = False) -> Tensor:
        """Return the tensor `name` of this layer, or of all layers, in float64, or int64 if it has whole numbers.

        Raises AdapterCorrupt if it is missing or its shape is not `sizes`; None is any size above 0 (or 0 with `empty`).
        """
        tensor = self.shared.get(name, self.tensors.get(name))
        if tensor is None:
            raise AdapterCorrupt(f"{self.where} lacks the tensor {name!r}; it has {', '.join(sorted(self.tensors))}")
        shape = tuple(tensor.shape)
        fits = len(sizes) == len(shape) and all(
            length == size if size is not None else length > 0 or empty for size, length in zip(sizes, shape, strict=True)
        )
        if sizes and not fits:
            wanted = ", ".join("1 or more" if size is None else str(size) for size in sizes)
            raise AdapterCorrupt(f"{self.where}: {name!r} has shape {shape}, not ({wanted})")
        return tensor.double() if tensor.is_floating_point() else tensor

    def pair(self, name_a: str, name_b: str, *, empty: bool = False) -> tuple[Tensor, Tensor]:
        """Return the factors a (R, I) and b (O, R) of these names, whose R must agree and may be 0 only with `empty`."""
        a_RI = self.part(name_a, None, None, empty=empty)
        return a_RI, self.part(name_b, None, a_RI.shape[0])

    def choice(self, name: str, options: Iterable[Any], default: Any) -> Any:
        """Return the config's field `name`, or `default`. Raises AdapterUnsupported if its value is not in `options`."""
        value, known = self.config.fields.get(name, default), list(options)
        if not any(type(value) is type(option) and value == option for option in known):
            raise AdapterUnsupported(
                f"{self.config.folder}: {name} is {value!r:.80}; known are {', '.join(map(repr, known))}"
            )
        return value

    @property
    def base(self) -> BaseLayer:
        """The base model's layer. Raises AdapterUnsupported, asking for model=, if no model was given."""
        if self.known_base is None:
            raise AdapterUnsupported(
                f"{self.where}: the file alone does not determine the update, which depends on the base layer; {GIVE_MODEL}"
            )
        return self.known_base

    def require_shared(self, *names: str) -> None:
        """Raise AdapterUnsupported if the file has only the seed of one of these shared random matrices."""
        missing = [name for name in names if name not in self.shared]
        if missing:
            raise AdapterUnsupported(
                f"{self.config.folder}: the shared random matrix {missing[0]!r} is not in the file, only the seed it was "
                "drawn with, which gives other numbers in another version of torch; save the adapter with "
                "save_projection=True"
            )

    def places(self, name: str, *sizes: int | None, below: int) -> Tensor:
        """Return a tensor of indices, int64, of shape `sizes`. Raises AdapterCorrupt for one outside 0 to `below` - 1."""
        stored = self.part(name, *sizes)
        whole = stored.long()
        if bool((whole != stored).any()) or (whole.numel() and not 0 <= int(whole.min()) <= int(whole.max()) < below):
            raise AdapterCorrupt(f"{self.where}: {name!r} has places outside 0 to {below - 1}")
        return whole


class Reader(ABC):
    """A format that is only read: an adapter read from it is written as an ordinary LoRA."""

    @classmethod
    def read(
        cls,
        source: Path,
        *,
        model: nn.Module | None = None,
        rank: int | None = None,
        max_error: float | None = Bound.max_error,
        allow_pickle: bool = False,
    ) -> Contents:
        """Return the adapter in a folder or file as a plain LoRA.

        `card["conversion"]` has rank and relative error of every converted layer. `model` is the base model: its names and
        sizes are checked, and types whose file does not determine the update need it. Updates that are not of low rank are
        cut to the smallest rank within `max_error` (Frobenius norm, relative to the layer's update), at most `rank`. Pickles
        are read only with `allow_pickle`. Raises AdapterUnsupported if `rank` leaves a larger error, for what factors cannot
        express, and for an adapter without effect; AdapterCorrupt for damaged files; LayerMismatch and BaseModelMismatch for
        another model.
        """
        contents = cls._read(Path(source), Bound(rank, max_error), model, allow_pickle)
        contents.require_effect(str(source))
        return contents

    @classmethod
    @abstractmethod
    def _read(cls, source: Path, bound: Bound, model: nn.Module | None, allow_pickle: bool) -> Contents:
        """Return the adapter in a folder or file; arguments are those of `read`, `bound` its `rank` and `max_error`."""


class PeftReader(Reader):
    """A format of PEFT folders that is recognised by the config's peft_type."""

    peft_type: ClassVar[str]

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return True if the folder's config names this type; its other files are not checked."""
        return cls.claims(folder, config_fields(folder))

    @classmethod
    def claims(cls, folder: Path, fields: Mapping[str, Any]) -> bool:
        """Return True if the folder's config, already read as `fields`, names this PEFT type."""
        return fields.get("peft_type") == cls.peft_type


class ForeignFormat(PeftReader):
    """A PEFT type whose tensors are not those of a plain LoRA; subclasses give one formula, `update`."""

    # names below a layer's path, and below the adapter itself
    parts: ClassVar[frozenset[str]]
    shared: ClassVar[frozenset[str]] = frozenset()
    # config fields that `update` reads or that do not change the tensors' meaning, and those without a form as factors
    fields: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, str]] = {}
    # the formula holds for linear layers alone
    linear_only: ClassVar[bool] = False

    @classmethod
    def _read(cls, source: Path, bound: Bound, model: nn.Module | None, allow_pickle: bool) -> Contents:
        config = cls._config(source)
        card, stored_print, _ = read_card(source)
        tensors: dict[str, Tensor] = {}
        dtypes: set[str] = set()
        for key, dtype, tensor in stored_tensors(source, allow_pickle=allow_pickle, integers=True):
            require_finite(tensor, str(source), repr(key))
            tensors[key] = tensor
            dtypes |= {str(FLOATS[dtype]).removeprefix("torch.")} if dtype in FLOATS else set()
        if not tensors:
            raise AdapterCorrupt(f"{source}: the file holds no tensors")
        heads, _ = take_heads(tensors, config.names("modules_to_save"), config.text("task_type"), "none", source)
        layers = list(cls._layers(tensors, config, model))
        model_print = stored_print if model is None else fingerprint(model)
        if stored_print is not None and model_print is not None and (why := stored_print.differs(model_print)):
            raise BaseModelMismatch(f"{source}: the adapter was made for another base model than the one given: {why}")
        factors: dict[str, Factors] = {}
        notes: dict[str, Any] = {}
        for layer in layers:
            factors[layer.name], notes[layer.name] = _convert(cls, layer, bound)
        card |= {"converted_from": cls.peft_type, "conversion": notes, "stored_dtype": "+".join(sorted(dtypes))}
        base_model = config.text("base_model_name_or_path") or base_model_of_readme(source)
        return Contents(base_model, factors, model_print, card, heads)

    @classmethod
    @abstractmethod
    def update(cls, layer: StoredLayer) -> Factors | Dense:
        """Return one layer's update by the type's formula: exact factors, or a dense matrix to be cut to factors."""

    @classmethod
    def _own_config(cls, folder: Path) -> AdapterConfig:
        config = AdapterConfig.of(folder)
        if (kind := config.fields.get("peft_type")) != cls.peft_type:
            raise AdapterUnsupported(f"{folder}: peft_type is {kind!r:.80}, not {cls.peft_type!r}")
        return config

    @classmethod
    def _config(cls, folder: Path) -> AdapterConfig:
        config = cls._own_config(folder)
        config.check_fields(COMMON | cls.fields, cls.refused)
        if (bias := config.fields.get("bias", "none")) != "none":
            raise AdapterUnsupported(f"{folder}: bias={bias!r:.80}: trained biases are supported for LoRA adapters only")
        return config

    @classmethod
    def _layers(cls, tensors: Mapping[str, Tensor], config: AdapterConfig, model: nn.Module | None) -> Iterable[StoredLayer]:
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
        modules = {} if model is None else dict(model.named_modules())
        known = {name: base_layer(modules, name, str(config.folder)) for name in held} if modules else {}
        # the position follows the order of the model's modules, not of the file
        for number, name in enumerate([name for name in modules if name in held] or sorted(held)):
            where, place = f"{config.folder}: layer {name!r}", number if modules else None
            yield StoredLayer(name, where, held[name], shared, config, known.get(name), place, len(held))

    @classmethod
    def _refuse_without_layers(cls, config: AdapterConfig) -> NoReturn:
        raise AdapterCorrupt(f"{config.folder}: the file holds no layer of a {cls.peft_type} adapter")

    @classmethod
    def _place(cls, key: str, folder: Path) -> tuple[str | None, str]:
        """Return (layer, its tensor's name there) for a key of the file; None is the layer of a shared tensor."""
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


def peft_type(
    parts: str, fields: str = "", *, shared: str = "", refused: Mapping[str, str] | None = None, linear_only: bool = False
) -> Callable[[Callable[[StoredLayer], Factors | Dense]], type[ForeignFormat]]:
    """Return a decorator that makes a format of a function, its `update` of a layer; the function's name is the PEFT type.

    The arguments are the class variables of `ForeignFormat`; names of tensors and fields are separated by spaces.
    """

    def format_of(update: Callable[[StoredLayer], Factors | Dense]) -> type[ForeignFormat]:
        held: dict[str, Any] = {
            "parts": words(parts),
            "fields": words(fields),
            "shared": words(shared),
            "refused": refused or {},
        }
        held |= {"peft_type": update.__name__.upper(), "linear_only": linear_only, "update": staticmethod(update)}
        return type(update.__name__, (ForeignFormat,), {"__doc__": update.__doc__, "__module__": update.__module__, **held})

    return format_of


class LoraVariant(ForeignFormat):
    """A variant of LoRA whose config has one more key, `field`, which changes the meaning of the tensors."""

    peft_type = "LORA"
    parts = frozenset({"lora_A.weight", "lora_B.weight"})
    field: ClassVar[str]

    @classmethod
    def claims(cls, folder: Path, fields: Mapping[str, Any]) -> bool:
        """Return True if the config, `fields`, is a LoRA's with the variant's `field` set."""
        return super().claims(folder, fields) and bool(fields.get(cls.field))

    @classmethod
    def settings(cls, config: AdapterConfig) -> Any:
        """Return the config parsed as that of a LoRA, without the variant's `field`."""
        return parse_lora({**config.fields, cls.field: None}, config.folder)

    @classmethod
    def scale(cls, layer: StoredLayer, rank: int) -> float:
        """Return the layer's alpha / r. Raises AdapterCorrupt if the config gives it another rank than the file's `rank`."""
        settings = cls.settings(layer.config)
        expected = settings.ranks([layer.name])[layer.name]
        if expected != rank:
            raise AdapterCorrupt(f"{layer.where} has rank {rank} in the file and rank {expected} in adapter_config.json")
        scale: float = settings.scales({layer.name: rank})[layer.name]
        return scale

    @classmethod
    def _config(cls, folder: Path) -> AdapterConfig:
        config = cls._own_config(folder)
        settings = cls.settings(config)
        flags: dict[str, Any] = {"use_dora": settings.use_dora, "lora_bias": settings.lora_bias}
        for name, value in {**flags, "bias": settings.bias != "none" and settings.bias}.items():
            if value:
                raise AdapterUnsupported(f"{folder}: {name}={value!r} beside {cls.field}, which is not supported")
        require_plain_activation(settings, cls.field)
        return config


def require_plain_activation(settings: Any, beside: str) -> None:
    """Raise AdapterUnsupported if the parsed LoRA config is an aLoRA's; `beside` names what that cannot be combined with."""
    if settings.invocation:
        raise AdapterUnsupported(f"{settings.folder}: alora_invocation_tokens beside {beside}, which PEFT does not combine")


def check_size(layer: StoredLayer, rows: int, columns: int) -> None:
    """Raise AdapterUnsupported if a rows x columns matrix exceeds MAX_VALUES or free memory; a small file can ask for it."""
    free = free_host_bytes()
    # in float64, twice: the matrix, and the factors or the error computed from it
    if free is not None and 16 * rows * columns > free:
        raise AdapterUnsupported(
            f"{layer.where}: the update would need a matrix of {rows} x {columns}, and more memory than the {free:,} free "
            "bytes; convert it on a larger machine"
        )
    if rows * columns > MAX_VALUES:
        raise AdapterUnsupported(
            f"{layer.where}: the update would need a matrix of {rows} x {columns}, above the limit of {MAX_VALUES} values"
        )


def _convert(layout: type[ForeignFormat], layer: StoredLayer, bound: Bound) -> tuple[Factors, dict[str, Any]]:
    """Return the layer's factors within `bound`, and the card's note on their rank and error.

    Raises AdapterUnsupported for a matrix too large for this machine and for a layer that `layout` does not support.
    """
    if layout.linear_only and layer.base.kind != "linear":
        raise AdapterUnsupported(f"{layer.where} is a {type(layer.base.module).__name__}; only linear layers are supported")
    try:
        return cut_update(layout.update(layer), bound, layer.where, layer.known_base)
    except (MemoryError, RuntimeError) as error:
        # torch has no class for a failed allocation
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise AdapterUnsupported(
            f"{layer.where}: its {layout.peft_type} form stands for a matrix that needs more memory than there is; "
            "convert it on a larger machine"
        ) from error


def plain_factors(a_RI: Tensor, b_OR: Tensor, **others: Any) -> Factors:
    """Return factors in fp32 from tensors of any precision, which are rounded once; `others` are fields of `Factors`."""
    exact = Factors(a_RI, b_OR, **others)
    rounded: dict[str, Any] = {name: tensor.float().contiguous() for name, tensor in exact.tensors().items()}
    return replace(exact, **rounded)


def block_diagonal(rows: Tensor, blocks: int, where: str) -> Tensor:
    """Return the block-diagonal matrix (m, blocks * n) of `rows` (m, n), whose blocks lie one below the other.

    Raises AdapterCorrupt, with `where` first in its text, if the m rows do not divide into `blocks`.
    """
    if blocks < 1 or rows.shape[0] % blocks:
        raise AdapterCorrupt(f"{where}: a factor of shape {tuple(rows.shape)} does not divide into {blocks} equal blocks")
    whole: Tensor = torch.block_diag(*rows.chunk(blocks))  # type: ignore[no-untyped-call]
    return whole
