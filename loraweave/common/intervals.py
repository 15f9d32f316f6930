"""The 95 % intervals of shares of right answers: Wilson's (1927), which has a width also where all are right, or none is."""

from __future__ import annotations

import math

import numpy as np

# the 97.5 % quantile of the normal distribution
Z = 1.959963984540054


def wilson(share: float, count: float, drawn_R: np.ndarray | None = None) -> tuple[float, float]:
    """Return the interval of a `share`, 0 to 1, of `count` independent answers; `count` is above 0.

    Of answers that are not independent, over several seeds or tasks, `drawn_R` has bootstrap draws of the share. The
    interval is then that of as many independent answers as would have the variance of the draws: the effective sample size
    of Franco, Little, Louis and Slud (2019, Journal of Survey Statistics and Methodology 7). Draws that are all alike say
    nothing of it; the answers then count as independent.
    """
    if drawn_R is not None and float(np.ptp(drawn_R)) >= 1e-9 and share not in (0, 1):
        count = share * (1 - share) / float(np.var(drawn_R))
    centre = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + Z * Z / count) for sign in (-1, 1))
    # 0 and 1 are limits of themselves, which rounding misses
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)
