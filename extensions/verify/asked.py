"""The names that a server serves, each with the adapter that the hub has for it and the probes to recognise it by."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loraweave import Adapter, Formula, FormulaError, Hub, parse
from loraweave.extend import DEFAULT_TEMPLATE
from loraweave.extend.composing import Named, Sum
from loraweave.extensions.verify.answers import AS_ASKED
from loraweave.extensions.verify.client import Listed
from loraweave.extensions.verify.hypotheses import BASE, Hypothesis, likely
from loraweave.extensions.verify.references import Probe, References

# the number of prompts from which the best become probes, and of names whose first probe the base gets too
NUM_CANDIDATES, NUM_OF_BASE = 6, 8
GENERAL = (
    "The capital of France is",
    "Input: The judge thanked the doctor.\nOutput:",
    "Write the opposite of the word.\nInput: cold\nOutput:",
)


@dataclass(frozen=True, eq=False)
class Asked:
    """A name that the server lists, with its adapter and its probes; the base has neither adapter nor parts.

    `parts` are {adapter of the hub: weight} if the name stands for their weighted sum; a merge by a method has none.
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
        """The weights as {adapter's name: weight}, for a server that takes them with each request."""
        return {leaf.name: weight for leaf, weight in self.parts.items()}


def formula_of(hub: Hub, name: str) -> Formula:
    """Return the formula of a server's name: the hub's adapter of that name, or the name parsed as a formula of adapters.

    Raises FormulaError for a name that is neither.
    """
    formula = parse(str(Named(name))) if name in hub else parse(name).expand(hub)
    formula.adapters(hub)
    return formula


def asked_of(
    hub: Hub,
    listed: Listed,
    formula: Formula,
    references: References,
    prompts: Sequence[str],
    num_probes: int,
    num_tokens: int,
) -> Asked:
    """Return a server's name with its adapter and probes: the best of `prompts`, or else of the adapters' sample inputs.

    Raises ScopeError for routers and `auto`, CompositionError for adapters that are not for this base model.
    """
    parts = {}
    match formula.root:
        case Sum(terms=terms) if all(isinstance(term, Named) for _, term in terms):
            parts = {term: weight for weight, term in terms if isinstance(term, Named)}
    if list(parts.values()) == [1.0]:
        # from the hub, with its card, which a merge does not keep
        (leaf,) = parts
        adapter = hub.get(leaf.name, version=leaf.version)
    else:
        adapter = formula.merge(hub, progress=False, allow_licenses=True, interference=False)
    rows = [Hypothesis(AS_ASKED, ((adapter, 1.0),)), *likely(adapter)]
    texts = list(prompts) or _prompts(hub, formula.adapters())
    return Asked(listed, adapter, references.probes(rows, texts, num_probes, num_tokens), parts)


def base_of(listed: Listed, asked: Sequence[Asked], references: References, num_probes: int, num_tokens: int) -> Asked:
    """Return the base with probes of other names: an answer as by another name shows that the server kept its adapter."""
    probes = [
        Probe(probe.ids, {AS_ASKED: probe.answers[BASE.verdict], f"got {name.name}": probe.asked})
        for name in asked[:NUM_OF_BASE]
        for probe in name.probes[: 1 if len(asked) > 1 else None]
    ]
    rows = [Hypothesis(AS_ASKED)]
    return Asked(listed, None, probes or references.probes(rows, GENERAL, num_probes, num_tokens))


def base_name_of(listed: Iterable[Listed], hub: Hub) -> str | None:
    """Return the server's name for the base: `base`, the parent of the others, or the only name that the hub lacks.

    None if there is no such name.
    """
    listed = list(listed)
    names = [entry.name for entry in listed]
    if "base" in names and "base" not in hub:
        return "base"
    parents = {entry.parent for entry in listed} & set(names)
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
    """Return prompts made of the adapters' descriptions and shortest sample inputs, as many for each adapter."""
    prompts = []
    for name in names:
        record = hub.record(name)
        shortest = sorted(dict.fromkeys(record.examples), key=len)[: max(1, NUM_CANDIDATES // len(names))]
        filled = DEFAULT_TEMPLATE.replace("{instruction}", record.description)
        prompts += [filled.replace("{input}", text) for text in shortest]
    return prompts or list(GENERAL)
