"""Metrics of answers: each item of a test set gives numbers whose sums decide the value, so that any sample has one."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from loraweave import InvalidTask, PackageMissing
from loraweave.extend import nearest

# (answer, accepted targets) -> value, the higher the better
Function = Callable[..., float]
# parts_NK of N items from (answers, targets, losses, tokens)
Parts = Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[float], Sequence[int]], np.ndarray]


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric: `parts` gives K numbers for each item; `value` maps their sums, then the number of items, to a value."""

    name: str
    parts: Parts
    value: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool = True
    percent: bool = True

    @property
    def is_mean(self) -> bool:
        """True if the value is the mean of one number for each item."""
        return self.value is _mean


def metric_of(name: str, normalise: Sequence[str] | None, functions: Mapping[str, Function]) -> Metric:
    """Return the metric of that name; answers and targets first pass the steps named by `normalise` (keys of `STEPS`)."""
    if unknown := [step for step in normalise or () if step not in STEPS]:
        raise InvalidTask(f"normalise has {unknown[0]!r}{nearest(unknown[0], STEPS)}; there are {', '.join(STEPS)}")
    clean = partial(_normalised, steps=normalise or ())
    if name in functions:
        return Metric(name, partial(_each, functions[name], clean), _mean, percent=False)
    match name:
        case "exact_match" | "accuracy":
            return Metric(name, partial(_each, lambda answer, targets: answer in targets, clean), _mean)
        case "f1":
            squad = partial(_normalised, steps=tuple(STEPS)) if normalise is None else clean
            return Metric(name, partial(_each, _token_f1, squad), _mean)
        case "rouge" | "rouge1" | "rouge2" | "rougeL":
            return Metric(name, partial(_each, _rouge("rougeL" if name == "rouge" else name), clean), _mean)
        case "bleu" | "chrf":
            scorer = _corpus_scorer(name)
            return Metric(name, partial(_sacrebleu, scorer, clean), partial(_corpus_scores, scorer))
        case "perplexity":
            return Metric(name, _log_likelihoods, _perplexity, higher_is_better=False, percent=False)
    raise InvalidTask(f"no metric {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}, and functions of your own")


NAMES = ("exact_match", "accuracy", "f1", "rouge", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "perplexity")
STEPS: dict[str, Callable[[str], str]] = {
    "case": str.lower,
    "punctuation": lambda text: "".join(character for character in text if character not in string.punctuation),
    "articles": lambda text: re.sub(r"\b(a|an|the)\b", " ", text),
    "space": lambda text: " ".join(text.split()),
}


def _normalised(text: str, steps: Sequence[str]) -> str:
    for step in STEPS:
        if step in steps:
            text = STEPS[step](text)
    return text.strip()


def _each(
    function: Function, clean: Callable[[str], str], answers: Sequence[str], targets: Sequence[Sequence[str]], *_: Any
) -> np.ndarray:
    pairs = zip(answers, targets, strict=True)
    return np.array([[float(function(clean(answer), [clean(text) for text in accepted]))] for answer, accepted in pairs])


def _mean(sums_K: np.ndarray) -> np.ndarray:
    return np.asarray(sums_K[..., 0] / sums_K[..., -1])


def _token_f1(answer: str, targets: Sequence[str]) -> float:
    """Return the highest F1 score (harmonic mean of precision and recall over words) of the answer against any target."""
    return max(_f1(answer.split(), target.split()) for target in targets)


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    if not (found and wanted):
        return float(found == wanted)
    return 2 * sum((Counter(found) & Counter(wanted)).values()) / (len(found) + len(wanted))


def _rouge(kind: str) -> Function:
    """Return a function that gives the highest ROUGE F measure (Lin 2004) of an answer against any target."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge", error) from error
    scorer = RougeScorer([kind])
    return lambda answer, targets: max(scorer.score(target, answer)[kind].fmeasure for target in targets)


def _corpus_scorer(name: str) -> Any:
    """Return sacrebleu's BLEU or CHRF with its defaults; `force` only silences its warning on tokenised texts."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise _missing(name, error) from error
    return BLEU(force=True) if name == "bleu" else CHRF()


def _sacrebleu(
    scorer: Any, clean: Callable[[str], str], answers: Sequence[str], targets: Sequence[Sequence[str]], *_: Any
) -> np.ndarray:
    """Return counts_NK of the N items; sacrebleu's corpus score is a function of their sums over items."""
    most = max(map(len, targets))
    # an item with fewer accepted targets than another has its last one again, which changes no count
    listed = [[clean(accepted[min(place, len(accepted) - 1)]) for accepted in targets] for place in range(most)]
    counts_NK = scorer._extract_corpus_statistics([clean(answer) for answer in answers], listed)
    return np.array(counts_NK, dtype=np.float64)


def _corpus_scores(scorer: Any, sums_K: np.ndarray) -> np.ndarray:
    rows = sums_K[..., :-1].reshape(-1, sums_K.shape[-1] - 1)
    scores = [scorer._compute_score_from_stats([int(number) for number in row]).score for row in rows]
    return np.array(scores).reshape(sums_K.shape[:-1]) / 100


def _log_likelihoods(
    answers: Sequence[str], targets: Sequence[Sequence[str]], losses: Sequence[float], tokens: Sequence[int]
) -> np.ndarray:
    return np.array([[loss * count, count] for loss, count in zip(losses, tokens, strict=True)], dtype=np.float64)


def _perplexity(sums_K: np.ndarray) -> np.ndarray:
    """Return exp of the mean loss per token of each item's first target, end token included, from (loss, token) sums."""
    return np.asarray(np.exp(np.minimum(sums_K[..., 0] / sums_K[..., 1], 700.0)))


def _missing(name: str, error: ImportError) -> PackageMissing:
    return PackageMissing(f"metric {name!r} needs a package that is not here ({error}): pip install 'loraweave[study]'")
