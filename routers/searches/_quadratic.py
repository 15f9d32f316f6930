"""A quadratic model of a loss from gradients at a few points, and its lowest point in a box.

    m(w) = g . (w - c) + 1/2 (w - c)^T H (w - c),        H = diag(d) + Q M Q^T

about the centre c with its gradient g. Each other point k says by how much the gradient changes, y_k = g_k - g, along
s_k = w_k - c: a quadratic loss has H s_k = y_k. The diagonal is the ridge regression of the y on the s, coordinate by
coordinate, towards the mean curvature h along the s_k:

    d_i = (sum_k s_ki y_ki / |s_k|^2 + r h / D) / (sum_k s_ki^2 / |s_k|^2 + r / D)

and the rest is the symmetric matrix nearest to zero that makes up what the diagonal leaves:

    min over X = X^T of  sum_k |X s_k - (y_k - d s_k)|^2 / |s_k|^2 + r |X|^2

whose rows and columns lie in the span Q of the s_k and of what is left, so that it costs little in many dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# a curvature below this share of the mean one is taken for none: the diagonal stays positive
LEAST_CURVATURE = 1e-3


@dataclass(frozen=True)
class Quadratic:
    """The model's parts: c, g and d have D entries, basis_DQ orthonormal columns, and inner_QQ is M."""

    centre: np.ndarray
    slope: np.ndarray
    diagonal: np.ndarray
    basis_DQ: np.ndarray
    inner_QQ: np.ndarray

    def hessian_times(self, step: np.ndarray) -> np.ndarray:
        """H step."""
        return np.asarray(self.diagonal * step + self.basis_DQ @ (self.inner_QQ @ (self.basis_DQ.T @ step)))

    def change(self, step: np.ndarray) -> float:
        """m(c + step) - m(c)."""
        return float(self.slope @ step + step @ self.hessian_times(step) / 2)

    def lowest(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """A point of the box [low, high], which has c in it, at which the model has no descent left."""
        # scipy takes longer to import than a catalogue of solvers should
        from scipy.optimize import minimize

        # of steps and changes near 1, whatever the loss's own
        scale = float(self.diagonal.mean())
        unit = max(float(np.abs(self.slope).max()) / scale, 1e-300)

        def scaled(step: np.ndarray) -> tuple[float, np.ndarray]:
            curved = self.hessian_times(step * unit) / (scale * unit)
            slope = self.slope / (scale * unit)
            return float(slope @ step + step @ curved / 2), slope + curved

        bounds = np.stack([(low - self.centre) / unit, (high - self.centre) / unit], axis=1)
        options: Any = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
        found = minimize(scaled, np.zeros_like(low), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return np.asarray(np.clip(self.centre + found.x * unit, low, high))


def fit_quadratic(
    centre: np.ndarray, slope: np.ndarray, steps_KD: np.ndarray, changes_KD: np.ndarray, *, curvature: float, ridge: float
) -> Quadratic:
    """The model of these s_k and y_k; `curvature` is h where there are none, or none that curves upwards."""
    lengths_K1 = np.linalg.norm(steps_KD, axis=1, keepdims=True)
    s_KD, y_KD = steps_KD / lengths_K1, changes_KD / lengths_K1
    along_K = (s_KD * y_KD).sum(axis=1)
    mean = float(along_K[along_K > 0].mean()) if (along_K > 0).any() else curvature
    each = ridge / len(centre)
    diagonal = ((s_KD * y_KD).sum(axis=0) + each * mean) / ((s_KD**2).sum(axis=0) + each)
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
    """Orthonormal columns that span the rows."""
    _, sizes, right_ND = np.linalg.svd(rows_ND, full_matrices=False)
    return np.asarray(right_ND[sizes > 1e-12 * max(sizes, default=0.0)].T)
