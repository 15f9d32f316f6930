"""LoraHub: one weight per adapter, searched without gradients on a few examples (Huang et al. 2023, arXiv 2307.13269).

The search is CMA-ES, from the `cma` package. Its candidates are task-scope weights inside a box; what they mean (a mixture
of deltas, or of the factors apart) is the objective's matter, and so is the paper's L1 term, 0.05 * mean|w|.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraweave.errors import SearchFailed, WeightingError
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.objective import Objective

logger = logging.getLogger(__name__)

BOUND = 1.5
# at 40 evaluations in 20 dimensions a step of 0.5 hardly improves; 0.2 halves the loss
SIGMA = 0.2
POPULATION = 8
# generations in which no candidate can be scored, after which the search gives up
MAX_FAILED_GENERATIONS = 2


@dataclass(frozen=True)
class SearchResult:
    """The best candidate, its loss, and the losses of all candidates in the order they were asked for."""

    weights: dict[str, float]
    loss: float
    losses: tuple[float, ...] = field(repr=False)

    @property
    def evaluations(self) -> int:
        return len(self.losses)


class Lorahub:
    """Asks for candidates and is told their losses, until exactly `budget` candidates have been evaluated.

    `experts` are the names the weights belong to; `start` is the first candidate and the centre of the first generation
    (zeros by default, which is the base model). Weights stay within [-bound, bound]. `sigma` is the first step size.
    The same arguments and losses give the same candidates, bit for bit; numpy's global generator is left alone.
    Raises WeightingError for settings that cannot be used, SearchFailed when no candidate can be scored.
    """

    def __init__(
        self,
        experts: Sequence[str],
        *,
        budget: int = 40,
        seed: int = 0,
        start: Mapping[str, float] | None = None,
        bound: float = BOUND,
        sigma: float = SIGMA,
        population: int | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.budget = budget
        self.seed = seed
        self.bound = bound
        self.sigma = sigma
        self.population = POPULATION if population is None else population
        self.start = np.array([(start or {}).get(name, 0.0) for name in self.experts])
        self._check(start or {})
        self._losses: list[float] = []
        self._candidates: list[np.ndarray] = []
        self._asked: list[np.ndarray] = []
        self._failed_generations = 0
        self._strategy: Any = None

    def ask(self) -> list[MixtureWeights]:
        """The next candidates: first the start alone, then generations; the last one is cut to the budget."""
        if not self._asked:
            left = self.budget - len(self._losses)
            self._asked = ([self.start] if not self._losses else self._evolution().ask())[:left]
        return [self._mixture(candidate) for candidate in self._asked]

    def tell(self, losses: Sequence[float]) -> None:
        """The losses of the candidates asked for, in their order."""
        if len(losses) != len(self._asked):
            raise WeightingError(f"{len(losses)} losses were told for {len(self._asked)} candidates")
        finite = [float(loss) if math.isfinite(loss) else math.inf for loss in losses]
        first = not self._losses
        asked, self._asked = self._asked, []
        self._losses.extend(finite)
        self._candidates.extend(asked)
        if first:
            return
        scored = [loss for loss in finite if math.isfinite(loss)]
        self._failed_generations = 0 if scored else self._failed_generations + 1
        if self._failed_generations >= MAX_FAILED_GENERATIONS:
            raise SearchFailed(
                f"no candidate of the last {MAX_FAILED_GENERATIONS} generations could be scored (NaN or infinite loss); "
                f"{len(self._losses)} of {self.budget} evaluations were made. Look at the objective or at damaged adapters"
            )
        if scored and len(asked) == self._evolution().popsize:
            # cma accepts infinities silently and drifts: a failed candidate counts as slightly worse than the worst
            worst = max(scored) + 1.0
            self._evolution().tell(asked, [loss if math.isfinite(loss) else worst for loss in finite])

    def stop(self) -> bool:
        """Whether the budget is used up."""
        return len(self._losses) >= self.budget

    def result(self) -> SearchResult:
        """The best candidate so far; the earlier one when losses are equal. SearchFailed when none could be scored."""
        if not any(math.isfinite(loss) for loss in self._losses):
            raise SearchFailed(f"none of {len(self._losses)} candidates could be scored (NaN or infinite loss)")
        best = int(np.argmin(self._losses))
        weights = {name: float(value) for name, value in zip(self.experts, self._candidates[best], strict=True)}
        return SearchResult(weights, self._losses[best], tuple(self._losses))

    def solve(
        self,
        objective: Objective,
        *,
        checkpoint: str | Path | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> SearchResult:
        """Runs the search to its end and returns the best candidate.

        With `checkpoint`, a JSON file, every told loss is kept; the same search resumed from it asks for the same
        candidates and comes to the same result. `on_progress` is called with the number of evaluations just made.
        """
        log = None if checkpoint is None else _LossLog(Path(checkpoint), self._settings())
        known = log.losses if log else []
        while not self.stop():
            candidates = self.ask()
            told = known[len(self._losses) : len(self._losses) + len(candidates)]
            losses = told if len(told) == len(candidates) else [float(loss) for loss in objective(candidates)]
            self.tell(losses)
            if log:
                log.write(self._losses)
            if on_progress:
                on_progress(len(candidates))
        return self.result()

    def _evolution(self) -> Any:
        if self._strategy is None:
            # cma takes a second to import and the catalogue should not wait for it
            with warnings.catch_warnings():
                # it warns where matplotlib, which only its own plots need, is missing
                warnings.filterwarnings("ignore", message="Could not import matplotlib")
                import cma

            generator = np.random.default_rng(self.seed)
            options = {
                "bounds": [-self.bound, self.bound],
                "popsize": self.population,
                "verbose": -9,
                # a seed would reset numpy's global generator: NaN leaves it alone, and the numbers come from our own
                "seed": math.nan,
                "randn": lambda *shape: generator.standard_normal(shape),
            }
            self._strategy = cma.CMAEvolutionStrategy(self.start, self.sigma, options)
        return self._strategy

    def _mixture(self, candidate: np.ndarray) -> MixtureWeights:
        values = torch.tensor(np.asarray(candidate), dtype=torch.float32)
        return MixtureWeights(values[None, None, None, :], self.experts)

    def _settings(self) -> dict[str, Any]:
        return {
            "experts": list(self.experts),
            "budget": self.budget,
            "seed": self.seed,
            "start": self.start.tolist(),
            "bound": self.bound,
            "sigma": self.sigma,
            "population": self.population,
        }

    def _check(self, start: Mapping[str, float]) -> None:
        if not self.experts:
            raise WeightingError("a search needs at least one expert")
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1:
            raise WeightingError(f"budget is {self.budget!r} evaluations; it must be a whole number of at least 1")
        if not self.bound > 0 or not math.isfinite(self.bound):
            raise WeightingError(f"bound is {self.bound!r}; weights lie in [-bound, bound], so it must be above 0")
        if not self.sigma > 0 or not math.isfinite(self.sigma):
            raise WeightingError(f"sigma is {self.sigma!r}; the first step size must be above 0")
        if self.population < 2:
            raise WeightingError(f"population is {self.population!r}; a generation has at least 2 candidates")
        for name, value in start.items():
            if name not in self.experts:
                raise WeightingError(f"start has a weight for {name!r}, which is none of the experts")
            if not abs(value) <= self.bound:
                raise WeightingError(f"start gives {name!r} the weight {value}, outside [-{self.bound}, {self.bound}]")


class _LossLog:
    """The losses told so far, in one JSON file that is replaced whole."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.losses: list[float] = []
        if path.is_file():
            try:
                stored = json.loads(path.read_text())
                known, losses = stored["settings"], [math.inf if loss is None else float(loss) for loss in stored["losses"]]
            except (ValueError, TypeError, KeyError) as error:
                raise WeightingError(f"the checkpoint {path} is damaged ({error}); delete it to start again") from error
            if known != settings:
                raise WeightingError(f"the checkpoint {path} belongs to a search with other settings; name another file")
            self.losses = losses

    def write(self, losses: Sequence[float]) -> None:
        content = {"settings": self.settings, "losses": [loss if math.isfinite(loss) else None for loss in losses]}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content))
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            logger.warning("the search goes on without its checkpoint %s: %s", self.path, error)
