"""LoraHub's published search (Huang et al. 2023, arXiv 2307.13269, algorithm.py): 40 evaluations of nevergrad's NGOpt.

NGOpt is not an algorithm but a choice among many by dimensions and budget: for 20 adapters and 40 evaluations nevergrad
1.0.12 takes COBYLA, where the paper names CMA-ES. The recipe's other part is that the 20 adapters are drawn at random.
"""

import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loraweave import MixtureWeights, PackageMissing, SearchFailed, WeightingError
from loraweave.extend.routing import Solver


@dataclass(eq=False, kw_only=True)
class LorahubOriginal(Solver):
    """A search for one candidate after the other, from the base model, with the draws of the authors' code for the seed.

    It is for the loss as they coded it, the objective "lorahub_original", and for A and B summed apart. The arguments are
    `Solver`'s, with the published values as defaults. Raises PackageMissing without nevergrad, and SearchFailed where NGOpt
    itself fails.
    """

    loss = "lorahub_original"
    merge_method = "factor_sum"
    # the paper's
    l1 = 0.05

    # the base model, as published
    start: Mapping[str, float] | MixtureWeights | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._worst = -math.inf
        self._candidate: Any = None
        self._optimizer = self._ngopt()

    def _require_options(self) -> None:
        if self.seed >= 2**32:
            raise WeightingError(f"seed is {self.seed}, but the authors' generator takes seeds below 2**32")
        if self.budget is None and self.seconds is not None:
            raise WeightingError(
                f"NGOpt chooses an algorithm by the number of evaluations, but there are only {self.seconds} seconds; "
                "give a budget too"
            )

    def _propose(self) -> list[np.ndarray]:
        if self._candidate is None:
            self._candidate = self._guard(self._optimizer.ask)
        return [np.array(self._candidate.value)]

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        (loss,) = losses
        if math.isfinite(loss):
            self._worst = max(self._worst, loss)
        # nevergrad has no failed candidates: one counts as slightly worse than the worst
        told = loss if math.isfinite(loss) else 1.0 + (self._worst if math.isfinite(self._worst) else 0.0)
        self._candidate = self._guard(lambda: self._next(told))

    def _next(self, loss: float) -> Any:
        """Tell nevergrad the candidate's loss and return the next candidate, or None when the budget is spent.

        Telling and asking are one call, so that no thread of nevergrad's is left running.
        """
        self._optimizer.tell(self._candidate, loss)
        return self._optimizer.ask() if self._left() else None

    def _ngopt(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import nevergrad
        except ImportError as error:
            raise PackageMissing("the original LoraHub searches with nevergrad: pip install 'loraweave[search]'") from error
        kept = np.random.get_state()
        try:
            space = nevergrad.p.Array(init=self.first, lower=self.space.low, upper=self.space.high)
        finally:
            # making an array takes a number from numpy's global generator
            np.random.set_state(kept)
        # the number that numpy's generator gives after the authors' numpy.random.seed(seed)
        first = np.random.RandomState(self.seed).randint(2**32, dtype=np.uint32)
        space.random_state = np.random.RandomState(first)
        return nevergrad.optimizers.NGOpt(parametrization=space, budget=self.budget)

    def _guard(self, call: Callable[[], Any]) -> Any:
        """Return the result of `call`, run in a daemon thread. Raises SearchFailed if it fails."""
        results: list[Any] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                results.append(call())
            except Exception as error:
                errors.append(error)

        # nevergrad runs scipy's searches in threads that wait for losses. They inherit being a daemon from this one, without
        # which a search that was left early would keep the interpreter from ending
        thread = threading.Thread(target=run, daemon=True)
        with warnings.catch_warnings():
            # nevergrad warns about the losses and its own choices
            warnings.simplefilter("ignore")
            thread.start()
            thread.join()
        for error in errors:
            raise SearchFailed(
                f"nevergrad's NGOpt failed for {self.space.size} weights and {self.budget} evaluations after {self.spent} "
                f"({type(error).__name__}: {error}); take another budget, or method 'lorahub'"
            ) from error
        return results[0]
