"""One tensor a layer, under the layers' own names, as a part of a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class LayerTensors(nn.Module):
    """{layer: tensor}, parameters where `learned`. What is read from a file takes the place of whatever there was."""

    def __init__(self, tensors: Mapping[str, Tensor], *, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned
        for layer, tensor in tensors.items():
            self[layer] = tensor

    def __setitem__(self, layer: str, tensor: Tensor) -> None:
        key = _key(layer)
        if self.learned:
            self._parameters[key] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        else:
            self._buffers[key] = tensor

    def __getitem__(self, layer: str) -> Tensor:
        found: Tensor = self._tensors[_key(layer)]
        return found

    def __delitem__(self, layer: str) -> None:
        del self._tensors[_key(layer)]

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and _key(layer) in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (_layer(key) for key in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def _tensors(self) -> dict[str, Any]:
        return self._parameters if self.learned else self._buffers

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            self[_layer(name.removeprefix(prefix))] = state_dict[name].clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _key(layer: str) -> str:
    # torch takes a dot in a name for a step down
    return layer.replace(".", "/")


def _layer(key: str) -> str:
    return key.replace("/", ".")
