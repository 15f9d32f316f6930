"""A thousand adapters in the memory of fifty: many share bases, and each keeps only its own small middle.

    JointPool.fit(adapters)   clusters of like adapters; for each cluster and layer U, V (shared_bases.py)
    pool.errors               {name: |D - U M V| / |D| over all its layers}
    pool.including(adapter)   a pool with one more adapter, in the same bases
    pool.activate(model, [..]) live: x V^T once for all rows, M for each row, U^T once; no adapter is made
    pool.adapter(name)        its approximation U M V as a plain adapter, for everything else

Below about a hundred adapters the bases take more than they save: `pool.report` says so, and by how much.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from loraweave import (
    Adapter,
    AdapterCorrupt,
    AdapterUnsupported,
    CompositionError,
    ExpertPool,
    Factors,
    Fingerprint,
    ScopeError,
    WeightingError,
    base_key,
)
from loraweave.extend import (
    TargetLayer,
    algebra,
    is_number,
    replacing,
    require_replaceable,
    require_whole,
    tracked,
    unknown_expert,
)
from loraweave.extend.formats import json_text, read_json, read_tensors, require_finite
from loraweave.extend.live import claimed
from loraweave.extend.models import by_row, require_same_base, target_layer
from loraweave.extensions.transfer.shared_bases import Basis, Middle, as_matrix, project, squared_error
from loraweave.extensions.transfer.shared_bases import fit as fit_bases

logger = logging.getLogger(__name__)

FILE, BASES, MIDDLES, FORMAT = "joint.json", "bases.safetensors", "middles.safetensors", 1
# the side S of the S x S sketch of a layer's update, by which adapters are clustered
SKETCH = 8


@dataclass(frozen=True, eq=False)
class Member:
    """One adapter of a joint pool: its cluster, M of each layer's U M V (`middles`), error, and former number of values."""

    cluster: int
    middles: Mapping[str, Tensor]
    error: float
    num_values: int


@dataclass(frozen=True)
class JointReport:
    """A summary of a joint pool: `share` is stored numbers over the adapters' own; errors are relative Frobenius norms."""

    num_adapters: int
    share: float
    mean_error: float
    largest_error: float

    @property
    def pays(self) -> bool:
        """True if the pool saves memory: at least a hundred adapters, and less than half of their values kept."""
        return self.num_adapters >= 100 and self.share < 0.5

    def __str__(self) -> str:
        figures = (
            f"{self.share:.1%} of the values, errors {self.mean_error:.3f} in the mean and {self.largest_error:.3f} at most"
        )
        if self.pays:
            return f"{self.num_adapters} adapters in {figures}"
        return f"{self.num_adapters} adapters in {figures}: this does not pay below about 100, store them as they are"


@dataclass(frozen=True, eq=False)
class JointPool:
    """Adapters of one base, each near U M V of bases U and V that many share. Immutable: `including` returns a new pool."""

    base_model: str
    fingerprint: Fingerprint | None
    middle: Middle
    clusters: tuple[Mapping[str, Basis], ...]
    members: Mapping[str, Member]

    @classmethod
    def fit(
        cls,
        adapters: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
        *,
        rank: int = 16,
        clusters: int = 1,
        middle: Middle = "full",
        seed: int = 0,
        progress: bool = True,
    ) -> JointPool:
        """Fit bases of `rank` for each of `clusters` groups of adapters, found by k-means over sketches of their updates.

        Plain LoRA on linear layers only, all on the same layers. Raises AdapterUnsupported, naming the adapter, for anything
        else, WeightingError for settings out of range, and what making an ExpertPool of them raises.
        """
        pool = ExpertPool.of(adapters)
        require_whole("rank", rank, 1, WeightingError)
        require_whole("clusters", clusters, 1, WeightingError)
        if clusters > len(pool.names):
            raise WeightingError(f"clusters={clusters}, and there are {len(pool.names)} adapters: take at most as many")
        if middle not in get_args(Middle):
            raise WeightingError(f"middle={middle!r} is not one of {', '.join(get_args(Middle))}")
        first = pool[pool.names[0]]
        sizes = _sizes(first)
        for name in pool.names:
            _require_plain(name, pool[name], sizes)
            require_same_base(f"adapter {name!r}", pool[name].base, first.base)
        groups = _groups(pool, clusters, seed)

        def jobs() -> Iterator[tuple[list[Adapter], str]]:
            for names in groups:
                # a lazy pool opens each adapter once
                members = [pool[name] for name in names]
                yield from ((members, layer) for layer in first.layers)

        size = len(first.layers)
        fitted = [
            fit_bases([adapter.layers[layer] for adapter in members], rank, middle, seed)
            for members, layer in tracked(jobs(), "shared bases", total=len(groups) * size, shown=progress)
        ]
        bases = tuple(dict(zip(first.layers, fitted[at : at + size], strict=True)) for at in range(0, len(fitted), size))
        made = cls(first.base_model, first.fingerprint, middle, bases, {})
        cluster_of = {name: number for number, names in enumerate(groups) for name in names}
        made = replace(made, members={name: made._member(pool[name], [cluster_of[name]]) for name in pool.names})
        if not made.report.pays:
            logger.warning("%s", made.report)
        return made

    def including(self, adapter: Adapter, *, max_error: float = 1.0, name: str | None = None) -> JointPool:
        """Return the pool with one more adapter, in the cluster whose bases fit it best, and with all else unchanged.

        Raises WeightingError for a name that is taken and for an error above `max_error`, AdapterUnsupported as `fit`,
        BaseModelMismatch for an adapter of another base.
        """
        name = name or adapter.name
        if name in self.members:
            raise WeightingError(f"the pool has an adapter {name!r} already: give another name")
        sizes = {layer: (basis.u_OR.shape[0], basis.v_RI.shape[1]) for layer, basis in self.clusters[0].items()}
        _require_plain(name, adapter, sizes)
        require_same_base(f"adapter {name!r}", adapter.base, replace(adapter.base, **self._base))
        member = self._member(adapter, range(len(self.clusters)))
        if not member.error <= max_error:
            raise WeightingError(
                f"in this pool's bases adapter {name!r} would have an error of {member.error:.3f}, above {max_error:g}: "
                "keep it as it is, or fit a pool with it among the others"
            )
        return replace(self, members={**self.members, name: member})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.members)

    @property
    def errors(self) -> dict[str, float]:
        """The mapping {name: norm of the adapter's approximation error over the norm of its update}, over all layers."""
        return {name: member.error for name, member in self.members.items()}

    @property
    def report(self) -> JointReport:
        shared = sum(basis.u_OR.numel() + basis.v_RI.numel() for bases in self.clusters for basis in bases.values())
        alone = sum(middle.numel() for member in self.members.values() for middle in member.middles.values())
        errors = list(self.errors.values())
        share = (shared + alone) / sum(member.num_values for member in self.members.values())
        return JointReport(len(errors), share, sum(errors) / len(errors), max(errors))

    def adapter(self, name: str) -> Adapter:
        """Return the approximation of an adapter as a plain one: b = U M, a = V. Raises UnknownExpert without it."""
        member = self._known(name)
        bases = self.clusters[member.cluster]
        layers = {
            layer: Factors(bases[layer].v_RI, bases[layer].u_OR @ as_matrix(middle))
            for layer, middle in member.middles.items()
        }
        card = {"joint": {"error": member.error}}
        return Adapter(name, self.base_model, layers, self.fingerprint, card)

    def pool(self) -> ExpertPool:
        """Return the approximated adapters as a lazy pool, which makes each adapter when it is used."""
        return ExpertPool.on_demand(self.names, self.adapter)

    @contextmanager
    def activate(
        self, model: nn.Module, mixture: Mapping[str, float] | Sequence[Mapping[str, float] | None]
    ) -> Iterator[None]:
        """Mix adapters live for the length of the block, for calls in any thread: y = W x + U (sum of w M) (V x).

        `mixture` is {name: weight} for all rows of a batch, or a list with one mapping for each row, None for the base
        alone. In a batch of k times as many rows as the list, each entry counts for k consecutive rows. Raises
        UnknownExpert, WeightingError for weights that are not finite, LayerMismatch and BaseModelMismatch for another model,
        AlreadyActive where another mixture is active, and ScopeError in a call with another number of rows.
        """
        rows = [mixture] if isinstance(mixture, Mapping) else [row or {} for row in mixture]
        if not rows or not all(is_number(weight) for row in rows for weight in row.values()):
            raise WeightingError("a mixture has a weight, which is a finite number, for each name, and at least one row")
        used = sorted({self._known(name).cluster for row in rows for name in row})
        base = base_key(model)
        require_same_base("the joint pool", replace(base, **self._base), base)
        modules = dict(model.named_modules())
        layers = {
            name: target_layer(modules, name, Factors(basis.v_RI, basis.u_OR), "of the joint pool")
            for name, basis in self.clusters[0].items()
        }
        hooks = {name: self._hook(name, layer, rows, used) for name, layer in layers.items() if used}
        with claimed([model, *(layer.module for layer in layers.values())]), ExitStack() as stack:
            for name, hook in hooks.items():
                stack.callback(layers[name].module.register_forward_hook(hook).remove)
            yield

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write joint.json, a file of bases and a file of middles, and return the folder.

        A hub that already has the bases, of an earlier state of the pool, stores only new files.
        """
        target = require_replaceable(Path(folder), lambda path: path.name in (FILE, BASES, MIDDLES))
        layers = list(self.clusters[0])
        bases = {
            f"{number}.{place}.{part}": tensor.contiguous()
            for number, cluster in enumerate(self.clusters)
            for place, layer in enumerate(layers)
            for part, tensor in (("u", cluster[layer].u_OR), ("v", cluster[layer].v_RI))
        }
        middles = {
            f"{number}.{place}": member.middles[layer].contiguous()
            for number, member in enumerate(self.members.values())
            for place, layer in enumerate(layers)
        }
        members = [[name, member.cluster, member.error, member.num_values] for name, member in self.members.items()]
        said = {"format": FORMAT, "base_model": self.base_model, "middle": self.middle, "layers": layers, "members": members}
        said |= {"clusters": len(self.clusters), "fingerprint": self.fingerprint and self.fingerprint.to_json()}
        with replacing(target) as new:
            (new / FILE).write_text(json_text(said, "a joint pool"), encoding="utf-8")
            (new / BASES).write_bytes(save(bases))
            (new / MIDDLES).write_bytes(save(middles))
        return target

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> JointPool:
        """Read a pool that save_pretrained wrote, bit for bit.

        Raises AdapterCorrupt for damage, CompositionError for another format.
        """
        folder = Path(folder)
        said = read_json(folder, FILE)
        try:
            if said["format"] != FORMAT:
                raise CompositionError(f"{folder / FILE} has format {said['format']!r:.20}, but this version reads {FORMAT}")
            tensors = {key: tensor for key, _, tensor in read_tensors(folder, [BASES, MIDDLES])}
            for key, tensor in tensors.items():
                require_finite(tensor, str(folder), repr(key))
            layers, middle = [str(layer) for layer in said["layers"]], said["middle"]
            clusters = tuple(
                {
                    layer: Basis(tensors.pop(f"{number}.{at}.u"), tensors.pop(f"{number}.{at}.v"))
                    for at, layer in enumerate(layers)
                }
                for number in range(int(said["clusters"]))
            )
            members = {}
            for number, (name, cluster, error, num_values) in enumerate(said["members"]):
                middles = {layer: tensors.pop(f"{number}.{at}") for at, layer in enumerate(layers)}
                for layer, values in middles.items():
                    rank = clusters[cluster][layer].u_OR.shape[1]
                    wanted = (rank,) if middle == "diagonal" else (rank, rank)
                    if clusters[cluster][layer].v_RI.shape[0] != rank or tuple(values.shape) != wanted:
                        raise ValueError(f"layer {layer!r} of {name!r} has a middle of {tuple(values.shape)}, not {wanted}")
                members[str(name)] = Member(int(cluster), middles, float(error), int(num_values))
            if tensors or not members or middle not in get_args(Middle) or len(members) != len(said["members"]):
                raise ValueError("its members, middle and tensors do not fit each other")
            stored = said["fingerprint"]
            fingerprint = None if stored is None else Fingerprint.from_json(stored)
            return cls(str(said["base_model"]), fingerprint, cast(Middle, middle), clusters, members)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise AdapterCorrupt(f"{folder}: no intact joint pool ({type(error).__name__}: {error})") from error

    @property
    def _base(self) -> dict[str, Any]:
        """The fields of a `BaseKey` by which the pool knows its base."""
        return {"id": self.base_model, "revision": None, "fingerprint": self.fingerprint}

    def _known(self, name: str) -> Member:
        if name not in self.members:
            raise unknown_expert(name, self.members)
        return self.members[name]

    def _member(self, adapter: Adapter, clusters: Iterable[int]) -> Member:
        """Return the adapter's middles in the one of these clusters that fits it best."""
        members = []
        size = sum(algebra.norm(factors) ** 2 for factors in adapter.layers.values())
        for number in clusters:
            bases = self.clusters[number]
            middles = {layer: project(part, bases[layer], self.middle) for layer, part in adapter.layers.items()}
            lost = sum(squared_error(part, bases[layer], middles[layer]) for layer, part in adapter.layers.items())
            members.append(Member(number, middles, math.sqrt(lost / size) if size else 0.0, adapter.num_values))
        return min(members, key=lambda member: member.error)

    def _hook(
        self, name: str, layer: TargetLayer, rows: Sequence[Mapping[str, float]], used: Sequence[int]
    ) -> Callable[..., Tensor]:
        """Return a layer's hook, which adds ((x V^T) M^T) U^T: two large products in its dtype, the small one in fp32.

        U and V are those of the clusters in use side by side, M has each row's middles as blocks on a diagonal.
        """
        weight = layer.parameter("weight")
        device = torch.device("cpu") if weight is None else weight.device
        bases = [self.clusters[number][name] for number in used]
        starts = np.cumsum([0, *(basis.u_OR.shape[1] for basis in bases)]).tolist()
        middles_BRR = torch.zeros(len(rows), starts[-1], starts[-1])
        for row, mixed in zip(middles_BRR, rows, strict=True):
            for expert, value in mixed.items():
                member = self.members[expert]
                at = slice(*starts[used.index(member.cluster) :][:2])
                row[at, at] += value * as_matrix(member.middles[name])
        u_OR = torch.cat([basis.u_OR for basis in bases], dim=1).to(device)
        v_RI = torch.cat([basis.v_RI for basis in bases]).to(device)
        turned_BRR = middles_BRR.mT.contiguous().to(device)

        def add(module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
            nonlocal u_OR, v_RI
            x = given[0]
            if v_RI.dtype != y.dtype:
                v_RI, u_OR = v_RI.to(y.dtype), u_OR.to(y.dtype)
            hidden = functional.linear(x, v_RI)
            if len(rows) == 1:
                hidden = hidden.float() @ turned_BRR[0]
            else:
                copies, rest = divmod(x.shape[0], len(rows))
                if rest or not copies or x.ndim < 2:
                    raise ScopeError(
                        f"the mixture has {len(rows)} rows, but layer {name!r} is given {tuple(x.shape)}: "
                        "give one mixture for all rows, or as many rows as the batch"
                    )
                row_BRR = turned_BRR if copies == 1 else turned_BRR.repeat_interleave(copies, dim=0)
                hidden = (by_row(hidden).float() @ row_BRR).view(*x.shape[:-1], -1)
            return y + functional.linear(hidden.to(y.dtype), u_OR)

        return add


def _sizes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Return {layer: (number of outputs, number of inputs)}."""
    return {layer: (part.b_OR.shape[0], part.a_RI.shape[1]) for layer, part in adapter.layers.items()}


def _require_plain(name: str, adapter: Adapter, sizes: Mapping[str, tuple[int, int]]) -> None:
    if adapter.heads or adapter.invocation:
        raise AdapterUnsupported(f"adapter {name!r} has heads or invocation tokens, which no bases can share: leave it out")
    for layer, factors in adapter.layers.items():
        if not factors.is_product or factors.kind != "linear":
            raise AdapterUnsupported(
                f"adapter {name!r} is not a plain LoRA on a linear layer in {layer!r}; only such share bases: leave it out"
            )
    if other := sorted(set(_sizes(adapter).items()) ^ set(sizes.items())):
        raise AdapterUnsupported(
            f"adapter {name!r} and the others differ in layer {other[0][0]!r}: fit a pool of its like apart"
        )


def _groups(pool: ExpertPool, clusters: int, seed: int) -> list[list[str]]:
    """Return the names by cluster, in the pool's order; adapters are alike if their sketches have a large inner product."""
    if clusters == 1:
        return [list(pool.names)]
    from sklearn.cluster import KMeans

    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    sides = {
        layer: (draw(SKETCH, factors.b_OR.shape[0]), draw(factors.a_RI.shape[1], SKETCH))
        for layer, factors in pool[pool.names[0]].layers.items()
    }
    sketches = []
    for name in pool.names:
        layers = pool[name].layers
        parts = [
            ((left @ layers[layer].b_OR) @ (layers[layer].a_RI @ right)).flatten() for layer, (left, right) in sides.items()
        ]
        flat = torch.cat(parts)
        sketches.append((flat / flat.norm().clamp_min(1e-12)).numpy())
    labels = KMeans(clusters, n_init=4, random_state=seed).fit_predict(np.stack(sketches))
    groups = [
        [name for name, label in zip(pool.names, labels, strict=True) if label == number] for number in range(clusters)
    ]
    return [names for names in groups if names]
