"""Whether the layers that a Composer knows are still those that the model runs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from loraweave.errors import CompositionError


class ModulePaths:
    """The modules from a model down to some of its layers, as they were when the layers were added."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._steps: dict[str, tuple[dict[str, nn.Module | None], str, nn.Module | None]] = {}

    def add(self, layers: Iterable[str]) -> None:
        """Remembers the way to these layers."""
        for layer in layers:
            module, path = self._model, ""
            for part in layer.split(".") if layer else ():
                path = f"{path}.{part}" if path else part
                child = module._modules[part]
                self._steps.setdefault(path, (module._modules, part, child))
                module = child  # type: ignore[assignment]

    def require_unchanged(self) -> None:
        """Raises CompositionError, naming the first of them, when another module has taken a place, or none has it."""
        for path, (children, part, module) in self._steps.items():
            if children.get(part) is not module:
                now = children.get(part)
                way_out = "make a new Composer for the model as it is now"
                if hasattr(now, "base_layer"):
                    way_out = "take peft's adapters out with its unload(), or give them to the Composer"
                raise CompositionError(
                    f"module {path!r} of the model is not the {type(module).__name__} that was there when this Composer was "
                    f"made, but {'gone' if now is None else f'another {type(now).__name__}'}: {way_out}"
                )
