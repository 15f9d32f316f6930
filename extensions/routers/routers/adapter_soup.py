"""AdapterSoup (Chronopoulou et al. 2023, arXiv 2302.07027): the average of the adapters whose texts resemble the task's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loraweave import WeightingError
from loraweave.extend import Count, Fraction, unknown_expert
from loraweave.extend.hubs import embedder_of
from loraweave.extend.routing import ClosedForm


@dataclass(eq=False, kw_only=True)
class AdapterSoup(ClosedForm):
    """Weights of 1/n for n chosen adapters: no training, and one merged adapter for the whole task.

    `texts` are each expert's sample inputs, {expert: texts}, `asked` the inputs of the task; compose() gives those of the
    adapters' cards and of the task. With the embedder's unit vectors, `form`

    "similarity" takes the experts in the order of their mean cosine over all pairs of one text and one input: the `most` (5)
    best, without those at or below `least` (0.15). "clusters" fits a mixture of Gaussians, spherical and one for each
    expert, to all texts, beginning at the experts' means. An expert belongs to the Gaussian in which most of its texts lie;
    the experts of each one with more than `share` (0.1) of the inputs are taken, the `most` of the fullest first.

    Where none qualifies, the experts of the best score alone are taken. The paper averages the parameters of adapters, which
    is `compose(merge_method="factor_average")`; by default updates are averaged. The paper's abstract names both ways but no
    numbers; the defaults are ours. Raises WeightingError that names the experts without texts, and for no input.
    """

    texts: Mapping[str, Sequence[str]]
    asked: Sequence[str]
    form: Literal["similarity", "clusters"] = "similarity"
    most: Count = 5
    least: Fraction = 0.15
    share: Fraction = 0.1
    embedder: str = "sentence"

    def _weights(self) -> Mapping[str, float]:
        for name in self.texts:
            if name not in self.experts:
                raise unknown_expert(name, dict.fromkeys(self.experts))
        if missing := [name for name in self.experts if not self.texts.get(name)]:
            raise WeightingError(
                f"method 'adapter_soup' compares texts, and has none of {', '.join(map(repr, missing))}: give their cards "
                "examples, or leave these adapters out"
            )
        if not self.asked:
            raise WeightingError("method 'adapter_soup' needs inputs of the task: give examples, or inputs= without targets")
        embed = embedder_of(self.embedder).embed
        texts = [np.asarray(embed(list(self.texts[name])), dtype=np.float64) for name in self.experts]
        asked_ND = np.asarray(embed(list(self.asked)), dtype=np.float64)
        if self.form == "similarity":
            score_E, least = np.array([float((asked_ND @ own_MD.T).mean()) for own_MD in texts]), self.least
        else:
            score_E, least = _shares(texts, asked_ND), self.share
        # stable: of equal scores the expert that stands first comes first
        order = np.argsort(-score_E, kind="stable")
        chosen = [place for place in order if score_E[place] > least] or [
            place for place in order if score_E[place] == score_E[order[0]]
        ]
        names = [self.experts[place] for place in chosen[: self.most]]
        return dict.fromkeys(names, 1 / len(names))


def _shares(texts: Sequence[np.ndarray], asked_ND: np.ndarray) -> np.ndarray:
    """Return, for each expert, the share of the task's inputs that fall into its Gaussian (E,), 0 to 1.

    `texts` has an array (M, D) of embeddings for each expert. A text or an input falls into its most probable Gaussian; an
    expert's Gaussian is the one into which most of its texts fall, which several experts may share.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    means_ED = np.stack([own_MD.mean(axis=0) for own_MD in texts])
    mixture = GaussianMixture(len(texts), covariance_type="spherical", means_init=means_ED, random_state=0)
    with warnings.catch_warnings():
        # after 100 rounds similar texts may still move between similar Gaussians
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(np.concatenate(texts))
    share_E = np.bincount(mixture.predict(asked_ND), minlength=len(texts)) / len(asked_ND)
    return np.array([share_E[np.argmax(np.bincount(mixture.predict(own_MD)))] for own_MD in texts])
