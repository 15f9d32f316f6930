"""Which weights explain a server's answers: least squares of its log-probabilities over weights of candidate adapters.

The model at hand reads each probe with the tokens that the server chose, under weights w of the candidates. Gauss and
Newton's steps, damped as by Levenberg and Marquardt, bring its log-probabilities of the listed tokens to the server's.
They are not linear in w, so the steps start at the nearest of many guesses, for each of a few sets of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loraweave.extensions.verify.answers import Answer

# {name of a candidate: weight}
Weights = Mapping[str, float]
Names = Sequence[str]
# the log-probabilities of all listed tokens of all probes under each of several weights, [weights][token]
Predict = Callable[[Sequence[Weights]], np.ndarray]

# the most adapters tried beside the promised ones, the most fitted all at once, and the most guesses that steps start from
MOST_OTHERS, MOST_TOGETHER, MOST_GUESSES = 6, 8, 10
# factors of the promised weights in first guesses, and weights of adapters there
FACTORS, WEIGHTS = (0.5, 0.25, 0.75, 1.0, 1.5, 2.0), (0.25, 0.5, 1.0)
# the step of a difference quotient, the dampings tried for each step, the most steps, and the least gain of one
STEP, DAMPINGS, MOST_STEPS, GAIN = 1e-2, (0.0, 0.1, 1.0, 10.0), 12, 0.05
# a weight is told from 0, or from 1, if it is this many standard errors away, and by at least this much
SURE, LEAST_WEIGHT, LEAST_CHANGE = 3.0, 2e-3, 5e-3


@dataclass(frozen=True)
class Fit:
    """Fitted weights of adapters with their standard errors, by name; `score` is the root mean square residual in nats."""

    weights: Weights
    errors: Weights
    score: float

    def __str__(self) -> str:
        return " and ".join(f"{self._shown(name)} of {name}" for name in self.weights) or "the base alone"

    def verdict(self, promised: Weights, served: Names) -> str:
        """Return the fault that the weights show: `promised` are the right ones, `served` the names of all adapters."""
        names, right = set(self.weights), set(promised)
        tolerances = {name: max(LEAST_CHANGE, SURE * error) for name, error in self.errors.items()}
        are_one = all(abs(weight - 1) < tolerances[name] for name, weight in self.weights.items())
        if not promised:
            return f"the base with {self} in it"
        if served and names > right and names >= set(served) and are_one:
            return f"all adapters together: {self}"
        if not names or names - right:
            return f"got {self}"
        if len(promised) == 1 and set(promised.values()) == {1.0}:
            return f"scale {self._shown(*names)} times its own"
        reason = "weights of the sum not applied" if names == right and are_one else "other weights"
        known = " and ".join(f"{weight:g} of {name}" for name, weight in promised.items())
        return f"{reason}: {self} where {known} was promised"

    def _shown(self, name: str) -> str:
        error = max(self.errors[name], 1e-4)
        places = max(0, -int(np.floor(np.log10(error))))
        return f"{self.weights[name]:.{places}f} ± {error:.1g}"


@dataclass(frozen=True)
class Transcript:
    """The log-probabilities that a server listed after a prompt: its tokens, and {token's key: value} at each place."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    tops: tuple[Mapping[str, float], ...]


def transcript_of(ids: tuple[int, ...], answer: Answer, id_of: Callable[[str], int | None]) -> Transcript:
    """Return the comparable part of an answer: its places up to the first whose text is not that of exactly one token."""
    chosen: list[int] = []
    for word in answer.words[: len(answer.tops) - 1]:
        if (token := id_of(word)) is None:
            break
        chosen.append(token)
    return Transcript(ids, tuple(chosen), tuple(answer.tops[: len(chosen) + 1]))


def fitted(
    observed: np.ndarray, predict: Predict, promised: Weights, before: Weights, served: Names, hub: Names, enough: float
) -> Fit:
    """Return the best weights of adapters for the `observed` log-probabilities.

    Adapters are those `promised`, those `served` under any name, and others of the hub. Guesses are followed in turn,
    `before` first, until weights leave at most `enough` nats (root mean square).
    """
    fits = []
    for guess in _guesses(observed, predict, promised, before, served, hub):
        fit = _solved(observed, predict, guess)
        sure = {
            name: weight for name, weight in fit.weights.items() if abs(weight) > max(LEAST_WEIGHT, SURE * fit.errors[name])
        }
        if fit.score <= enough and len(sure) < len(fit.weights):
            fit = _solved(observed, predict, sure)
        fits.append(fit)
        if fit.score <= enough:
            break
    return min(fits, key=lambda fit: fit.score)


def _guesses(
    observed: np.ndarray, predict: Predict, promised: Weights, before: Weights, served: Names, hub: Names
) -> Iterator[Weights]:
    """Yield first guesses: `before`, the best for the promised adapters, then the nearest two of each set of adapters."""
    if before:
        yield before
    scaled = [{name: factor * weight for name, weight in promised.items()} for factor in FACTORS]
    guesses = [*scaled, *(dict.fromkeys(promised, weight) for weight in WEIGHTS)]
    weights = list(promised.values())
    guesses += [dict(zip(promised, turned, strict=True)) for turned in (weights[::-1], np.abs(weights).tolist())]
    first = _nearest(guesses, observed, predict)
    yield first[0]
    added = [{**promised, name: WEIGHTS[1]} for name in dict.fromkeys([*served, *hub]) if name not in promised]
    near = added if len(added) <= MOST_OTHERS else _nearest(added, observed, predict)[:MOST_OTHERS]
    guesses = [dict.fromkeys(served, weight) for weight in WEIGHTS if 1 < len(served) <= MOST_TOGETHER]
    for name, weight in ((list(members)[-1], weight) for members in near for weight in WEIGHTS):
        guesses += [{name: weight}, *({**members, name: weight} for members in scaled[:4] if promised)]
    of_sets: dict[frozenset[str], list[Weights]] = {}
    for guess in _nearest(guesses, observed, predict) if guesses else ():
        of_sets.setdefault(frozenset(guess), []).append(guess)
    nearest = [guess for turn in (0, 1) for of_set in of_sets.values() for guess in of_set[turn : turn + 1]]
    yield from [*nearest, first[1]][:MOST_GUESSES]


def _nearest(guesses: Sequence[Weights], observed: np.ndarray, predict: Predict) -> list[Weights]:
    """Return the guesses, those whose log-probabilities are nearest to the observed first."""
    squares = np.nan_to_num(((predict(guesses) - observed) ** 2).mean(axis=1), nan=np.inf)
    return [guesses[turn] for turn in np.argsort(squares, kind="stable").tolist()]


def _solved(observed: np.ndarray, predict: Predict, start: Weights) -> Fit:
    """Return the fit of the weights of the adapters in `start`."""

    def at(values: np.ndarray) -> Weights:
        return dict(zip(start, values.tolist(), strict=True))

    values, steps = np.array(list(start.values())), STEP * np.eye(len(start))
    remainder, normal = predict([start])[0] - observed, np.zeros((0, 0))
    for _ in range(MOST_STEPS if start else 0):
        told = predict([at(values + sign * step) for step in steps for sign in (1, -1)])
        slopes = (told[::2] - told[1::2]).T / (2 * STEP)
        normal, downhill = slopes.T @ slopes, -slopes.T @ remainder
        damped = [normal + damping * np.diag(np.diag(normal)) for damping in DAMPINGS]
        changes = [np.clip(np.linalg.lstsq(matrix, downhill, rcond=None)[0], -0.5, 0.5) for matrix in damped]
        remainders = predict([at(values + change) for change in changes]) - observed
        turn = int((remainders**2).sum(axis=1).argmin())
        before, after = float((remainder**2).sum()), float((remainders[turn] ** 2).sum())
        if after < before:
            values, remainder = values + changes[turn], remainders[turn]
        if after > (1 - GAIN) * before:
            break
    spread = float((remainder**2).sum()) / max(1, len(observed) - len(start))
    errors = np.sqrt(np.clip(np.diag(np.linalg.pinv(normal)) * spread, 0, None))
    return Fit(at(values), at(errors), float(np.sqrt((remainder**2).mean())))
