"""The report on a server: which weights answered under each of its names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from loraweave.extend import ShownTable

AS_ASKED = "as asked"


@dataclass(frozen=True)
class Finding:
    """The verdict on one name at one time ("alone", "mixed", "after a reload").

    `distance` is the largest between an answer and what was asked, in nats, `separation` the least between what was asked
    and a likely fault on the best of the probes: a `weak` finding could not tell these two apart.
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
    """Findings for each name, the base's rounding and the tolerance that follows (nats), and what could not be verified.

    `basis` is "log-probabilities" or "texts"; `requests` counts all of them.
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
        """The findings that are not as asked."""
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
