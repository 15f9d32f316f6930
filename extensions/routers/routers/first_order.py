"""First-order search for weights: a backward pass gives the loss's slope by every weight, a few more its curvature.

The loss is taken for a quadratic function of the weights, through the slopes at the best candidate and the changes between
those told so far. The next candidate is the model's lowest point in the box and not farther than the trust radius from the
best one, which grows while the model predicts the loss and shrinks where it does not. A quadratic loss of E weights is
solved after E + 1 candidates, one without cross terms after about three.

The model is

    m(w) = g . (w - c) + 1/2 (w - c)^T H (w - c),        H = diag(d) + Q M Q^T

about the centre c with its gradient g. Each other point k says by how much the gradient changes, y_k = g_k - g, along
s_k = w_k - c: a quadratic loss has H s_k = y_k. The diagonal is the ridge regression of the y on the s, coordinate by
coordinate, towards the mean curvature h along the s_k:

    d_i = (sum_k s_ki y_ki / |s_k|^2 + r h / D) / (sum_k s_ki^2 / |s_k|^2 + r / D)

and the rest is the symmetric matrix nearest to zero that makes up what the diagonal leaves:

    min over X = X^T of  sum_k |X s_k - (y_k - d s_k)|^2 / |s_k|^2 + r |X|^2

whose rows and columns lie in the span Q of the s_k and of what is left, so that it costs little in many dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loraweave.extend import Positive, traits
from loraweave.extend.routing import Solver

RADIUS = 0.5
RIDGE = 1e-4
# a smaller step, or a smaller predicted fall of the loss, ends the search
LEAST_STEP = 1e-5
LEAST_FALL = 1e-9


@traits("ends_early", "orderless")
@dataclass(eq=False, kw_only=True)
class FirstOrder(Solver):
    """A search that tries the start, by default the base model, then the lowest point of its model, one at a time.

    `radius` is how far a weight may go in the first step; `ridge` draws the model's curvature towards the same in all
    directions. It ends before its budget where the model predicts no lower loss. The other arguments are `Solver`'s.
    """

    needs_gradients: ClassVar[bool] = True
    cost: ClassVar[int] = 2

    radius: Positive = RADIUS
    ridge: Positive = RIDGE

    def __post_init__(self) -> None:
        super().__post_init__()
        # the candidates with a finite loss: (point, loss, gradient)
        self._known: list[tuple[np.ndarray, float, np.ndarray]] = []
        self._trusted = self.radius
        self._foretold = 0.0

    @classmethod
    def begins(cls, options: Mapping[str, Any]) -> str | None:
        """Return None: the search starts at the base model, where one backward pass has the slopes of all adapters."""
        return None

    @property
    def _least(self) -> tuple[int, str]:
        return 2 * self.cost, "the start and one step, each with its gradient"

    def _propose(self) -> list[np.ndarray]:
        if not self._known:
            return [] if self._vectors else [self.first]
        best, loss, slope = self._best()
        others = [(w - best, gradient - slope) for w, _, gradient in self._known if not np.array_equal(w, best)]
        steps_KD = np.array([step for step, _ in others]).reshape(-1, len(best))
        changes_KD = np.array([change for _, change in others]).reshape(-1, len(best))
        # the largest slope alone leads to the edge of what is trusted
        curvature = float(np.abs(slope).max()) / self.radius or 1.0
        model = fit_quadratic(best, slope, steps_KD, changes_KD, curvature=curvature, ridge=self.ridge)
        low = np.maximum(best - self._trusted, self.space.low)
        high = np.minimum(best + self._trusted, self.space.high)
        lowest = model.lowest(low, high)
        self._foretold = -model.change(lowest - best)
        small = float(np.abs(lowest - best).max()) < LEAST_STEP
        return [] if small or self._foretold <= LEAST_FALL * max(abs(loss), 1e-3) else [lowest]

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        for vector, loss, gradient in zip(vectors, losses, gradients, strict=True):
            if self._known:
                best, lowest, _ = self._best()
                self._trusted = self._trust(float(np.abs(vector - best).max()), lowest - loss)
            if math.isfinite(loss):
                self._known.append((vector, loss, gradient))

    def _trust(self, length: float, fallen: float) -> float:
        """Return the next trust radius after a step of this length, by the loss's fall against the predicted one."""
        if fallen < 0.25 * self._foretold:
            return length / 4 if fallen == -math.inf else length / 2
        return 2 * self._trusted if fallen > 0.75 * self._foretold and length > 0.99 * self._trusted else self._trusted

    def _best(self) -> tuple[np.ndarray, float, np.ndarray]:
        return min(self._known, key=lambda known: known[1])


# a curvature below this share of the mean one is taken for none: the diagonal stays positive
LEAST_CURVATURE = 1e-3


@dataclass(frozen=True)
class Quadratic:
    """The model g s + s^T (diag(d) + Q M Q^T) s / 2 of the loss's change by a step s from `centre`; `slope` is g."""

    centre: np.ndarray
    slope: np.ndarray
    diagonal: np.ndarray
    basis_DQ: np.ndarray
    inner_QQ: np.ndarray

    def hessian_times(self, step: np.ndarray) -> np.ndarray:
        """Return the model's Hessian H times `step` (D), without forming H."""
        return np.asarray(self.diagonal * step + self.basis_DQ @ (self.inner_QQ @ (self.basis_DQ.T @ step)))

    def change(self, step: np.ndarray) -> float:
        """Return the change of the loss that the model predicts for a step (D) from the centre."""
        return float(self.slope @ step + step @ self.hessian_times(step) / 2)

    def lowest(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return the weights in the box [low, high], which contains `centre`, of the lowest loss by this model."""
        # scipy takes longer to import than a catalogue of solvers should
        from scipy.optimize import minimize

        # the scale makes steps and changes near 1, whatever the loss's own
        scale = float(self.diagonal.mean())
        unit = max(float(np.abs(self.slope).max()) / scale, 1e-300)

        def scaled(step: np.ndarray) -> tuple[float, np.ndarray]:
            curved = self.hessian_times(step * unit) / (scale * unit)
            slope = self.slope / (scale * unit)
            return float(slope @ step + step @ curved / 2), slope + curved

        bounds = np.stack([(low - self.centre) / unit, (high - self.centre) / unit], axis=1)
        options: Any = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
        minimum = minimize(scaled, np.zeros_like(low), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return np.asarray(np.clip(self.centre + minimum.x * unit, low, high))


def fit_quadratic(
    centre: np.ndarray, slope: np.ndarray, steps_KD: np.ndarray, changes_KD: np.ndarray, *, curvature: float, ridge: float
) -> Quadratic:
    """Fit the model to K steps and the slope's changes along them; `curvature` serves if no step curves upwards."""
    lengths_K1 = np.linalg.norm(steps_KD, axis=1, keepdims=True)
    s_KD, y_KD = steps_KD / lengths_K1, changes_KD / lengths_K1
    along_K = (s_KD * y_KD).sum(axis=1)
    mean = float(along_K[along_K > 0].mean()) if (along_K > 0).any() else curvature
    ridge_per_entry = ridge / len(centre)
    diagonal = ((s_KD * y_KD).sum(axis=0) + ridge_per_entry * mean) / ((s_KD**2).sum(axis=0) + ridge_per_entry)
    diagonal = np.maximum(diagonal, LEAST_CURVATURE * mean)
    left_KD = y_KD - diagonal * s_KD
    basis_DQ = _span(np.concatenate([s_KD, left_KD]))
    s_QK, left_QK = basis_DQ.T @ s_KD.T, basis_DQ.T @ left_KD.T
    # X S S^T + S S^T X + 2 r X = L S^T + S L^T, in the eigenvectors of S S^T
    squares_Q, vectors_QQ = np.linalg.eigh(s_QK @ s_QK.T)
    right_QQ = vectors_QQ.T @ (left_QK @ s_QK.T + s_QK @ left_QK.T) @ vectors_QQ
    inner_QQ = vectors_QQ @ (right_QQ / (squares_Q[:, None] + squares_Q + 2 * ridge)) @ vectors_QQ.T
    return Quadratic(centre, slope, diagonal, basis_DQ, inner_QQ)


def _span(rows_ND: np.ndarray) -> np.ndarray:
    """Return orthonormal columns (D, Q) that span the N rows."""
    _, sizes, right_ND = np.linalg.svd(rows_ND, full_matrices=False)
    return np.asarray(right_ND[sizes > 1e-12 * max(sizes, default=0.0)].T)
