"""The report of a merge, layer by layer: ranks, the error of the cut, and how far the merged adapters agree.

Their agreement is computed from their factors, without a dense update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loraweave.common.display import blank_figure
from loraweave.errors import CompositionError
from loraweave.lowrank.algebra import among, summed_by_owner
from loraweave.types import Factors

if TYPE_CHECKING:
    from loraweave.common.display import ShownTable

Array = NDArray[Any]

# the sign conflict is sampled where at most this many rows and columns cross, evenly spaced
MAX_SIDE = 128


@dataclass(frozen=True)
class LayerReport:
    """The figures of one merged layer.

    `rank_in` is the rank of the update that the method's formula gives, `rank_out` that of the stored update, and
    `relative_error` the Frobenius norm of their difference over that of the first. `norms` has |w_e D_e| for each parent, 0
    if it lacks the layer; () if the merge did not compare its parents. `cosines` are <D_i, D_j> / (|D_i| |D_j|) with the
    weights' signs, for the pairs (0, 1), (0, 2), ..., (1, 2), ... `sign_conflict` is the share, 0 to 1, of entries in which
    two parents have opposite signs, among those that are not zero in all parents; exact for layers of at most 128 x 128,
    sampled evenly above.
    """

    rank_in: int
    rank_out: int
    relative_error: float
    norms: tuple[float, ...] = ()
    cosines: tuple[float, ...] = ()
    sign_conflict: float = 0.0


def group_of(layer: str) -> str:
    """Return the last step of a layer's path that is not a number, such as q_proj; tables group layers by it."""
    return next((step for step in reversed(layer.split(".")) if not step.isdecimal()), layer)


@dataclass(frozen=True)
class MergeReport(Mapping[str, LayerReport]):
    """The figures of a merge or a mixture, a `LayerReport` by layer path; empty for an adapter that was not merged."""

    method: str = ""
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    layers: Mapping[str, LayerReport] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> LayerReport:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> MergeReport:
        """Return the report stored in an adapter's card, or an empty report if the card has none or it is damaged."""
        try:
            stored, recipe = card["report"], card["recipe"]
            parents = [(str(parent["name"]), float(parent["weight"])) for parent in recipe["parents"]]
            layers = {
                str(layer): LayerReport(
                    int(row["rank_in"]),
                    int(row["rank_out"]),
                    float(row["relative_error"]),
                    tuple(map(float, row.get("norms", ()))),
                    tuple(map(float, row.get("cosines", ()))),
                    float(row.get("sign_conflict", 0.0)),
                )
                for layer, row in stored.items()
            }
            names, weights = zip(*parents, strict=True) if parents else ((), ())
            return cls(str(recipe.get("method", "")), names, weights, layers)
        except (KeyError, TypeError, ValueError, AttributeError):
            return cls()

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each layer, to six significant digits, as the card stores them."""
        return {
            layer: dict(zip(vars(row), map(_rounded, vars(row).values()), strict=True)) for layer, row in self.layers.items()
        }

    def cosines(self) -> list[list[float]]:
        """Return the cosine of each pair of the parents' whole updates, all layers taken as one long vector.

        Raises CompositionError if the merge did not compare its parents.
        """
        num = len(self.names)
        total, squares = [[0.0] * num for _ in range(num)], [0.0] * num
        for row in self._compared():
            pairs = iter(row.cosines)
            for first in range(num):
                squares[first] += row.norms[first] ** 2
                for second in range(first + 1, num):
                    total[first][second] += next(pairs) * row.norms[first] * row.norms[second]
        cosines = [[1.0] * num for _ in range(num)]
        for first in range(num):
            for second in range(first + 1, num):
                scale = (squares[first] * squares[second]) ** 0.5
                cosines[first][second] = cosines[second][first] = total[first][second] / scale if scale else 0.0
        return cosines

    def table(self) -> ShownTable:
        """Return the report as a table, with one row for all layers of the same module name."""
        from loraweave.common.display import ShownTable

        shown = " + ".join(f"{weight:g} {name}" for name, weight in zip(self.names, self.weights, strict=True))
        table = ShownTable(title=f"{self.method}: {shown}" if self else "not a merge", title_justify="left")
        columns = ("layers", "count", "rank before", "rank", "mean error", "worst error", "mean cosine", "sign conflict")
        for column in columns:
            table.add_column(column, justify="left" if column == "layers" else "right")
        for cells in self.rows():
            table.add_row(*cells)
        return table

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of `table`, row by row."""
        groups: dict[str, list[LayerReport]] = {}
        for layer, row in self.items():
            groups.setdefault(group_of(layer), []).append(row)
        return [
            (
                name,
                str(len(group)),
                _span([row.rank_in for row in group]),
                _span([row.rank_out for row in group]),
                f"{fmean(row.relative_error for row in group):.2%}",
                f"{max(row.relative_error for row in group):.2%}",
                _mean([cosine for row in group for cosine in row.cosines]),
                f"{fmean(row.sign_conflict for row in group):.0%}" if all(row.norms for row in group) else "-",
            )
            for name, group in sorted(groups.items())
        ]

    def plot(self, path: str | Path) -> Path:
        """Draw each adapter's share of the sum of |w D| in each layer as a heat map, and return the path.

        The suffix names the format (.png, .svg, .pdf). Raises PackageMissing without matplotlib, CompositionError for an
        adapter that was not merged, or whose merge did not compare its parents.
        """
        if not self:
            raise CompositionError("this adapter was not merged, so there is nothing to plot")
        self._compared()
        layers = sorted(self, key=by_number)
        shares = [[norm / (sum(self[layer].norms) or 1.0) for norm in self[layer].norms] for layer in layers]
        # about an eighth of an inch for a layer keeps its name legible
        size = (max(5.0, 2.5 + 0.5 * len(self.names)), min(max(2.5, 1.5 + 0.14 * len(self)), 200.0))
        figure = blank_figure("plots need matplotlib", figsize=size, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0, vmax=max(map(max, shares)))
        axes.set_yticks(range(len(self)), layers, fontsize=6)
        labels = [f"{_clip(name)} ({weight:g})" for name, weight in zip(self.names, self.weights, strict=True)]
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=7)
        axes.set_title(f"{self.method}: share of each adapter in a layer's update", fontsize=8)
        figure.colorbar(image, ax=axes, label="|w D| / sum of |w D|")
        figure.savefig(path)
        return Path(path)

    def _compared(self) -> list[LayerReport]:
        """Return the layers' figures. Raises CompositionError if they lack the parents' norms and cosines."""
        if not all(row.norms for row in self.values()):
            raise CompositionError(f"this report does not compare {' and '.join(self.names)}: merge with interference=True")
        return list(self.values())


def by_number(path: str) -> list[tuple[int, str]]:
    """Return a sort key for layer paths that puts block 2 before block 10."""
    return [(len(part) if part.isdecimal() else 0, part) for part in path.split(".")]


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" if values else "-"


def _clip(name: str) -> str:
    # a dollar sign would begin a formula
    shown = name if len(name) <= 24 else f"{name[:23]}…"
    return shown.replace("$", r"\$")


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_rounded, value))
    return float(f"{value:.6g}") if isinstance(value, float) else value


def interference(
    experts: Sequence[Factors | None],
    weights: Sequence[float],
    inner_EE: Array | None = None,
    *,
    ranks: tuple[int, int] = (0, 0),
    relative_error: float = 0.0,
) -> LayerReport:
    """Return the report of how the experts' weighted updates of one layer agree; for DoRA and (IA)3, only b a counts.

    `inner_EE` has <w_i D_i, w_j D_j> of the experts that have the layer; if it is None, it is computed in fp32.
    `ranks` (before and after the cut) and `relative_error` are passed on to the report.
    """
    places, a_ERI, b_EOR, values = [], [], [], []
    for place, (factors, weight) in enumerate(zip(experts, weights, strict=True)):
        if factors is not None:
            places.append(place)
            a_ERI.append(factors.a_RI.detach().cpu().float().numpy())
            b_EOR.append(factors.b_OR.detach().cpu().float().numpy())
            values.append(float(weight))
    if not places:
        inner_EE = np.zeros((0, 0))
    elif inner_EE is None:
        # two symmetric S x S products of the stacked factors
        a_SI, b_OS, w_E = np.concatenate(a_ERI), np.concatenate(b_EOR, axis=1), np.array(values)
        product_SS = (a_SI @ a_SI.T).astype(np.float64) * (b_OS.T @ b_OS)
        inner_EE = summed_by_owner(product_SS, list(map(len, a_ERI))) * w_E * w_E[:, None]
    if len(places) < len(experts):
        inner_EE = among(inner_EE, places, len(experts))
    norms_E = np.sqrt(np.maximum(inner_EE.diagonal(), 0.0))
    scale_EE = norms_E * norms_E[:, None]
    cosines_EE = np.divide(inner_EE, scale_EE, out=np.zeros_like(scale_EE), where=scale_EE > 0).clip(-1.0, 1.0)
    cosines = tuple(cosines_EE[np.triu_indices(len(experts), 1)].tolist())
    conflict = _sign_conflict(a_ERI, b_EOR, values) if len(values) > 1 else 0.0
    return LayerReport(*ranks, relative_error, tuple(norms_E.tolist()), cosines, conflict)


def _sign_conflict(a_ERI: Sequence[Array], b_EOR: Sequence[Array], weights: Sequence[float]) -> float:
    # every n-th row and column, at most MAX_SIDE of each
    step_O, step_I = -(-len(b_EOR[0]) // MAX_SIDE), -(-a_ERI[0].shape[1] // MAX_SIDE)
    low: Any = 0.0
    high: Any = 0.0
    for a_RI, b_OR, weight in zip(a_ERI, b_EOR, weights, strict=True):
        part = (b_OR[step_O // 2 :: step_O] * weight).astype(np.float32) @ a_RI[:, step_I // 2 :: step_I]
        low, high = np.minimum(low, part), np.maximum(high, part)
    below, above = low < 0, high > 0
    touched = int(np.count_nonzero(below | above))
    return int(np.count_nonzero(below & above)) / touched if touched else 0.0
