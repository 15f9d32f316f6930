"""A task-scope mixture written into the base's weights for the length of a block: plain layers, other weights.

`mixture_updates` yields the update that a merge method makes of the mixture for each layer; `Fused.write` writes these into
the model, one layer at a time. No parameter is exchanged before the new values of all are calculated and known to be finite,
so that a refusal has changed nothing; `overwritten.py` draws the states of one parameter.

    mixture -> {layer: w_E} -> method(experts, w_E) = update -> prepare all layers -> exchange all ... leave: restore all
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.common.checks import is_number
from loraweave.composer.fused.overwritten import (
    LayerLoss,
    Originals,
    Overwritten,
    Place,
    Scratch,
    WeightWriter,
    lossy_writers,
)
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.live.resolve import resolve, warn_of_licenses
from loraweave.composer.merge.merge import layer_calls, layer_updates
from loraweave.composer.merge.method_call import AdapterStatistics, DenseUpdate, MethodCall, require_seed, without_figures
from loraweave.composer.model.layers import OVERWRITTEN, TargetLayer, tied_parameters
from loraweave.errors import BaseModelUnverified, CompositionError, ScopeError, WeightingError
from loraweave.hub.pool import ExpertPool, require_everywhere
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

Update = tuple[TargetLayer, Factors | DenseUpdate]
# the updates of a mixture, a method, its seed, statistics and options
MakeUpdates = Callable[[Any, str, int, Mapping[str, AdapterStatistics] | None, Mapping[str, Any]], Iterable[Update]]


@contextmanager
def fused(
    model: nn.Module,
    make: MakeUpdates,
    updates: Iterable[Update],
    originals: Place = "memory",
    max_loss: float | None = None,
) -> Iterator[Fused]:
    """Put the weights of `updates` into the model for the block, and the model's own back, bit for bit, after it.

    `make` turns a mixture into updates, for `switch`; `originals` says where the original weights are kept, and `max_loss`
    is that of `Composer.fused`. Raises CompositionError on leaving, after restoring, when someone else changed a fused
    weight meanwhile; else what `Fused.write` raises, with the model unchanged.
    """
    writing = Fused(model, make, originals, max_loss)
    try:
        writing.write(updates)
        yield writing
    except BaseException as error:
        if changed := writing.leave():
            error.add_note(_changed_message(changed))
        raise
    else:
        if changed := writing.leave():
            raise CompositionError(_changed_message(changed))
    finally:
        # once more, for an interruption on the way to the lines above
        writing.leave()


class Fused:
    """The handle that `Composer.fused` gives its block: the mixture that is in the weights, and the way to another one.

    The originals take as many bytes as all parameters that were ever written to. Writing takes one parameter's size and 4 MB
    beside them; for a quantised layer a few matrices of its size in fp32.
    """

    def __init__(
        self, model: nn.Module, make: MakeUpdates, originals: Place = "memory", max_loss: float | None = None
    ) -> None:
        if max_loss not in (None, math.inf) and not is_number(max_loss, 0):
            raise CompositionError(f"max_loss={max_loss!r} is not the share of an update that may be lost, 0 or more")
        self._max_loss = max_loss
        # for weights that are no plain floats
        self._writers = () if max_loss is None else lossy_writers()
        self._originals = Originals(originals)
        self.model = model
        self._make = make
        self._kept: dict[tuple[TargetLayer, str], WeightWriter] = {}
        self._found_changed: list[str] = []
        self._tied: dict[str, str] | None = None
        self._left = False
        self._lock = threading.RLock()

    @property
    def original_bytes(self) -> int:
        """The bytes that the originals take where they are kept: in memory or on disk."""
        return self._originals.num_bytes

    @property
    def losses(self) -> dict[str, LayerLoss]:
        """The loss of each layer, by name, that the mixture changes and whose weight cannot hold the update exactly."""
        written = ((kept.layer.name, kept.loss) for kept in self._kept.values() if not kept.at_home)
        return {name: loss for name, loss in written if loss is not None}

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Let all layers compute for the block as if their weights held the mixture's updates exactly.

        Raises CompositionError after the end of the mixture's own block.
        """
        with self._lock, ExitStack() as stack:
            self._require_open()
            for kept in self._kept.values():
                stack.enter_context(kept.exact())
            yield

    def _require_open(self) -> None:
        if self._left:
            raise CompositionError("the fused() block of this mixture has ended: open another one")

    def switch(
        self,
        mixture: Any,
        *,
        method: str = "linear",
        seed: int = 0,
        statistics: Mapping[str, AdapterStatistics] | None = None,
        **options: Any,
    ) -> None:
        """Put another mixture in place of this one: originals and update in one pass, without restoring in between.

        The arguments are those of `Composer.fused`. Raises what that raises, and CompositionError after the block's end or
        when someone else changed a fused weight. A mixture, method or option that is refused changes nothing; an error while
        writing, or an interruption, leaves the base's own weights.
        """
        self.write(self._make(mixture, method, seed, statistics, options))

    def write(self, updates: Iterable[Update]) -> None:
        """Write W (1 + gain) + update for these updates, in fp32 or better, rounded once, whatever was written before.

        One of `updates` is held at a time. New values of a parameter that is not yet fused are calculated, and found finite,
        beside the model, and then change places with the originals. A fused parameter is written over, from its original, in
        one pass. Layers that are in no update are restored. The parameters stay the same objects in the same memory.

        Raises CompositionError for weights that are quantised, without a `max_loss`, on the meta device or tied to another
        parameter, for values that are not finite, and for fused weights that someone else has changed (which then stay). Any
        failure while writing, and an interruption, leave the base's own weights.
        """
        with self._lock:
            self._require_open()
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
        """Restore and release all originals, and return the names of parameters that others changed. May be called twice.

        An interruption, or an error about one parameter, is raised once all other parameters are restored.
        """
        with self._lock:
            self._left = True
            try:
                self._leave()
            except BaseException:
                # once more, from where it was interrupted
                self._leave()
                raise
            changed, self._found_changed = self._found_changed, []
            return changed

    def _write(self, updates: Iterable[Update]) -> None:
        scratch = Scratch()
        new: list[WeightWriter] = []
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
                self._originals.rest(kept.slot)
        for kept in left_out.values():
            kept.restore()
            self._originals.rest(kept.slot)
        for kept in new:
            OVERWRITTEN.add(kept.layer.module)
            kept.exchange(scratch)
            self._originals.rest(kept.slot)

    def _parameter(self, layer: TargetLayer, part: str) -> WeightWriter:
        if (layer, part) in self._kept:
            return self._kept[layer, part]
        if part == "weight" and (lossy := self._lossy(layer)) is not None:
            self._kept[layer, part] = lossy(self.model, layer, self._max_loss)
        else:
            parameter, like = layer.module._parameters[layer.key(part)], layer.parameter(part)
            assert parameter is not None
            assert like is not None
            self._kept[layer, part] = Overwritten(layer, part, parameter, self._originals.slot(like))
        return self._kept[layer, part]

    def _parts(self, layer: TargetLayer, update: Factors | DenseUpdate) -> list[str]:
        """Return the parameters, "weight" and "bias", that the update changes.

        Raises CompositionError for one that cannot be written to.
        """
        parts: list[str] = []
        plain: list[str] = []
        if not isinstance(update, Factors) or update.rank or update.gain_O is not None:
            parts.append("weight")
        # a lossy writer puts another object in place of a weight, so that the other use of a tied one keeps its own
        if parts and self._lossy(layer) is None:
            layer.dense_weight_OI()
            weight = layer.module._parameters.get(layer.key("weight"))
            if weight is None or type(weight.data) is not Tensor:
                description = "computed on the way" if weight is None else f"a {type(weight.data).__name__}"
                raise CompositionError(
                    f"cannot fuse into layer {layer.name!r}: its weight is {description}, not a plain parameter; activate() "
                    "instead"
                )
            plain.append("weight")
        bias = layer.module._parameters.get("bias") if layer.number is None else None
        if update.bias_O is not None and bool(update.bias_O.any()):
            if bias is None:
                raise CompositionError(
                    f"cannot fuse a bias into layer {layer.name!r}, which has none; activate() the mixture instead"
                )
            parts.append("bias")
            plain.append("bias")
        if self._tied is None:
            self._tied = tied_parameters(self.model)
        for part in plain:
            name = f"{layer.path}.{layer.key(part)}"
            if name in self._tied:
                raise CompositionError(
                    f"cannot fuse into {name!r}: its memory is also {self._tied[name]!r} (tied weights), which would change "
                    "too; activate() the mixture instead"
                )
        return parts

    def _lossy(self, layer: TargetLayer) -> Any:
        """Return the writer class for the layer's weight if that holds no plain floats and a loss is allowed, else None."""
        return next((writer for writer in self._writers if writer.takes(layer)), None)

    def _restore(self) -> None:
        for kept in self._kept.values():
            kept.restore()
            self._originals.rest(kept.slot)

    def _leave(self) -> None:
        interruption: BaseException | None = None
        for kept in reversed(self._kept.values()):
            for _ in range(2):
                try:
                    if kept.leave():
                        self._found_changed.append(kept.name)
                    self._originals.rest(kept.slot)
                    break
                except BaseException as error:
                    interruption = interruption or error
        if interruption is not None:
            raise interruption
        for kept in self._kept.values():
            OVERWRITTEN.discard(kept.layer.module)
        self._kept.clear()
        self._originals.close()


def _changed_message(changed: list[str]) -> str:
    return (
        f"{len(changed)} fused weights were changed by others while fused, the first {changed[0]!r}; the originals from "
        "before fusing are back, and that change is lost: change weights only outside the block"
    )


def mixture_updates(
    pool: ExpertPool,
    bound: ExpertPool,
    fitting: Fitting,
    mixture: Any,
    method: str,
    seed: int,
    statistics: Mapping[str, AdapterStatistics] | None,
    options: Mapping[str, Any],
) -> Iterator[Update]:
    """Return an iterator over (layer, the update that `method` makes of a task-scope mixture), one held at a time."""
    weights = resolve(mixture, pool)
    if not isinstance(weights, MixtureWeights) or weights.scope != "task":
        scope = getattr(weights, "scope", f"router {type(weights).__name__}")
        raise ScopeError(f"cannot fuse weights that vary with the input ({scope}): activate() them instead")
    warn_of_licenses(weights, pool)
    call = MethodCall(method, options)
    require_seed(seed)
    used = weights.values_BTLE[0, 0].any(dim=0).nonzero()[:, 0].tolist()
    adapters = {weights.experts[place]: bound.adapters[weights.experts[place]] for place in used}
    for name, adapter in adapters.items():
        require_everywhere(name, adapter, "weights that are written into the model act on every token")
    for writer in lossy_writers():
        for sentence in writer.warnings(adapters, fitting.layers):
            warnings.warn(sentence, BaseModelUnverified, stacklevel=3)
    experts = {name: adapter.layers for name, adapter in adapters.items()}
    # after the experts, since those of a lazy pool bring their layers along
    layers = fitting.layers
    per_layer: dict[str, dict[str, float]] = {}
    for name in layers:
        pairs = zip(experts, weights.for_layer(name)[0, 0, used].tolist(), strict=True)
        per_layer[name] = {expert: weight for expert, weight in pairs if weight != 0.0}
    if "statistics" in call.parameters:
        wanted = {expert for weighed in per_layer.values() for expert in weighed}
        _check_statistics(method, statistics or {}, wanted, pool)
    hashes = {expert: pool.adapters[expert].hash for expert in experts} if "seeds" in call.parameters else {}
    updates = layer_updates(layer_calls(call, experts, hashes, per_layer, seed=seed, statistics=statistics))
    return ((layers[name], without_figures(update)) for name, update in updates)


def _check_statistics(method: str, statistics: Mapping[str, AdapterStatistics], used: set[str], pool: ExpertPool) -> None:
    for expert in sorted(used):
        if expert not in statistics:
            raise WeightingError(
                f"method {method!r} weighs by data, and there is none for expert {expert!r}: pass statistics={{name: "
                "collect_statistics(model, tokenizer, adapter, texts), ...}"
            )
        statistics[expert].require_of(expert, pool.adapters[expert].hash)
