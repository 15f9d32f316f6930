"""The check that adapters fit the model, once for each form (layers and shapes), and the watch over the model's changes.

A value resolved against the base (DoRA's magnitude, a trained bias) holds only as long as the model has the same modules at
the same paths (`ModulePaths`) and the weights that were read have the same values (`BoundWeights`).

Trained heads are updates too: a head that replaces a weight W by W' adds (W' - W) x, in factors of rank min(O, I). So heads
mix as every other update does: with weight 1 a head alone acts as trained, each row of a batch may have its own head, and
several heads add up their differences to the base's. A head takes the memory of one more matrix of W's shape, fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraweave.common.process import lock_of
from loraweave.composer.live.resolve import LiveLimits
from loraweave.composer.model.kinds import embedding, linear
from loraweave.composer.model.layers import OVERWRITTEN, TargetLayer, bind, require_values, row_sums, target_layer
from loraweave.errors import AdapterUnsupported, AlreadyActive, BaseModelMismatch, CompositionError, LayerMismatch
from loraweave.hub.adapter import Adapter, Form
from loraweave.hub.base import Parts, base_key, fingerprint, require_model, require_same_base, warn_unverified
from loraweave.hub.pool import ExpertPool, OnDemand, require_no_heads
from loraweave.types import BaseKey, Factors


class Fitting:
    """A check that adapters fit one model, as the model was when this object was made."""

    def __init__(self, model: nn.Module) -> None:
        require_model(model)
        self._model = model
        self._parts = model if isinstance(model, Parts) else None
        self._modules = dict(model.named_modules())
        self._lock = lock_of(self)
        self._paths = ModulePaths(model)
        self._weights = BoundWeights()
        self._layers: dict[str, TargetLayer] = {}
        self._offloaded: dict[str, TargetLayer] = {}
        self.limits = LiveLimits(model)
        # the forms checked so far by id, kept alive so that no other form gets the same id
        self._forms: dict[int, Form] = {}
        self._same: set[BaseKey] = set()
        self._said: set[BaseKey] = set()

    @cached_property
    def _key(self) -> BaseKey:
        return base_key(self._model)

    @cached_property
    def _unread_key(self) -> BaseKey:
        return base_key(self._model, weights=False)

    @property
    def layers(self) -> Mapping[str, TargetLayer]:
        """The target layers of all adapters so far, by module path."""
        with self._lock:
            return dict(self._layers)

    def require_unchanged(self, experts: Iterable[str] | None = None, *, closely: bool = False) -> None:
        """Raise CompositionError if a target layer's module was replaced, or weights that experts depend on have changed.

        Only weights that one of `experts` (None: any) depends on are checked; `closely` compares their values, too.
        """
        if self._parts is not None:
            self._parts.require_same_parts()
        self._paths.require_unchanged()
        if self._weights.of:
            self._weights.require_unchanged(experts, closely=closely)

    def pool(self, pool: ExpertPool) -> ExpertPool:
        """Return the pool with every adapter resolved by `adapter`; a lazy pool's are resolved when they are opened."""
        if pool.lazy:
            return _each(pool, self._fit_lazily)
        fitted = _each(pool, self._fit)
        self._warn(pool.adapters)
        return fitted

    def placed(self, pool: ExpertPool) -> ExpertPool:
        """Return the pool with the layer paths of a pipeline; the same pool if the model is not a pipeline."""
        return pool if self._parts is None else _each(pool, self.placed_adapter)

    def placed_adapter(self, name: str, adapter: Adapter) -> Adapter:
        """Return an adapter with its layers' paths in a pipeline, found by `Parts.paths`; for another model, unchanged.

        An adapter made for one part of the pipeline is compared with that part, and then counts as made for the pipeline.
        Raises LayerMismatch for a layer without exactly one place, BaseModelMismatch for a part with other weights.
        """
        if self._parts is None:
            return adapter
        paths = self._parts.paths(adapter.layers, f"expert {name!r}")
        layers = {paths[layer]: factors for layer, factors in adapter.layers.items()}
        parts = {path.partition(".")[0] for path in layers}
        part = self._parts.get_submodule(parts.pop()) if len(parts) == 1 else None
        if part is None or adapter.fingerprint is None or adapter.fingerprint.shapes != fingerprint(part).shapes:
            return adapter if tuple(layers) == tuple(adapter.layers) else replace(adapter, layers=layers)
        require_same_base(f"expert {name!r}", adapter.base, base_key(part))
        return replace(adapter, layers=layers, base_model=self._parts.name_or_path, fingerprint=self._key.fingerprint)

    def accepted(self, pool: ExpertPool) -> ExpertPool:
        """Return the pool, checked; if some experts fit by names and shapes alone, all get the model's fingerprint.

        Experts with one fingerprint may be merged, whatever base they name; a fingerprint that samples weights stays.
        """
        if pool.lazy:
            return _each(pool, lambda name, adapter: self._mark(self._check(name, adapter)))
        if all(self._own_key(adapter.base).proves(adapter.base) for adapter in pool.adapters.values()):
            return pool
        self.pool(pool)
        return ExpertPool({name: self._mark(adapter) for name, adapter in pool.adapters.items()})

    def _check(self, name: str, adapter: Adapter) -> Adapter:
        self._fit_lazily(name, adapter)
        return adapter

    def _mark(self, adapter: Adapter) -> Adapter:
        has_weights = adapter.fingerprint is not None and adapter.fingerprint.samples
        return adapter if has_weights else replace(adapter, fingerprint=self._key.fingerprint)

    def adapter(self, name: str, adapter: Adapter) -> Adapter:
        """Return the adapter with all that depends on the base resolved (DoRA's magnitude, a trained bias, trained heads).

        Raises BaseModelMismatch, LayerMismatch or AdapterUnsupported, naming the expert, if it does not fit; AlreadyActive
        if it needs the base's own weights while a fused mixture has replaced them. Warns of one whose base model is known by
        names and shapes alone.
        """
        fitted = self._fit(name, adapter)
        self._warn({name: adapter})
        return fitted

    def forget(self, name: str) -> None:
        """Drop the noted base weights of an expert that has left the pool."""
        self._weights.forget(name)

    def _fit_lazily(self, name: str, adapter: Adapter) -> Adapter:
        """Return the adapter of a lazy pool, fitted; the first of each base model warns for all of them."""
        require_no_heads(name, adapter)
        fitted = self._fit(name, adapter)
        if adapter.base not in self._said:
            self._said.add(adapter.base)
            self._warn({name: adapter})
        return fitted

    def _fit(self, name: str, adapter: Adapter) -> Adapter:
        its = adapter.base
        with self._lock:
            if its not in self._same:
                require_same_base(f"expert {name!r}", its, self._own_key(its))
                self._same.add(its)
            heads = head_layers(name, adapter, self._modules) if adapter.heads else {}
            if heads:
                adapter = replace(adapter, layers={**adapter.layers, **heads}, heads={})
            if id(adapter.form) not in self._forms:
                adapter_layers = self._find_layers(name, adapter)
                new = {layer: adapter_layers[layer] for layer in adapter_layers if layer not in self._layers}
                _require_own_weights(new)
                self.limits.add(new)
                self._offloaded |= {layer: target for layer, target in new.items() if target.offloaded}
                self._paths.add(layer.path for layer in new.values())
                self._layers |= adapter_layers
                self._forms[id(adapter.form)] = adapter.form
            layers = self._layers
        if self._offloaded:
            require_values(name, adapter, self._offloaded)
        unbound = [layer for layer, _, num_inputs, *_, is_bound in adapter.form if not is_bound or not num_inputs]
        if not unbound and not heads:
            return adapter
        _require_own_weights({layer: layers[layer] for layer in (*unbound, *heads)})
        # first, since it refuses weights that have no values to compare
        resolved = bind(adapter, layers)
        self._weights.add(name, {layer: adapter.layers[layer] for layer in (*unbound, *heads)}, layers, heads)
        return replace(adapter, layers=resolved)

    def _own_key(self, its: BaseKey) -> BaseKey:
        """Return the model's key to compare with an adapter's, `its`; weights are read only if `its` has a fingerprint."""
        return self._key if its.fingerprint else self._unread_key

    def _find_layers(self, name: str, adapter: Adapter) -> dict[str, TargetLayer]:
        """Return the layers that the adapter updates. Raises LayerMismatch, or BaseModelMismatch if it has another base."""
        try:
            return {layer: target_layer(self._modules, layer, part, name) for layer, part in adapter.layers.items()}
        except LayerMismatch as error:
            its, own_key = adapter.base, self._own_key(adapter.base)
            if not its.id or not own_key.id or own_key.proves(its):
                raise
            raise BaseModelMismatch(
                f"{error}; it was made for {its.id!r}, and this model is {own_key.id!r}: load the one that it was made for "
                "(load_base(...), --base), or leave it out"
            ) from error

    def _warn(self, adapters: Mapping[str, Adapter]) -> None:
        """Warn once for each of these adapters' base models that only names and shapes match."""
        unproven: dict[BaseKey, list[str]] = {}
        for name, adapter in adapters.items():
            if not self._own_key(its := adapter.base).proves(its):
                unproven.setdefault(its, []).append(name)
        for its, names in unproven.items():
            warn_unverified(names, its, self._unread_key, stacklevel=4)


def _each(pool: ExpertPool, change: Callable[[str, Adapter], Adapter]) -> ExpertPool:
    """Return the pool with `change(name, adapter)` for each adapter; a lazy pool's are changed when they are opened."""
    if pool.lazy:
        return ExpertPool(OnDemand(pool.names, lambda name: change(name, pool.adapters[name])))
    return ExpertPool({name: change(name, adapter) for name, adapter in pool.adapters.items()})


def misfit(modules: Mapping[str, nn.Module], name: str, adapter: Adapter) -> str:
    """Return why the adapter does not fit a model with these modules, {path: module}, as a sentence; "" if it fits."""
    try:
        for layer, factors in adapter.layers.items():
            target_layer(modules, layer, factors, name)
    except LayerMismatch as error:
        return str(error)
    return ""


def _require_own_weights(layers: Mapping[str, TargetLayer]) -> None:
    for name, layer in layers.items():
        if layer.module in OVERWRITTEN:
            raise AlreadyActive(f"layer {name!r} holds the weights of a fused mixture, not the base's: leave fused() first")


class _Steps(NamedTuple):
    """Parallel lists over the modules on paths to layers: path, the parent's {key: child}, key in the parent, module."""

    paths: list[str]
    children: list[dict[str, nn.Module | None]]
    keys: list[str]
    modules: list[nn.Module]


@dataclass(eq=False)
class ModulePaths:
    """The modules from a model down to some of its layers, as they were when the layers were added."""

    _model: nn.Module
    # one value, so that a thread that compares while another adds sees all of it or nothing
    _steps: _Steps = field(default_factory=partial(_Steps, [], [], [], []))

    def add(self, layers: Iterable[str]) -> None:
        """Note the present modules on the paths to these layers."""
        before = self._steps
        steps = _Steps(before.paths[:], before.children[:], before.keys[:], before.modules[:])
        known = set(steps.paths)
        for layer in layers:
            module, path = self._model, ""
            for part in layer.split(".") if layer else ():
                path = f"{path}.{part}" if path else part
                child = module._modules[part]
                assert child is not None
                if path not in known:
                    known.add(path)
                    steps.paths.append(path)
                    steps.children.append(module._modules)
                    steps.keys.append(part)
                    steps.modules.append(child)
                module = child
        self._steps = steps

    def require_unchanged(self) -> None:
        """Raise CompositionError, naming the first path, if a module on the way to a layer was replaced or removed."""
        steps = self._steps
        # called before every forward of a model, without a Python call for each step
        current_modules = list(map(dict.get, steps.children, steps.keys))
        if current_modules == steps.modules:
            return
        for path, now, module in zip(steps.paths, current_modules, steps.modules, strict=True):
            if now is not module:
                way_out = "make a new Composer for the model as it is now"
                if hasattr(now, "base_layer"):
                    way_out = "take peft's adapters out with its unload(), or give them to the Composer"
                raise CompositionError(
                    f"module {path!r} of the model is not the {type(module).__name__} that was there when this Composer was "
                    f"made, but {'gone' if now is None else f'another {type(now).__name__}'}: {way_out}"
                )


@dataclass(eq=False)
class BoundWeights:
    """Snapshots of the base weights and biases that experts were resolved against, to detect changes."""

    # by expert
    of: dict[str, tuple[_Seal, ...]] = field(default_factory=dict)
    _latest: dict[tuple[str, str], _Seal] = field(default_factory=dict)

    def add(
        self, expert: str, factors: Mapping[str, Factors], layers: Mapping[str, TargetLayer], heads: Container[str]
    ) -> None:
        """Take a snapshot of the base parameters that an expert's factors depend on, in place of the expert's earlier ones.

        `factors` and `layers` are by layer; `heads` are the layers whose factors are a trained head.
        """
        places = [
            (layers[name], part)
            for name, layer_factors in factors.items()
            for part, is_needed in (
                ("weight", layer_factors.magnitude_O is not None or name in heads),
                ("bias", layer_factors.base_bias_O is not None),
            )
            if is_needed
        ]
        # another mapping, since other threads may be looking at this one
        self.of = {**self.of, expert: tuple(self._seal(layer, part) for layer, part in places)}

    def forget(self, expert: str) -> None:
        """Drop an expert's snapshots."""
        self.of = {name: seals for name, seals in self.of.items() if name != expert}

    def require_unchanged(self, experts: Iterable[str] | None, *, closely: bool) -> None:
        """Raise CompositionError, naming expert and layer, if a base parameter that `experts` (None: any) need has changed.

        Writes that torch counts, and other memory, are always seen; those through `.data` or numpy only with `closely`,
        which compares one value of every row.
        """
        of = self.of
        for expert in of if experts is None else experts:
            for seal in of.get(expert, ()):
                if not seal.holds(closely=closely):
                    raise CompositionError(
                        f"the {seal.part} of layer {seal.layer.name!r} has changed since expert {expert!r}, which depends "
                        "on it (DoRA's magnitude, a trained bias or head), was resolved against it: leave every activation, "
                        "and call engine.swap(engine.pool), which takes the base as it is now"
                    )

    def _seal(self, layer: TargetLayer, part: str) -> _Seal:
        seal = self._latest.get((layer.name, part))
        if seal is None or not seal.holds(closely=True):
            seal = self._latest[layer.name, part] = _Seal(layer, part)
        return seal


class _Seal:
    """A snapshot of one parameter of a layer, or of its absence, to detect a change."""

    def __init__(self, layer: TargetLayer, part: str) -> None:
        self.layer = layer
        self.part = part
        parameter = layer.parameter(part)
        self._place = _place(parameter)
        self._sample = None if parameter is None else _sample(parameter).clone()
        self._sums = None if parameter is None else row_sums(parameter)

    def holds(self, *, closely: bool) -> bool:
        """Return True if the values are unchanged; `closely` compares a sample even if torch counted no write.

        A move to another device or dtype is not a change.
        """
        parameter = self.layer.parameter(self.part)
        place = _place(parameter)
        if place == self._place and not closely:
            return True
        if parameter is None or self._sample is None or self._sums is None:
            return place == self._place
        sample = _sample(parameter)
        if not torch.equal(sample, self._sample.to(sample)):
            return False
        if place != self._place:
            if sample.dtype == self._sample.dtype:
                # fused() writes and restores, which torch counts as two changes
                sums = row_sums(parameter)
                if not torch.equal(sums, self._sums.to(sums.device)):
                    return False
            self._place, self._sample, self._sums = place, sample.clone(), row_sums(parameter)
        return True


def _place(parameter: Tensor | None) -> tuple[Any, ...] | None:
    """Return a key of the parameter's memory and of the number of writes that torch counted; None for None."""
    if parameter is None:
        return None
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device, parameter.shape


def _sample(parameter: Tensor) -> Tensor:
    """Return one value of every row of a matrix, or all values of a vector."""
    values = parameter.detach()
    if values.ndim < 2:
        return values
    rows_OI = values.flatten(1)
    place_O = torch.arange(len(rows_OI), device=values.device)
    return rows_OI[place_O, place_O % rows_OI.shape[1]]


@torch.no_grad()
def head_layers(name: str, adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, Factors]:
    """Return the adapter's heads as factors by module path; `modules` are the base's by name, with its own weights.

    Raises LayerMismatch for a parameter that the model lacks or that has another shape, AdapterUnsupported for a head of
    another kind of module than linear and embedding, and for a module that has both a head and an update.
    """
    heads: dict[str, dict[str, Tensor]] = {}
    for parameter, tensor in adapter.heads.items():
        module, _, attribute = parameter.rpartition(".")
        heads.setdefault(module, {})[attribute] = tensor
    return {module: _as_factors(name, module, tensors, modules, adapter) for module, tensors in heads.items()}


def _as_factors(
    expert: str, path: str, own: Mapping[str, Tensor], modules: Mapping[str, nn.Module], adapter: Adapter
) -> Factors:
    statement = f"expert {expert!r} has a trained head for {path!r}"
    module: Any = modules.get(path)
    if module is None:
        raise LayerMismatch(
            f"{statement}, which the model does not have: load the model that it was trained on, or leave the head out with "
            "dataclasses.replace(adapter, heads={})"
        )
    kind = next((candidate for candidate in (linear, embedding) if candidate.shape(module) is not None), None)
    if kind is None or not own.keys() <= {"weight", "bias"}:
        what = f"{type(module).__name__} with {', '.join(sorted(own))}"
        raise AdapterUnsupported(
            f"{statement}, a {what}: only weights and biases of linear layers and embeddings are mixed. Load the adapter "
            "alone with peft after save_pretrained(), or leave the head out with dataclasses.replace(adapter, heads={})"
        )
    if path in adapter.layers:
        raise AdapterUnsupported(f"{statement}, and an update of the same module: leave one of them out")
    for attribute, tensor in own.items():
        parameter = getattr(module, attribute, None)
        if parameter is None or parameter.shape != tensor.shape:
            wanted = "none" if parameter is None else tuple(parameter.shape)
            raise LayerMismatch(f"{statement} whose {attribute} has shape {tuple(tensor.shape)}, and the model's {wanted}")
    shape = kind.shape(module)
    assert shape is not None
    bias_O = own.get("bias")
    if "weight" not in own:
        a_RI, b_OR = torch.zeros(0, shape.num_inputs), torch.zeros(shape.num_outputs, 0)
        return Factors(a_RI, b_OR, base_bias_O=bias_O, kind=kind.name)
    delta = own["weight"].float().cpu() - module.weight.detach().float().cpu()
    delta_OI = delta.T.contiguous() if shape.transposed else delta
    if shape.num_outputs <= shape.num_inputs:
        return Factors(delta_OI, torch.eye(shape.num_outputs), base_bias_O=bias_O, kind=kind.name)
    return Factors(torch.eye(shape.num_inputs), delta_OI, base_bias_O=bias_O, kind=kind.name)
