"""The plans of the last mixtures, with what was made of them for the layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from loraweave.composer.mixing.plan import Plan, make_plan
from loraweave.composer.mixing.workspace import Workspace
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Router

NUM_KEPT = 4
KEPT_BYTES = 2**30
# of weights with more elements, comparing takes longer than making them anew
LARGEST_KEPT = 2**16


class KeptPlans:
    """Makes plans, and keeps the last few of at most `max_bytes` together; as much memory is kept to be used again."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._workspace = Workspace(max_bytes)
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()

    def plan(self, weights: MixtureWeights | Router, names: tuple[str, ...]) -> Plan:
        """The plan for these weights over a pool of these names; the one that was made before, where it is kept."""
        key = _identity(weights)
        if key is None:
            return make_plan(weights, names, self._workspace)
        plan = self._plans.pop(key, None) or make_plan(weights, names, self._workspace)
        total = plan.num_bytes + sum(kept.num_bytes for kept in self._plans.values())
        while self._plans and (len(self._plans) >= NUM_KEPT or total > self._max_bytes):
            total -= self._plans.popitem(last=False)[1].num_bytes
        self._plans[key] = plan
        return plan

    def clear(self) -> None:
        """Keeps none any longer; those in use stay until their activations end."""
        self._plans.clear()


def _identity(weights: MixtureWeights | Router) -> Hashable | None:
    """What tells weights that are known from others; None for routers, and for what learns or is large."""
    if not isinstance(weights, MixtureWeights) or weights.values_BTLE.requires_grad:
        return None
    values = weights.values_BTLE
    if values.numel() > LARGEST_KEPT or values.device.type != "cpu":
        return None
    return weights.experts, weights.layers, tuple(values.shape), values.dtype, tuple(values.flatten().tolist())
