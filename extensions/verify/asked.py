"""The names of a server as the hub has them: what each stands for, and the probes by which it is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loraweave import Adapter, Formula, FormulaError, Hub, parse
from loraweave.extend import DEFAULT_TEMPLATE, Named, Sum
from loraweave.extensions.verify.client import Listed
from loraweave.extensions.verify.hypotheses import BASE, Hypothesis, likely
from loraweave.extensions.verify.references import Probe, References
from loraweave.extensions.verify.report import AS_ASKED

# prompts of which the best become probes, and names whose first probe the base is asked too
NUM_CANDIDATES, NUM_OF_BASE = 6, 8
GENERAL = (
    "The capital of France is",
    "Input: The judge thanked the doctor.\nOutput:",
    "Write the opposite of the word.\nInput: cold\nOutput:",
)


@dataclass(frozen=True, eq=False)
class Asked:
    """A name of the server's, what it stands for, and its probes; the base has neither adapter nor parts.

    `parts` are the weights of the adapters of the hub that it is the sum of; a merge by a method has none.
    """

    listed: Listed
    adapter: Adapter | None
    probes: Sequence[Probe]
    parts: Mapping[Named, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.listed.name

    @property
    def scales(self) -> dict[str, float]:
        """{adapter: weight}, as a server is told that takes weights with each request."""
        return {leaf.name: weight for leaf, weight in self.parts.items()}


def formula_of(hub: Hub, name: str) -> Formula:
    """What the hub has under a server's name: an adapter, whatever it is called, or a formula of adapters that it has.

    Raises FormulaError where there is neither.
    """
    found = parse(str(Named(name))) if name in hub else parse(name).expand(hub)
    found.adapters(hub)
    return found


def asked_of(
    hub: Hub,
    listed: Listed,
    formula: Formula,
    references: References,
    prompts: Sequence[str],
    num_probes: int,
    num_tokens: int,
) -> Asked:
    """A name with the best of its prompts as probes: those given, or the sample inputs of its adapters.

    Raises ScopeError for routers and `auto`, CompositionError for adapters that are not for this base model.
    """
    parts = {}
    match formula.root:
        case Sum(terms=terms) if all(isinstance(term, Named) for _, term in terms):
            parts = {term: weight for weight, term in terms if isinstance(term, Named)}
    if list(parts.values()) == [1.0]:
        # with its card, which a merge does not keep
        (leaf,) = parts
        adapter = hub.get(leaf.name, version=leaf.version)
    else:
        adapter = formula.merge(hub, progress=False, allow_licenses=True, interference=False)
    rows = [Hypothesis(AS_ASKED, ((adapter, 1.0),)), *likely(adapter)]
    texts = list(prompts) or _prompts(hub, formula.adapters())
    return Asked(listed, adapter, references.probes(rows, texts, num_probes, num_tokens), parts)


def base_of(listed: Listed, asked: Sequence[Asked], references: References, num_probes: int, num_tokens: int) -> Asked:
    """The base, asked what the others are, so that what a server kept of their prompts would show."""
    probes = [
        Probe(probe.ids, {AS_ASKED: probe.answers[BASE.verdict], f"got {each.name}": probe.asked})
        for each in asked[:NUM_OF_BASE]
        for probe in each.probes[: 1 if len(asked) > 1 else None]
    ]
    rows = [Hypothesis(AS_ASKED)]
    return Asked(listed, None, probes or references.probes(rows, GENERAL, num_probes, num_tokens))


def base_name_of(listed: Iterable[Listed], hub: Hub) -> str | None:
    """What the server calls the base: `base`, what others name as their parent, or the only name that the hub lacks."""
    listed = list(listed)
    names = [each.name for each in listed]
    if "base" in names and "base" not in hub:
        return "base"
    parents = {each.parent for each in listed} & set(names)
    if len(parents) == 1:
        return parents.pop()
    unknown = [name for name in names if name not in hub]
    return unknown[0] if len(unknown) == 1 and not _is_formula(hub, unknown[0]) else None


def _is_formula(hub: Hub, name: str) -> bool:
    try:
        return bool(formula_of(hub, name))
    except FormulaError:
        return False


def _prompts(hub: Hub, names: Sequence[str]) -> list[str]:
    """Sample inputs of these adapters below their descriptions, as many of each; the shortest, which cost least."""
    found = []
    for name in names:
        record = hub.record(name)
        shortest = sorted(dict.fromkeys(record.examples), key=len)[: max(1, NUM_CANDIDATES // len(names))]
        filled = DEFAULT_TEMPLATE.replace("{instruction}", record.description)
        found += [filled.replace("{input}", text) for text in shortest]
    return found or list(GENERAL)
