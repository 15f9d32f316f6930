"""What the weights of a training's steps are like: the load of each expert, entropy, who gets nothing and who gets all."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.routers.routing.learned_router import Step
from loraweave.routers.routing.training_report import TrainingReport

WINDOW = 20
COLLAPSED = 0.95
# of an equal share
DEAD = 0.01
# steps whose load is kept in the report
POINTS = 100


class Watch:
    """Looks at the passes of each step, and writes what it sees into the report."""

    def __init__(
        self, experts_of_layers: Iterable[Sequence[int]], report: TrainingReport, steps: int, taught: Sequence[int]
    ) -> None:
        """Each layer has some of the report's experts, by their places; `taught` are the owners of the rows."""
        self._report = report
        self._every = max(1, steps // POINTS)
        # rows of one expert alone are rightly all its own
        self._one_taught = len(set(taught)) == 1 and -1 not in taught
        present = torch.zeros(len(report.experts), dtype=torch.float64)
        for experts in experts_of_layers:
            present[list(experts)] += 1 / len(experts)
        # share_E of experts that are used alike wherever they are present
        self._equal_E = present / present.sum()
        # load_E of the last steps
        self.recent: deque[Tensor] = deque(maxlen=WINDOW)
        self._loads: list[Tensor] = []
        self._entropies: list[float] = []

    def saw(self, step: Step) -> None:
        """One pass of the running step."""
        num_experts = len(self._report.experts)
        seen = [_of_layer(step.real(w_BTE.detach()), num_experts) for w_BTE in step.weights.values()]
        if seen:
            loads, entropies = zip(*seen, strict=True)
            self._loads.append(torch.stack(loads).mean(dim=0).double().cpu())
            self._entropies.append(float(torch.stack(entropies).mean()))

    def stepped(self, number: int, *, mean: Callable[[Tensor], Tensor] = lambda seen: seen) -> str:
        """The step, the `number`th, is over: what to show of it. Warns, once, when one expert has almost all weight.

        `mean` makes the mean over processes of what this one has seen.
        """
        if not self._loads:
            return ""
        seen = mean(torch.cat([torch.stack(self._loads).mean(dim=0), torch.tensor(self._entropies).double().mean()[None]]))
        load_E, entropy = seen[:-1], float(seen[-1])
        self._loads.clear()
        self._entropies.clear()
        self.recent.append(load_E)
        report = self._report
        report.entropy.append(entropy)
        if number % self._every == 0 or number == 1:
            report.load.append((number, [round(share, 4) for share in load_E.tolist()]))
        if len(self.recent) == WINDOW:
            self._judge(number, torch.stack(list(self.recent)).mean(dim=0))
        top = int(load_E.argmax())
        dead = f"  dead {len(report.dead)}" if report.dead else ""
        return f"  entropy {entropy:.2f}  top {report.experts[top]} {float(load_E[top]):.0%}{dead}"

    def _judge(self, number: int, mean_E: Tensor) -> None:
        report = self._report
        report.dead = [
            name for name, dead in zip(report.experts, (mean_E < DEAD * self._equal_E).tolist(), strict=True) if dead
        ]
        top = int(mean_E.argmax())
        if len(mean_E) > 1 and report.collapsed is None and not self._one_taught and float(mean_E[top]) > COLLAPSED:
            report.collapsed = number
            warnings.warn(
                f"the router has collapsed: over the last {WINDOW} steps expert {report.experts[top]!r} had "
                f"{float(mean_E[top]):.0%} of all weight; a balance loss (balance=0.01) or a lower lr keeps others in use",
                stacklevel=5,
            )


def _of_layer(w_NE: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(load_E, entropy) of a layer's weights, each token's taken as shares; means over the tokens.

    A layer may have the first of the experts alone.
    """
    w_NE = functional.pad(w_NE.abs().float(), (0, num_experts - w_NE.shape[1]))
    share_NE = w_NE / w_NE.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return share_NE.mean(dim=0), torch.special.entr(share_NE).sum(dim=1).mean()
