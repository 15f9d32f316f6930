"""Fusing: a task-scope mixture written into the base weights, and the kept originals copied back on leaving."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn

from loraweave.composer.dense_update import DenseUpdate
from loraweave.composer.fused_parameter import FusedParameter, Scratch
from loraweave.composer.layers import TargetLayer
from loraweave.composer.originals import Originals, Place
from loraweave.composer.tied_parameters import tied_parameters
from loraweave.errors import CompositionError
from loraweave.types import Factors

Update = tuple[TargetLayer, Factors | DenseUpdate]

_FUSED: WeakSet[nn.Module] = WeakSet()


def is_fused(module: nn.Module) -> bool:
    """Whether the module's weights are those of a mixture just now."""
    return module in _FUSED


@contextmanager
def fused(model: nn.Module, updates: Iterable[Update], originals: Place = "memory") -> Iterator[Fusion]:
    """W' = W (1 + gain) + update and bias' = bias + bias of the update inside the block; bit for bit W and bias after it.

    Raises CompositionError on leaving, after restoring, when someone else changed a fused weight meanwhile; else what
    `Fusion.write` raises, with the model unchanged.
    """
    fusion = Fusion(model, originals)
    try:
        fusion.write(updates)
        yield fusion
    except BaseException as error:
        if changed := fusion.leave():
            error.add_note(_changed_message(changed))
        raise
    else:
        if changed := fusion.leave():
            raise CompositionError(_changed_message(changed))
    finally:
        # once more, for an interruption on the way to the lines above
        fusion.leave()


class Fusion:
    """A model, the mixture that is written into it, and the originals of all parameters that were ever written to.

    These take as many bytes as the parameters. While writing, there are also one parameter's own values and 4 MB.
    """

    def __init__(self, model: nn.Module, originals: Place = "memory") -> None:
        self.originals = Originals(originals)
        self._model = model
        self._kept: dict[tuple[TargetLayer, str], FusedParameter] = {}
        self._found_changed: list[str] = []
        self._tied: dict[str, str] | None = None
        self._left = False
        self._lock = threading.RLock()

    def write(self, updates: Iterable[Update]) -> None:
        """The weights of these updates, whatever was written before: W (1 + gain) + update, in fp32 or better, rounded once.

        One of `updates` is held at a time. What is not yet fused is calculated, and found finite, beside the model, and then
        changes places with the originals. What is fused already is written over, from its original, in one pass. Layers
        that are in no update get theirs back. The parameters stay the same objects in the same memory.

        Raises CompositionError for weights that are quantised, on the meta device or tied to another parameter, for values
        that are not finite, and for fused weights that someone else has changed (which then stay). Whatever fails, and
        interruptions, leave the base's own weights.
        """
        with self._lock:
            if self._left:
                raise CompositionError("the fused() block of this mixture has ended: open another one")
            if changed := [kept.name for kept in self._kept.values() if kept.changed()]:
                raise CompositionError(
                    f"{len(changed)} fused weights were changed by others while fused, the first {changed[0]!r}, and "
                    "another mixture would overwrite that: change weights only outside the block"
                )
            try:
                with torch.inference_mode(False), torch.no_grad():
                    self._write(updates)
            except BaseException:
                self._restore()
                raise

    def leave(self) -> list[str]:
        """Puts every original back and lets go of them; the names of what others had changed. Twice is fine.

        An interruption, or an error about one parameter, is raised once all others are back.
        """
        with self._lock:
            self._left = True
            try:
                self._leave()
            except BaseException:
                # from where it was interrupted
                self._leave()
                raise
            found, self._found_changed = self._found_changed, []
            return found

    def _write(self, updates: Iterable[Update]) -> None:
        scratch = Scratch()
        new: list[FusedParameter] = []
        left_out = dict(self._kept)
        for layer, update in updates:
            for part in self._parts(layer, update):
                left_out.pop((layer, part), None)
                kept = self._parameter(layer, part)
                if kept.at_home:
                    kept.prepare(update, scratch)
                    new.append(kept)
                else:
                    kept.rewrite(update, scratch)
                self.originals.rest(kept.slot)
        for kept in left_out.values():
            kept.restore()
            self.originals.rest(kept.slot)
        for kept in new:
            _FUSED.add(kept.layer.module)
            kept.exchange(scratch)
            self.originals.rest(kept.slot)

    def _parameter(self, layer: TargetLayer, part: str) -> FusedParameter:
        if (layer, part) not in self._kept:
            parameter = layer.module._parameters[part]
            assert parameter is not None
            self._kept[layer, part] = FusedParameter(layer, part, parameter, self.originals.slot(parameter))
        return self._kept[layer, part]

    def _parts(self, layer: TargetLayer, update: Factors | DenseUpdate) -> list[str]:
        """Which parameters the update changes. Raises CompositionError for those that cannot be written to."""
        parts = []
        if not isinstance(update, Factors) or update.rank or update.gain_O is not None:
            layer.dense_weight_OI()
            weight = layer.module._parameters.get("weight")
            if weight is None or type(weight.data) is not Tensor:
                found = "computed on the way" if weight is None else f"a {type(weight.data).__name__}"
                raise CompositionError(
                    f"cannot fuse into layer {layer.name!r}: its weight is {found}, not a plain parameter; activate() "
                    "instead"
                )
            parts.append("weight")
        bias = layer.module._parameters.get("bias")
        if update.bias_O is not None and bool(update.bias_O.any()):
            if bias is None:
                raise CompositionError(
                    f"cannot fuse a bias into layer {layer.name!r}, which has none; activate() the mixture instead"
                )
            parts.append("bias")
        if self._tied is None:
            self._tied = tied_parameters(self._model)
        for part in parts:
            name = f"{layer.name}.{part}"
            if name in self._tied:
                raise CompositionError(
                    f"cannot fuse into {name!r}: its memory is also {self._tied[name]!r} (tied weights), which would change "
                    "too; activate() the mixture instead"
                )
        return parts

    def _restore(self) -> None:
        for kept in self._kept.values():
            kept.restore()
            self.originals.rest(kept.slot)

    def _leave(self) -> None:
        interruption: BaseException | None = None
        for kept in reversed(self._kept.values()):
            for _ in range(2):
                try:
                    if kept.leave():
                        self._found_changed.append(kept.name)
                    self.originals.rest(kept.slot)
                    break
                except BaseException as error:
                    interruption = interruption or error
        if interruption is not None:
            raise interruption
        for kept in self._kept.values():
            _FUSED.discard(kept.layer.module)
        self._kept.clear()
        self.originals.close()


def _changed_message(changed: list[str]) -> str:
    return (
        f"{len(changed)} fused weights were changed by others while fused, the first {changed[0]!r}; the originals from "
        "before fusing are back, and that change is lost: change weights only outside the block"
    )
