"""BD-LoRA: a LoRA with one block-diagonal factor, so that it can be served in shards."""

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors
from loraweave.extend.formats import AdapterConfig
from loraweave.extensions.adapter_types.formats._foreign import (
    LoraVariant,
    StoredLayer,
    block_diagonal,
    check_size,
    plain_factors,
)

_FIELDS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}


class Bdlora(LoraVariant):
    """Delta = alpha/r B A with the stored blocks on the diagonal of A, or of B: exactly of rank r."""

    field = "use_bdlora"

    @classmethod
    def update(cls, layer: StoredLayer) -> Factors:
        names_a, names_b, blocks = _blocks(layer.config)
        a, b = layer.part("lora_A.weight", None, None), layer.part("lora_B.weight", None, None)
        module_name = layer.name.rsplit(".", 1)[-1]
        in_a, in_b = (any(name in module_name for name in names) for names in (names_a, names_b))
        if in_a and in_b:
            raise AdapterCorrupt(f"{layer.where}: use_bdlora names both factors of it")
        check_size(layer, b.shape[0], a.shape[1] * blocks)
        a = block_diagonal(a, blocks, layer.where) if in_a else a
        b = block_diagonal(b, blocks, layer.where) if in_b else b
        if a.shape[0] != b.shape[1]:
            raise AdapterCorrupt(f"{layer.where}: A has rank {a.shape[0]} and B has rank {b.shape[1]}")
        return plain_factors(a, b * cls.scale(layer, a.shape[0]))


def _blocks(config: AdapterConfig) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Return (names of modules with blocks in A, names of those with blocks in B, the number of blocks) by the config."""
    inner = AdapterConfig(config.folder, config.table("use_bdlora"))
    if unknown := sorted(set(inner.fields) - _FIELDS):
        raise AdapterUnsupported(f"{config.folder}: use_bdlora has the unknown field {unknown[0]!r:.80}")
    return inner.names("target_modules_bd_a"), inner.names("target_modules_bd_b"), inner.count("nblocks", 1)
