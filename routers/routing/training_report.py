"""What a router's training looked like, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from loraweave.hub.drawing import blank_figure, count_along

# lines in one picture that can be told apart
NUM_SHOWN = 8


@dataclass
class TrainingReport:
    """Losses by step, and what the weights were like.

    `losses` are means over the target tokens of each step, or over its rows where those are of tensors, without the `terms`
    that were added, which have their own by name. `evaluations` are (steps done, loss of the rows held out). `entropy` is
    that of a token's weights in nats, a mean over real tokens and layers; `load` has (steps done, share of each expert in
    all weights), of at most 100 steps or so.
    `dead` experts had less than a hundredth of an equal share over the last 20 steps; `collapsed` is the first step after
    which one expert had more than 0.95 of all weight over 20 steps, None if there was none. `overflow` is, by step, the
    share of the experts chosen by tokens before a target which had no capacity left; empty where there is no limit. The
    router has the parameters after `kept` steps. `tokens` are those of prompts and targets that went through the model,
    without padding; a row of tensors counts as one.
    """

    experts: tuple[str, ...]
    losses: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    load: list[tuple[int, list[float]]] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    collapsed: int | None = None
    overflow: list[float] = field(default_factory=list)
    kept: int = 0
    tokens: int = 0
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises TypeError, KeyError or ValueError for data of another form."""
        pairs = {name: [(int(step), value) for step, value in data[name]] for name in ("evaluations", "load")}
        return cls(**{**data, **pairs, "experts": tuple(data["experts"])})

    def plot(self, path: str | Path) -> Path:
        """Draws the losses, the load of the experts and the entropy over the steps; the suffix names the format.

        Raises PackageMissing without matplotlib.
        """
        figure = blank_figure("a training is drawn with matplotlib", figsize=(6.0, 7.0), layout="constrained")
        above, middle, below = figure.subplots(3, 1, sharex=True)
        above.plot(range(1, len(self.losses) + 1), self.losses, color="#9db8d2", linewidth=0.8, label="each step")
        above.plot(range(1, len(self.losses) + 1), _smooth(self.losses), color="#1f4e79", label="mean of 10 steps")
        if self.evaluations:
            above.plot(*zip(*self.evaluations, strict=True), "o-", color="#c0504d", markersize=3, label="held out")
        above.set_ylabel("loss")
        above.legend(frameon=False, fontsize="small")
        self._draw_load(middle)
        below.plot(range(1, len(self.entropy) + 1), self.entropy, color="#1f4e79")
        below.set_ylabel("entropy of a token's\nweights (nats)")
        below.set_xlabel("step")
        count_along(below)
        figure.savefig(path)
        return Path(path)

    def _draw_load(self, axes: Any) -> None:
        axes.set_ylabel("load")
        if not self.load:
            return
        steps, loads = zip(*self.load, strict=True)
        largest = sorted(range(len(self.experts)), key=lambda place: -loads[-1][place])[:NUM_SHOWN]
        for place in largest:
            axes.plot(steps, [load[place] for load in loads], label=self.experts[place])
        if len(self.experts) > NUM_SHOWN:
            others = [sum(load) - sum(load[place] for place in largest) for load in loads]
            axes.plot(steps, others, color="#999999", linestyle=":", label=f"the other {len(self.experts) - NUM_SHOWN}")
        axes.legend(frameon=False, fontsize="x-small", ncols=2)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of the last ten values, fewer at the beginning."""
    return [sum(part) / len(part) for part in (values[max(0, end - 10) : end] for end in range(1, len(values) + 1))]
