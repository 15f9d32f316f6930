"""LoRA folders of MLX (mlx-lm): `adapters.safetensors` with `lora_a` and `lora_b`, and a config with `lora_parameters`."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loraweave import AdapterCorrupt, AdapterUnsupported
from loraweave.extend.formats import AdapterConfig, entry, present
from loraweave.extensions.adapter_types.formats._lora_file import LoraFile, Parts
from loraweave.extensions.adapter_types.formats._placing import GIVE_MODEL, BaseNames, Placement

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_SUFFIXES = {".lora_a": "down", ".lora_b": "up"}
_EMBEDDINGS = ("embed", "wte")


class Mlx(LoraFile):
    """Delta = s (a b)^T with a (I, R) and b (R, O), s being `scale`, times alpha / rank if the config has an alpha.

    Older versions wrote an alpha and multiplied by both, newer ones have only `scale`. Paths are those of MLX's model, which
    follow the checkpoint's; `model` checks them. An embedding needs it, since it is stored like a linear layer.
    """

    example = ("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b")
    files = (WEIGHTS,)

    @classmethod
    def knows(cls, names: Collection[str]) -> bool:
        return any(name.endswith(".lora_a") for name in names)

    @classmethod
    def recognises(cls, source: Path, *, allow_pickle: bool = False) -> bool:
        """Return True if `source` is MLX's file of factors or its folder, with MLX's config beside the weights."""
        folder = source.parent if source.is_file() else source
        try:
            return _fields(folder) is not None and super().recognises(source, allow_pickle=allow_pickle)
        except AdapterCorrupt:
            return False

    @classmethod
    def split(cls, name: str) -> tuple[str, str] | None:
        suffix = name[-len(".lora_a") :]
        return (name.removesuffix(suffix), _SUFFIXES[suffix]) if suffix in _SUFFIXES and name != suffix else None

    @classmethod
    def place(cls, module: str, base: BaseNames | None, where: str) -> Placement:
        if base is None and any(part in module.rsplit(".", 1)[-1] for part in _EMBEDDINGS):
            raise AdapterUnsupported(f"{where}: the file does not say whether {module!r} is an embedding; {GIVE_MODEL}")
        return Placement((module,))

    @classmethod
    def scales(cls, held: Mapping[str, Parts], metadata: Mapping[str, str], where: str) -> dict[str, float]:
        folder = Path(where).parent
        fields = _fields(folder)
        if fields is None:
            raise AdapterUnsupported(f"{where}: no {CONFIG} with lora_parameters beside it, so the scale is not known")
        kind = fields.get("fine_tune_type", "lora")
        if kind != "lora" or fields.get("use_dora"):
            raise AdapterUnsupported(
                f"{folder}: fine_tune_type is {kind!r:.80} and use_dora {fields.get('use_dora')!r:.20}; only MLX's plain "
                "LoRA is supported"
            )
        settings = fields["lora_parameters"]
        unknown = sorted(set(settings) - {"rank", "scale", "alpha", "dropout", "keys"})
        if unknown:
            raise AdapterUnsupported(f"{folder}: lora_parameters has the unknown field {unknown[0]!r:.80}")
        reader = AdapterConfig(folder, settings)
        scale, rank = reader.number("scale"), reader.number("rank")
        if rank < 1:
            raise AdapterCorrupt(f"{folder}: lora_parameters has rank={rank:g}, below 1")
        for module, parts in held.items():
            if "down" in parts and parts["down"].shape[0] != rank:
                raise AdapterCorrupt(
                    f"{folder}: {module!r} has rank {parts['down'].shape[0]}, but lora_parameters say {rank:g}"
                )
        alpha = reader.number("alpha") if "alpha" in settings else rank
        return dict.fromkeys(held, scale * alpha / rank)

    @classmethod
    def base_id(cls, source: Path) -> str:
        model = entry(_fields(source if source.is_dir() else source.parent), "model", str) or ""
        return model if 0 < len(model) < 500 else super().base_id(source)

    @classmethod
    def _files(cls, source: Path, allow_pickle: bool = False) -> list[str]:
        files = super()._files(source, allow_pickle)
        # numbered checkpoints are stored beside the final weights
        return [WEIGHTS] if WEIGHTS in files else files

    @classmethod
    def _held(cls, folder: Path, name: str) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
        held, dtypes = super()._held(folder, name)
        for module, parts in held.items():
            for part, tensor in parts.items():
                if tensor.dim() != 2:
                    raise AdapterUnsupported(
                        f"{folder / name}: {module!r} has a factor of shape {tuple(tensor.shape)}: experts of one layer, "
                        "which have no form as factors of a layer"
                    )
                parts[part] = tensor.T.contiguous()
        return held, dtypes


def _fields(folder: Path) -> Mapping[str, Any] | None:
    """Return the fields of MLX's config in a folder, or None if it has none."""
    fields = AdapterConfig.of(folder).fields if present(folder, CONFIG) else {}
    return None if "peft_type" in fields or entry(fields, "lora_parameters", dict) is None else fields
