"""Greedy answers to one prompt, the distance between two of them, and the report on which weights answered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loraweave.extend import ShownTable

Top = Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """A text, with its tokens' texts (`words`) and the log-probabilities of the likeliest tokens at each place (`tops`).

    Without `words` and `tops`, the engine gives texts alone. Keys of `tops` are made by `key`. `end` is the token that ends
    a text, where known, and `ended` says that the text came to its end.
    """

    text: str
    words: tuple[str, ...] = ()
    tops: tuple[Top, ...] = ()
    end: str = ""
    ended: bool = False

    @classmethod
    def from_json(cls, value: Any) -> Answer:
        """Return the answer from the JSON of its `vars`. Raises KeyError, TypeError or AttributeError for anything else."""
        tops = tuple({str(word): float(logprob) for word, logprob in top.items()} for top in value["tops"])
        return cls(str(value["text"]), tuple(map(str, value["words"])), tops, str(value["end"]), bool(value["ended"]))


def key(word: str) -> str:
    """Return a token's text without the space at its beginning, which only some engines write."""
    return word.lstrip(" ")


def top_of(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return {key of a token: its log-probability}, likeliest first.

    Of tokens with the same text, the likeliest counts. Tokens without text are left out.
    """
    top: dict[str, float] = {}
    for word, logprob in sorted(pairs, key=lambda pair: -pair[1]):
        if key(word):
            top.setdefault(key(word), logprob)
    return top


def distance(served: Answer, known: Answer) -> float:
    """Return the distance in nats between a server's answer and a known one; 0 for answers that cannot be told apart.

    With log-probabilities it is their root mean square difference, over the tokens that the server lists, up to the first
    place where the texts differ. For texts alone, it is the log-probability of the known word less that of the server's word
    at that place.
    """
    if served.tops:
        values = _differences(served, known)
        return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0
    return _preference(served, known)


def _differences(served: Answer, known: Answer) -> list[float]:
    values = []
    for word, top, own_word, own_top in zip(served.words, served.tops, known.words, known.tops, strict=False):
        # a token that is not listed has at most the least log-probability that is listed
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


AS_ASKED = "as asked"


@dataclass(frozen=True)
class Finding:
    """The verdict on one served name in one situation, `when` ("alone", "mixed", "after a reload").

    `distance`, in nats, is the largest from a server's answer to the right answer. `separation` is the smallest, on the best
    probe, from a likely fault's answer to the right one: a `weak` finding could not tell these two apart.
    """

    asked: str
    when: str
    verdict: str
    distance: float
    separation: float
    probes: int
    weak: bool = False

    @property
    def ok(self) -> bool:
        return self.verdict == AS_ASKED

    def __str__(self) -> str:
        return f"asked {self.asked}, {self.when}: {self.verdict}"


@dataclass(frozen=True)
class ServerReport:
    """The findings, the base's distance (`rounding`) and the tolerance it gives (nats), and notes on what was not verified.

    `basis`, what answers were compared by, is "log-probabilities" or "texts"; `requests` counts all of them.
    """

    url: str
    basis: str
    rounding: float | None
    tolerance: float
    requests: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that are faults."""
        return tuple(finding for finding in self.findings if not finding.ok)

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        findings = [{**asdict(finding), "ok": finding.ok} for finding in self.findings]
        return {"ok": self.ok, **asdict(self), "findings": findings}

    def table(self) -> ShownTable:
        """Return a table with a row for each name that answered as asked, and one for each fault."""
        columns = ("asked", "when", "answer", "distance", "nearest fault")
        rounding = "unknown" if self.rounding is None else f"{self.rounding:.2g}"
        title = f"{self.url}: {self.basis}, rounding {rounding}, tolerance {self.tolerance:.2g} nats"
        return ShownTable.of(columns, self._rows(), title=title)

    def __str__(self) -> str:
        return "\n".join([repr(self.table()), *self.notes])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for name in dict.fromkeys(finding.asked for finding in self.findings):
            findings = [finding for finding in self.findings if finding.asked == name]
            sound = [finding for finding in findings if finding.ok]
            if sound:
                is_weak = any(finding.weak for finding in sound)
                verdict = f"{AS_ASKED} (weak: a likely fault looks the same)" if is_weak else AS_ASKED
                worst, times = max(finding.distance for finding in sound), ", ".join(finding.when for finding in sound)
                yield name, times, verdict, f"{worst:.2g}", f"{sound[0].separation:.2g}"
            for finding in findings:
                if not finding.ok:
                    yield name, finding.when, finding.verdict, f"{finding.distance:.2g}", f"{finding.separation:.2g}"
