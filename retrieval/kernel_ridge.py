"""Kernel ridge classification in closed form, with its predictions for samples and classes that it has not seen.

The dual weights of n samples in C classes are alpha = (K + ridge I)^-1 Y, where Y_NC is 1 in the column of a sample's class
and else 0. Class c is then a direction in the kernel's space, w_c = sum over n of alpha_nc phi(x_n), and the score of x is
its cosine with w_c, if k(x, x) = 1: k(x) alpha_c / sqrt(alpha_c K alpha_c). A low ridge tells classes apart by what their
samples do not share; a high one compares with the mean of the samples, as a search by prototypes does.

Without the samples F, the weights of the others are alpha - A_:F e_F, where A = (K + ridge I)^-1 and e_F = (A_FF)^-1
alpha_F, and F is predicted as Y_F - e_F (Cook and Weisberg 1982; Rifkin and Lippert 2007). So one inverse gives every
held-out cosine.

Samples N, classes C, kernels P, queries Q.
"""

from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from scipy.linalg import cho_factor, cho_solve, lapack
from scipy.special import log_softmax as _log_softmax

RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# the shares that are tried for each kernel in turn
SHARES = (0.0, 0.125, 0.25, 0.5)
TEMPERATURES = tuple(0.005 * 1.4**step for step in range(13))
_NUM_ROUNDS = 2
# a class whose direction has lost all but this share of its squared length has no sample left: the rest is rounding
_NOTHING = 1e-9


@dataclass(frozen=True, eq=False)
class Choice:
    """The kernels' shares (sum 1), ridge and temperature; `loss` is the mean `loss_at` over held-out samples, in nats."""

    shares_P: np.ndarray
    ridge: float
    temperature: float = 0.05
    loss: float = np.inf


@dataclass(frozen=True, eq=False)
class Fit:
    """A solved classifier: the dual weights alpha, and the norm of each class's direction."""

    dual_NC: np.ndarray
    norms_C: np.ndarray

    def cosines(self, kernel_QN: np.ndarray) -> np.ndarray:
        """Return the score of every query in every class (Q, C), -1 to 1; 0 for a class without a direction."""
        cosines_QC: np.ndarray = kernel_QN @ self.dual_NC / self.norms_C
        return cosines_QC


def fit(kernel_NN: np.ndarray, labels_N: np.ndarray, ridge: float) -> Fit:
    """Solve for the direction of each class from the samples' kernel matrix and class numbers; O(N^3 / 3)."""
    factor = cho_factor(kernel_NN + ridge * np.eye(len(kernel_NN)), lower=True, check_finite=False)
    targets_NC = np.eye(int(labels_N.max()) + 1)[labels_N]
    dual_NC = cho_solve(factor, targets_NC, check_finite=False)
    # K alpha = Y - ridge alpha
    squares_C = np.einsum("nc,nc->c", dual_NC, targets_NC - ridge * dual_NC)
    return Fit(dual_NC, _norms(squares_C, squares_C))


def held_out(kernel_NN: np.ndarray, labels_N: np.ndarray, folds_N: np.ndarray, ridge: float) -> np.ndarray:
    """Return each sample's cosines (N, C) by the fit to all other folds; 0 for a class with no sample there. O(N^3)."""
    # the inverse by Cholesky factors takes half the time of np.linalg.inv
    lower_NN, _ = lapack.dpotrf(kernel_NN + ridge * np.eye(len(kernel_NN)), lower=True)
    half_NN = np.tril(lapack.dpotri(lower_NN, lower=True)[0])
    inverse_NN = half_NN + np.tril(half_NN, -1).T
    targets_NC = np.eye(int(labels_N.max()) + 1)[labels_N]
    dual_NC = inverse_NN @ targets_NC
    # K A = I - ridge A gives alpha K alpha, A K alpha and A K A without a product of two large matrices
    fitted_NC = targets_NC - ridge * dual_NC
    squares_C = np.einsum("nc,nc->c", dual_NC, fitted_NC)
    seen_NC = dual_NC - ridge * (inverse_NN @ dual_NC)
    cosines_NC: np.ndarray = np.empty_like(targets_NC)
    for fold in np.unique(folds_N):
        rows_F = np.flatnonzero(folds_N == fold)
        error_FC = np.linalg.solve(inverse_NN[np.ix_(rows_F, rows_F)], dual_NC[rows_F])
        inner_FF = inverse_NN[np.ix_(rows_F, rows_F)] - ridge * inverse_NN[rows_F] @ inverse_NN[:, rows_F]
        left_C = squares_C - 2 * np.einsum("fc,fc->c", error_FC, seen_NC[rows_F])
        left_C += np.einsum("fc,fc->c", error_FC, inner_FF @ error_FC)
        cosines_NC[rows_F] = (targets_NC[rows_F] - error_FC) / _norms(left_C, squares_C)
    return cosines_NC


def choose(kernels_PNN: np.ndarray, labels_N: np.ndarray, folds_N: np.ndarray, start: Choice) -> Choice:
    """Choose the shares, ridge and temperature that predict held-out samples best, by coordinate descent from `start`.

    Its loss is never above that of `start`. Samples that are alone in their class do not count; if all are, the start stays.
    """
    judged_N = np.bincount(labels_N)[labels_N] > 1
    if not judged_N.any() or len(np.unique(labels_N)) < 2:
        return start

    def loss_of(shares_P: np.ndarray, ridge: float) -> Choice:
        mixed_NN = np.tensordot(shares_P, kernels_PNN, axes=1)
        cosines_NC = held_out(mixed_NN, labels_N, folds_N, ridge)[judged_N]
        loss, temperature = min((loss_at(cosines_NC, labels_N[judged_N], trial), trial) for trial in TEMPERATURES)
        return Choice(shares_P, ridge, temperature, loss)

    best = loss_of(start.shares_P, start.ridge)
    for _ in range(_NUM_ROUNDS):
        before = best
        for ridge in RIDGES:
            best = min(best, loss_of(best.shares_P, ridge), key=attrgetter("loss"))
        for kernel in range(len(kernels_PNN)):
            rest_P = np.where(np.arange(len(kernels_PNN)) == kernel, 0.0, best.shares_P)
            # a kernel that is alone has nobody to share with
            for share in SHARES if rest_P.any() else ():
                shares_P = (1 - share) * rest_P / rest_P.sum()
                shares_P[kernel] = share
                best = min(best, loss_of(shares_P, best.ridge), key=attrgetter("loss"))
        if best is before:
            break
    return best


def loss_at(cosines_NC: np.ndarray, labels_N: np.ndarray, temperature: float) -> float:
    """Return the mean of -log softmax(cosines / temperature) of the right class, in nats."""
    return float(-log_softmax(cosines_NC / temperature)[np.arange(len(labels_N)), labels_N].mean())


def log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Return the logarithm of the softmax over the last axis."""
    log_NC: np.ndarray = _log_softmax(logits_NC, axis=-1)
    return log_NC


def _norms(squares_C: np.ndarray, whole_C: np.ndarray) -> np.ndarray:
    """Return sqrt(squares_C); inf for a class whose square is at most 1e-9 of `whole_C`, so that its cosines are 0."""
    return np.where(squares_C > _NOTHING * whole_C, np.sqrt(np.maximum(squares_C, 0.0)), np.inf)
