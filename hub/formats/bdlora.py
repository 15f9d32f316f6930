"""BD-LoRA: a LoRA of which one factor is block-diagonal, so that it can be served in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._config import Config
from loraweave.hub.formats._conversion import plain
from loraweave.hub.formats._foreign import Layer, check_size
from loraweave.hub.formats._lora_variant import LoraVariant, block_diagonal
from loraweave.types import Factors

_FIELDS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}


class Bdlora(LoraVariant):
    """Delta = alpha/r B A with the stored blocks on the diagonal of A, or of B: exactly of rank r."""

    field = "use_bdlora"

    @classmethod
    def update(cls, layer: Layer) -> Factors:
        names_a, names_b, blocks = _blocks(layer.config)
        a, b = layer.part("lora_A.weight", None, None), layer.part("lora_B.weight", None, None)
        own = layer.name.rsplit(".", 1)[-1]
        in_a, in_b = (any(name in own for name in names) for names in (names_a, names_b))
        if in_a and in_b:
            raise AdapterCorrupt(f"{layer.where}: use_bdlora names both factors of it")
        check_size(layer, b.shape[0], a.shape[1] * blocks)
        a = block_diagonal(a, blocks, layer.where) if in_a else a
        b = block_diagonal(b, blocks, layer.where) if in_b else b
        if a.shape[0] != b.shape[1]:
            raise AdapterCorrupt(f"{layer.where}: A has rank {a.shape[0]} and B has rank {b.shape[1]}")
        return plain(a, b * cls.scale(layer, a.shape[0]))

    @classmethod
    def _config(cls, folder: Path) -> Config:
        config = super()._config(folder)
        _blocks(config)
        return config


def _blocks(config: Config) -> tuple[list[str], list[str], int]:
    """(names of modules with blocks in A, in B, how many blocks)."""
    value: Any = config.fields["use_bdlora"]
    if not isinstance(value, dict):
        raise AdapterCorrupt(f"{config.folder}: use_bdlora is {str(value)[:80]}, not an object")
    if unknown := sorted(set(value) - _FIELDS):
        raise AdapterUnsupported(f"{config.folder}: use_bdlora has the unknown field {unknown[0]!r:.80}")
    names = [value.get(name) or [] for name in ("target_modules_bd_a", "target_modules_bd_b")]
    if any(not isinstance(each, list) or not all(isinstance(name, str) for name in each) for each in names):
        raise AdapterCorrupt(f"{config.folder}: use_bdlora has {str(names)[:80]}, not two lists of module names")
    return names[0], names[1], Config(config.folder, value).count("nblocks", 1)
