"""Compares adapters with the model that is to take them, each form of adapter once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from loraweave.composer import fuse
from loraweave.composer.a_model import require_model
from loraweave.composer.layers import TargetLayer, bound, require_values, target_layer
from loraweave.composer.limits.bound_weights import BoundWeights
from loraweave.composer.limits.live_limits import LiveLimits
from loraweave.composer.limits.module_paths import ModulePaths
from loraweave.composer.lock_after_fork import lock_of
from loraweave.errors import AlreadyActive, BaseModelMismatch
from loraweave.hub.adapter import Adapter, Form
from loraweave.hub.fingerprint import fingerprint
from loraweave.hub.on_demand import OnDemand
from loraweave.hub.pool import ExpertPool, require_no_heads
from loraweave.types import Fingerprint


class Fitting:
    """One model, as it was when this was made, beside which adapters are held."""

    def __init__(self, model: nn.Module) -> None:
        require_model(model)
        self._model = model
        self._modules = dict(model.named_modules())
        self._lock = lock_of(self)
        self._paths = ModulePaths(model)
        self._weights = BoundWeights()
        self._layers: dict[str, TargetLayer] = {}
        self._offloaded: dict[str, TargetLayer] = {}
        self.limits = LiveLimits(model)
        # the tuples themselves, so that none is another's successor in memory
        self._forms: dict[int, Form] = {}
        self._base: Fingerprint | None = None
        self._same_base: Fingerprint | None = None

    @property
    def layers(self) -> Mapping[str, TargetLayer]:
        """The target layers of all adapters so far, by module path."""
        with self._lock:
            return dict(self._layers)

    def require_unchanged(self, experts: Iterable[str] | None = None, *, closely: bool = False) -> None:
        """Raises CompositionError when the model has another module in the place of a target layer so far, or other weights
        than those that one of these experts (None: of all) depends on; `closely` looks at values too."""
        self._paths.require_unchanged()
        self._weights.require_unchanged(experts, closely=closely)

    def pool(self, pool: ExpertPool) -> ExpertPool:
        """The pool's experts as `adapter` gives them, now, or for a lazy pool when each is opened."""
        if pool.lazy:
            return ExpertPool(OnDemand(pool.names, lambda name: self.adapter(name, pool.adapters[name])))
        return ExpertPool({name: self.adapter(name, adapter) for name, adapter in pool.adapters.items()})

    def adapter(self, name: str, adapter: Adapter) -> Adapter:
        """The adapter with all that depends on the base layers resolved (DoRA's magnitude, a trained bias).

        Raises BaseModelMismatch, LayerMismatch or AdapterUnsupported, naming the expert, where it does not fit;
        AlreadyActive where the base's own weights are needed and a fused mixture is in their place.
        """
        require_no_heads(name, adapter)
        with self._lock:
            self._require_base(name, adapter)
            if id(adapter.form) not in self._forms:
                found = {layer: target_layer(self._modules, layer, part, name) for layer, part in adapter.layers.items()}
                new = {layer: found[layer] for layer in found if layer not in self._layers}
                _require_own_weights(new)
                self.limits.add(new)
                self._offloaded |= {layer: target for layer, target in new.items() if target.offloaded}
                self._paths.add(new)
                self._layers |= found
                self._forms[id(adapter.form)] = adapter.form
            layers = self._layers
        require_values(name, adapter, self._offloaded)
        unbound = [layer for layer, _, num_inputs, *_, is_bound in adapter.form if not is_bound or not num_inputs]
        if not unbound:
            return adapter
        _require_own_weights({layer: layers[layer] for layer in unbound})
        # first, since it refuses weights that have no values to compare
        resolved = bound(adapter, layers)
        self._weights.add(name, {layer: adapter.layers[layer] for layer in unbound}, layers)
        return replace(adapter, layers=resolved)

    def _require_base(self, name: str, adapter: Adapter) -> None:
        its = adapter.fingerprint
        if its is None or its == self._same_base:
            return
        if self._base is None:
            self._base = fingerprint(self._model)
        if why := its.differs(self._base):
            raise BaseModelMismatch(
                f"expert {name!r} was made for another base model ({adapter.base_model!r}) than this one: {why}; "
                "load that model, or leave the expert out"
            )
        self._same_base = its


def _require_own_weights(layers: Mapping[str, TargetLayer]) -> None:
    for name, layer in layers.items():
        if fuse.is_fused(layer.module):
            raise AlreadyActive(f"layer {name!r} holds the weights of a fused mixture, not the base's: leave fused() first")
