"""The greedy answer to one prompt, from a server or from the model at hand, and how far two of them lie apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Top = Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """A text, with the text of each of its tokens and the log-probabilities of the likeliest tokens at its place.

    Without `words` and `tops`, the engine gives texts alone. Keys of `tops` are those of `key`. `end` is the token that ends
    a text, where known, and `ended` says that the text came to its end.
    """

    text: str
    words: tuple[str, ...] = ()
    tops: tuple[Top, ...] = ()
    end: str = ""
    ended: bool = False

    @classmethod
    def from_json(cls, value: Any) -> Answer:
        """Return the answer whose `vars` are this JSON. Raises KeyError, TypeError or AttributeError for anything else."""
        tops = tuple({str(word): float(logprob) for word, logprob in top.items()} for top in value["tops"])
        return cls(str(value["text"]), tuple(map(str, value["words"])), tops, str(value["end"]), bool(value["ended"]))


def key(word: str) -> str:
    """Return a token's text as all engines write it: without the space at its beginning, which some leave out."""
    return word.lstrip(" ")


def top_of(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return {key: log-probability}, likeliest first.

    Of tokens with the same text, the likeliest counts. Tokens without text are left out.
    """
    top: dict[str, float] = {}
    for word, logprob in sorted(pairs, key=lambda pair: -pair[1]):
        if key(word):
            top.setdefault(key(word), logprob)
    return top


def distance(served: Answer, known: Answer) -> float:
    """Return how far a server's answer is from a known one, in nats; 0 for answers that cannot be told apart.

    With log-probabilities it is their root mean square difference, over the tokens that the server lists, as far as both
    texts agree. From a text alone, it is by how much the known model prefers its own word to the first that differs.
    """
    if served.tops:
        values = _differences(served, known)
        return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0
    return _preference(served, known)


def _differences(served: Answer, known: Answer) -> list[float]:
    values = []
    for word, top, own_word, own_top in zip(served.words, served.tops, known.words, known.tops, strict=False):
        # what is not listed has at most the least that is
        least = min(own_top.values())
        values += [logprob - own_top.get(text, least) for text, logprob in top.items() if logprob > least or text in own_top]
        if key(word) != key(own_word):
            # some engines leave the text of a special token, such as the end, empty
            if key(word):
                values.append(max(own_top.values()) - own_top.get(key(word), least))
            break
    return values


def _preference(served: Answer, known: Answer) -> float:
    rest = served.text
    for word, top in zip(known.words, known.tops, strict=False):
        if rest.startswith(word):
            rest = rest.removeprefix(word)
            continue
        best, least = max(top.values()), min(top.values())
        if not rest:
            at_end = not served.ended or word == known.end
            return 0.0 if at_end else best - top.get(key(known.end), least)
        return best - max((value for text, value in top.items() if key(rest).startswith(text)), default=least)
    return 0.0
