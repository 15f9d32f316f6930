"""The cost that a mixture adds to a forward, by its formula: FLOPs and bytes of factors, beside those of the base layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from loraweave import Composer, Factors
from loraweave.extend import ShownTable, TargetLayer
from loraweave.extend.live import UsedLayer, UsedWeights
from loraweave.extend.models import is_floating


@dataclass(frozen=True)
class LayerCost:
    """The cost of one call of a layer. A multiplication and an addition are two FLOPs; a used weight is read once.

    Base: 2 N O I for N tokens (nothing for an embedding, which looks up), and the bytes of weight and bias. Added, for each
    token and each expert whose weight there is not 0: 2 R (I + O) + R, 3 O for a gain, 2 O for a bias, and O for the sum;
    and the bytes of the factors of the experts that some token uses. `kernel` is the file of `composer/live/kernels/` that
    computed the call, which may itself need more FLOPs and bytes.
    """

    base_flops: int
    base_bytes: int
    added_flops: int
    added_bytes: int
    kernel: str = ""


@dataclass(frozen=True)
class Cost(Mapping[str, LayerCost]):
    """The cost of a forward by layer, for the layers that experts may update; `total` is their sum."""

    layers: Mapping[str, LayerCost]

    def __getitem__(self, layer: str) -> LayerCost:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def total(self) -> LayerCost:
        names = ("base_flops", "base_bytes", "added_flops", "added_bytes")
        return LayerCost(*(sum(getattr(layer_cost, name) for layer_cost in self.values()) for name in names))

    def table(self) -> ShownTable:
        """Return a table with one row for all layers of a name, such as q_proj, and one for the total."""
        groups: dict[str, list[LayerCost]] = {}
        for layer, layer_cost in self.items():
            groups.setdefault(_module_name(layer), []).append(layer_cost)
        table = ShownTable(title="what the mixture adds", title_justify="left")
        for column in ("layers", "count", "FLOPs", "of the base's", "bytes", "of the base's", "kernel"):
            table.add_column(column, justify="left" if column in ("layers", "kernel") else "right")
        for name, group in [*groups.items(), ("all", list(self.values()))]:
            sums = Cost({str(at): layer_cost for at, layer_cost in enumerate(group)}).total
            shares = (_share(sums.added_flops, sums.base_flops), _share(sums.added_bytes, sums.base_bytes))
            kernels = ", ".join(dict.fromkeys(layer_cost.kernel for layer_cost in group if layer_cost.kernel))
            figures = (f"{sums.added_flops:,}", shares[0], f"{sums.added_bytes:,}", shares[1])
            table.add_row(name, str(len(group)), *figures, kernels)
        return table

    def to_json(self) -> dict[str, Any]:
        """Return {layer: {figure: value}}, with "total" as one more layer."""
        return {name: vars(layer_cost) for name, layer_cost in [*self.items(), ("total", self.total)]}


def cost(engine: Composer, used: UsedWeights | None = None) -> Cost:
    """Return each layer's base FLOPs and bytes, and those added by the `used` weights, by default the last forward's."""
    used = engine.last_weights if used is None else used
    # expert by expert, since a lazy pool opens each expert to read its sizes
    by_expert = [
        {layer: _Part.of(factors) for layer, factors in engine.bound(expert).layers.items() if layer in used.layers}
        for expert in used.experts
    ]
    return Cost(
        {
            name: _layer_cost(engine.target_layers[name], used_layer, [parts.get(name) for parts in by_expert])
            for name, used_layer in used.layers.items()
        }
    )


class _Part(NamedTuple):
    """The sizes of one expert's factors in one layer; `affine` is the FLOPs per output for gain and bias."""

    rank: int
    num_values: int
    affine: int

    @classmethod
    def of(cls, factors: Factors) -> _Part:
        affine = 3 * (factors.gain_O is not None) + 2 * (factors.bias_O is not None)
        return cls(factors.rank, sum(tensor.numel() for tensor in factors.tensors().values()), affine)


def _layer_cost(layer: TargetLayer, used: UsedLayer, parts: list[_Part | None]) -> LayerCost:
    num_out, num_in = layer.num_outputs, layer.num_inputs
    looks_up = layer.kind.name == "embedding"
    num_tokens = used.num_rows * used.num_tokens
    # the number of tokens that share an axis of size one
    times = num_tokens // max(used.w_BTE.shape[0] * used.w_BTE.shape[1], 1)
    chosen_BTE = used.w_BTE != 0
    tokens_E = (chosen_BTE.sum(dim=(0, 1)) * times).tolist()
    weight, bias = layer.parameter("weight"), layer.parameter("bias")
    itemsize = weight.dtype.itemsize if weight is not None and is_floating(weight.dtype) else 4
    flops = num_out * int(chosen_BTE.any(dim=-1).sum()) * times
    num_values = 0
    for tokens, part in zip(tokens_E, parts, strict=True):
        if part is not None and tokens:
            read = 0 if looks_up else num_in
            flops += tokens * (2 * part.rank * (read + num_out) + part.rank + part.affine * num_out)
            # a look-up reads one column of a for each token
            num_values += part.num_values - (part.rank * (num_in - min(tokens, num_in)) if looks_up else 0)
    return LayerCost(
        base_flops=0 if looks_up else 2 * num_tokens * num_out * num_in,
        base_bytes=min(num_tokens, num_in) * num_out * itemsize if looks_up else _size(weight) + _size(bias),
        added_flops=flops,
        added_bytes=num_values * itemsize,
        kernel=used.kernel,
    )


def _module_name(layer: str) -> str:
    """Return the last step of a layer's path that is not a number, such as q_proj."""
    return next((step for step in reversed(layer.split(".")) if not step.isdecimal()), layer)


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


def _share(added: int, base: int) -> str:
    return f"{added / base:.2%}" if base else "-"
