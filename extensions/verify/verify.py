"""Ask a server for everything that it names, and report which weights answered.

base ------------------------> its distance from the model at hand: the rounding, and so the tolerance
each name alone, then base --> as asked where all probes are within it
all of them at once ---------> the same, with the base among them
after a reload --------------> the same, where the server can
any other answer ------------> the nearest known fault, else the weights that explain it, names the culprit
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from loraweave import (
    Adapter,
    AdapterUnsupported,
    CompositionError,
    FormulaError,
    Hub,
    ScopeError,
    WeightingError,
    load_base,
)
from loraweave.extend import cache_folder, fingerprint, require_whole, tracked
from loraweave.extend.models import EMBEDDED
from loraweave.extensions.verify.answers import AS_ASKED, Answer, Finding, ServerReport, distance
from loraweave.extensions.verify.asked import Asked, asked_of, base_name_of, base_of, formula_of
from loraweave.extensions.verify.client import Listed, Refused, Server
from loraweave.extensions.verify.fits import Fit, Weights, fitted, transcript_of
from loraweave.extensions.verify.hypotheses import BASE, Hypothesis, possible
from loraweave.extensions.verify.references import Probe, References

# nats: the least tolerance for engines in fp32, the same for texts alone, and the limit of a base that is not quantised
FLOOR, TEXT, ROUGH = 2e-3, 0.25, 0.2
# an adapter may add to the base's rounding; what is not that part of the tolerance away cannot be told apart
FACTOR, APART = 4.0, 0.75
# nats: an explanation this near needs no better one
FINE = 2e-4
BEYOND = "differs beyond rounding"
QUANTISED = f"{BEYOND}: quantised base?"
CACHED = "right without the prompt cache: a cached prefix of another adapter?"
BESIDE = f"{BEYOND} beside others only: rows of a batch get each other's adapter?"

Reply = Answer | Refused


def verify_server(
    url: str,
    hub: Hub,
    names: Sequence[str] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    base: str | Path | None = None,
    base_name: str | None = None,
    prompts: Sequence[str] = (),
    num_probes: int = 3,
    num_tokens: int = 8,
    width: int = 8,
    reload: bool = False,
    api_key: str | None = None,
    keep: bool = True,
    progress: bool = True,
) -> ServerReport:
    """Report which weights answer at an OpenAI-compatible server, for `names`, or all of its names that the hub has.

    The model at hand, else `load_base(base)`, gives the right answers; it is loaded when first needed, and its answers to
    probes are kept in the cache folder (`keep`). Prompts are the sample inputs of the adapters, or `prompts`; of these the
    `num_probes` (1 to 6) that best tell likely faults are sent, for `num_tokens` greedy tokens. Each name is asked alone,
    then among `width` requests at once, and with `reload`, which changes the server, after it was loaded again. `base_name`
    is the server's name for the base, if the server does not tell.

    An answer is a fault beyond the tolerance, 4 times the distance of the base itself. Raises SourceUnavailable for a server
    that does not answer, FormulaError for names that the hub does not have, ScopeError for routers and `auto`,
    CompositionError for adapters of another base, WeightingError if there is nothing to ask.
    """
    require_whole("num_probes", num_probes, 1, WeightingError)
    server = Server(url, api_key=api_key)
    said = str(base or EMBEDDED) if model is None else json.dumps(fingerprint(model).to_json())
    references = References(
        lambda: load_base(base) if model is None else (model, tokenizer), said, cache_folder() / "verify" if keep else None
    )
    listed = {entry.name: entry for entry in server.listed()}
    name_of_base = base_name or ("base" if server.llama_adapters else base_name_of(listed.values(), hub))
    targets, notes = [], []
    for name in names or listed:
        if name == name_of_base:
            continue
        try:
            formula = formula_of(hub, name)
            if not formula.is_base:
                of = listed.get(name, Listed(name))
                targets.append(asked_of(hub, of, formula, references, prompts, num_probes, num_tokens))
        except (FormulaError, ScopeError, CompositionError, AdapterUnsupported) as error:
            if names is not None:
                raise
            notes.append(f"not verified: {name}: {str(error).splitlines()[0]}")
    if not targets and name_of_base is None:
        raise WeightingError(f"{url} names nothing that {hub} has; it names {', '.join(listed) or 'nothing'}: pass names")
    if name_of_base is None:
        notes.append("the server's name for the base is not known, so its rounding is not measured: pass base_name")
    the_base = None if name_of_base is None else base_of(Listed(name_of_base), targets, references, num_probes, num_tokens)
    culprits = Culprits(hub, references, targets, num_tokens)
    visit = Visit(server, culprits, targets, the_base, num_tokens, width, progress)
    findings = [*visit.alone(), *visit.mixed(), *(visit.reloaded() if reload else ())]
    basis = "log-probabilities" if server.has_logprobs else "texts"
    return ServerReport(
        server.url, basis, visit.rounding, visit.tolerance, server.num_requests, tuple(findings), tuple(notes)
    )


@dataclass(eq=False)
class Visit:
    """One visit to a server: the order of its requests, and the verdicts on the answers."""

    _server: Server
    _culprits: Culprits
    _asked: Sequence[Asked]
    _base: Asked | None
    _num_tokens: int
    _width: int
    _progress: bool
    _sound: set[str] = field(default_factory=set)
    rounding: float | None = None

    @property
    def tolerance(self) -> float:
        """The largest distance, in nats, of an answer that counts as the right one."""
        return ROUGH if self.rounding is None else max(self._least, FACTOR * self.rounding)

    @property
    def _least(self) -> float:
        return FLOOR if self._server.has_logprobs else TEXT

    def alone(self) -> Iterator[Finding]:
        """Send one request at a time, for the base, then for each name followed by the base again; yield the findings."""
        base, between = self._base, []
        if base is not None:
            replies = [(probe, self._reply(base, probe)) for probe in base.probes]
            self._measure(base, replies)
            yield self._judged(base, "alone", replies)
        for turn, target in enumerate(self._tracked(self._asked, "alone")):
            yield self._judged(target, "alone", [(probe, self._reply(target, probe)) for probe in target.probes])
            if base is not None:
                probe = base.probes[turn % len(base.probes)]
                between.append((probe, self._reply(base, probe)))
        if base is not None and between:
            yield self._judged(base, "between others", between)

    def mixed(self) -> Iterator[Finding]:
        """Ask for all names, the base among them, with `width` requests at once; yield the findings."""
        most = max((len(target.probes) for target in self._asked), default=0)
        turns: list[tuple[Asked, Probe]] = []
        for target, number in ((target, n) for n in range(most) for target in self._asked if n < len(target.probes)):
            if self._base is not None and len(turns) % max(2, self._width // 2) == 0:
                turns.append((self._base, self._base.probes[len(turns) % len(self._base.probes)]))
            turns.append((target, target.probes[number]))
        with ThreadPoolExecutor(self._width) as threads:
            replies = list(self._tracked(threads.map(lambda turn: self._reply(*turn), turns), "mixed"))
        for target in (*self._asked, *([] if self._base is None else [self._base])):
            answered = [(probe, reply) for (of, probe), reply in zip(turns, replies, strict=True) if of is target]
            if answered:
                finding = self._judged(target, "mixed", answered)
                # no weights explain an answer each of whose tokens may come from another adapter
                beside = target.name in self._sound and finding.verdict.startswith(BEYOND)
                yield replace(finding, verdict=BESIDE) if beside else finding

    def reloaded(self) -> Iterator[Finding]:
        """Reload each name on the server, if it can, and ask for it again; yield the findings."""
        for target in self._tracked(self._asked, "reloaded"):
            try:
                done = self._server.reload(target.listed)
            except Refused as error:
                yield self._judged(target, "after a reload", [(target.probes[0], error)])
                continue
            if done:
                replies = [(probe, self._reply(target, probe)) for probe in target.probes]
                yield self._judged(target, "after a reload", replies)

    def _tracked(self, items: Any, label: str) -> Iterator[Any]:
        return tracked(items, label, total=None, shown=self._progress)

    def _reply(self, asked: Asked, probe: Probe, *, cached: bool = True) -> Reply:
        try:
            return self._server.complete(asked.name, asked.scales, probe.ids, self._num_tokens, cached=cached)
        except Refused as error:
            return error

    def _measure(self, base: Asked, replies: Sequence[tuple[Probe, Reply]]) -> None:
        """Set `rounding` to the base's largest distance from known answers, or that of the adapter that answers instead."""
        answers = [(probe, reply) for probe, reply in replies if isinstance(reply, Answer)]
        if not answers:
            return
        self.rounding = max(distance(reply, probe.asked) for probe, reply in answers)
        if self.rounding > self._least:
            scores = [self._culprits.nearest(base, answers, self._least)[1]] if self.rounding > ROUGH else []
            if (fit := self._culprits.fit(base, answers, self._least)) is not None:
                scores.append(fit.score)
            if min(scores, default=self.rounding) < self.rounding / 3:
                self.rounding = min(scores)

    def _judged(self, asked: Asked, when: str, replies: Sequence[tuple[Probe, Reply]]) -> Finding:
        """Return the finding on these replies: as asked if all of them fit, else the most likely fault."""
        separation = max(probe.separation for probe in asked.probes)
        answers = []
        for probe, reply in replies:
            if isinstance(reply, Refused):
                return Finding(asked.name, when, f"refused: {reply}", float("inf"), separation, len(replies))
            answers.append((probe, reply))
        worst = max(distance(reply, probe.asked) for probe, reply in answers)
        wrong = [(probe, reply) for probe, reply in answers if not self._fits(probe, reply)]
        if wrong and self._server.llama_adapters:
            # llama.cpp finds cached prompts by their tokens alone, without the adapter (its issue 26207)
            uncached = [(probe, self._reply(asked, probe, cached=False)) for probe, _ in wrong]
            again = [
                (probe, reply) for probe, reply in uncached if isinstance(reply, Answer) and not self._fits(probe, reply)
            ]
            verdict = self._named(asked, again) if again else CACHED
        else:
            verdict = self._named(asked, wrong) if wrong else AS_ASKED
        if when == "alone" and not wrong:
            self._sound.add(asked.name)
        if asked is self._base and not wrong and worst > ROUGH and self._server.has_logprobs:
            verdict = QUANTISED
        return Finding(asked.name, when, verdict, worst, separation, len(replies), separation < APART * self.tolerance)

    def _fits(self, probe: Probe, reply: Answer) -> bool:
        """Return True if an answer is within the tolerance and not clearly nearer to a likely fault."""
        error = distance(reply, probe.asked)
        likely = [answer for answer in probe.answers.values() if distance(answer, probe.asked) >= APART * self.tolerance]
        nearest = min((distance(reply, answer) for answer in likely), default=error)
        return error <= self.tolerance and (error <= self._least or error <= 2 * nearest)

    def _named(self, asked: Asked, wrong: Replies) -> str:
        """Return the verdict that explains the wrong answers: one for all of them, else one for each, joined by a slash."""
        _, score = self._culprits.nearest(asked, wrong, self._least)
        fit = None if score <= FINE else self._culprits.fit(asked, wrong, self.tolerance)
        if fit is not None and fit.score < min(score / 3, self.tolerance):
            promised = self._culprits.promised(asked)
            others = [other.name for other in self._asked if len(other.parts) == 1 and other.name not in promised]
            return fit.verdict(promised, others)
        self._culprits.unexplained.add(asked.name)
        return self._nearest_of(asked, wrong)

    def _nearest_of(self, asked: Asked, wrong: Replies) -> str:
        best, score = self._culprits.nearest(asked, wrong, self._least)
        error = max(distance(reply, probe.asked) for probe, reply in wrong)
        # far better than the adapter that was asked, and close enough by itself
        if score <= max(self._least, min(error / 3, 2 * self.tolerance)):
            return best.verdict
        if len(wrong) > 1:
            named = list(dict.fromkeys(self._nearest_of(asked, [pair]) for pair in wrong))
            return " / ".join([verdict for verdict in named if not verdict.startswith(BEYOND)] or named[:1])
        if self.rounding is not None and self.rounding > ROUGH:
            return QUANTISED
        return f"{BEYOND}; nearest, by {score:.2g}: {best.verdict}"


# the most adapters of the hub, not named by the server, that are tried
MAX_OTHERS = 64
# of hypotheses within this factor of the nearest, the plainest is taken
NEAR = 1.5

Replies = Sequence[tuple[Probe, Answer]]


@dataclass(eq=False)
class Culprits:
    """The adapters that may have answered: those that a server names, and those of the hub."""

    _hub: Hub
    _references: References
    _asked: Sequence[Asked]
    _num_tokens: int
    # the last fit of each name, and the names whose replies no weights explained
    _fits: dict[str, Weights] = field(default_factory=dict)
    unexplained: set[str] = field(default_factory=set)

    def nearest(self, asked: Asked, replies: Replies, least: float) -> tuple[Hypothesis, float]:
        """Return (hypothesis, nats): the hypothesis whose answers are nearest to the replies, and its largest distance.

        Of those within `least` nats or `NEAR` times the smallest distance, the first in the order of `possible` counts.
        """
        candidates = [(hypothesis, 0.0) for hypothesis in self._hypotheses(asked)]
        for probe, reply in replies:
            known = self._references.answers([hypothesis for hypothesis, _ in candidates], [probe.ids], self._num_tokens)[0]
            candidates = [
                (hypothesis, max(score, distance(reply, answer)))
                for (hypothesis, score), answer in zip(candidates, known, strict=True)
            ]
            # a hypothesis far from an answer is dropped
            limit = max(least, NEAR * min(score for _, score in candidates))
            candidates = [(hypothesis, score) for hypothesis, score in candidates if score <= limit]
        return candidates[0]

    def fit(self, asked: Asked, replies: Replies, enough: float) -> Fit | None:
        """Return the weights of adapters that best explain the replies, good `enough` if the remainder is that many nats.

        None without log-probabilities or adapters, and for a name whose earlier replies no weights explained.
        """
        adapters, served = self._candidates(asked)
        transcripts = [transcript_of(probe.ids, reply, self._references.id_of) for probe, reply in replies if reply.tops]
        if not adapters or not transcripts or asked.name in self.unexplained:
            return None
        told = np.array([value for transcript in transcripts for top in transcript.tops for value in top.values()])
        known = np.isfinite(self._references.predicted(adapters, transcripts, [{}])[0])

        def predict(rows: Sequence[Weights]) -> np.ndarray:
            return self._references.predicted(adapters, transcripts, rows)[:, known]

        before = self._fits.get(asked.name, {})
        promised = {name: weight for name, weight in self.promised(asked).items() if name in adapters}
        fit = fitted(told[known], predict, promised, before, served, list(adapters), enough)
        self._fits[asked.name] = fit.weights
        return fit

    def promised(self, asked: Asked) -> dict[str, float]:
        """Return {candidate: weight} as asked: of a sum its adapters, of a merge by a method the merged adapter."""
        if asked.parts:
            return {str(leaf): weight for leaf, weight in asked.parts.items()}
        return {} if asked.adapter is None else {asked.name: 1.0}

    def _candidates(self, asked: Asked) -> tuple[dict[str, Adapter], list[str]]:
        """Return ({name: adapter}, the served names): the adapters of this name, of all other names, then of the hub."""
        adapters: dict[str, Adapter] = {}
        for target in (asked, *(other for other in self._asked if other is not asked)):
            for leaf in target.parts:
                adapters.setdefault(str(leaf), self._hub.get(leaf.name, version=leaf.version))
            if target is asked and not target.parts and target.adapter is not None:
                adapters[target.name] = target.adapter
        # two names of one content cannot be told apart
        first = {adapter.hash: name for name, adapter in reversed(adapters.items())}
        adapters = {name: adapters[name] for name in adapters if first[adapters[name].hash] == name}
        others = self._of_hub(next(iter(adapters.values())), set(first)) if adapters else ()
        return adapters | dict(others), list(adapters)

    def _hypotheses(self, asked: Asked) -> list[Hypothesis]:
        served = [(other.name, other.adapter) for other in self._asked if other is not asked and other.adapter is not None]
        expected = asked.adapter
        known = {adapter.hash for _, adapter in served} | ({expected.hash} if expected else set())
        # if only the base is asked, no adapter can be taken for it
        of = expected or (served[0][1] if served else None)
        others = [*served, *(self._of_hub(of, known) if of is not None else ())]
        if expected is None:
            return [BASE, *(Hypothesis(f"got {name}", ((adapter, 1.0),)) for name, adapter in others)]
        if list(asked.parts.values()) == [1.0]:
            (leaf,) = asked.parts
            records = [record for record in self._hub.history(leaf.name) if record.hash not in known]
            older = [(f"{leaf.name}@{old.version}", self._hub.get(leaf.name, version=old.version)) for old in records]
            return possible(expected, others, older, config=self._references.config)
        parts = [(self._hub.get(leaf.name, version=leaf.version), weight) for leaf, weight in asked.parts.items()]
        return possible(expected, others, parts=parts, config=self._references.config)

    def _of_hub(self, of: Adapter, known: set[str]) -> Iterator[tuple[str, Adapter]]:
        """Yield (name, adapter) of the hub's adapters for the same base whose content hash is not in `known`."""
        left = MAX_OTHERS
        for record in self._hub.records(base_model=of.base):
            if left and record.hash not in known:
                adapter = self._hub[record.name]
                if self._references.fits(adapter):
                    known.add(record.hash)
                    left -= 1
                    yield record.name, adapter
