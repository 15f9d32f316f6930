"""The rounds of a federation: who takes part, which updates can be used, and which state is kept."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from loraweave import TrainingError
from loraweave.extend import text_digest
from loraweave.extend.scoring import untouched
from loraweave.extend.training import TrainingState, drop_state, load_state, save_state, seeded
from loraweave.extensions.federated.strategies._strategy import Course, Order, Strategy, Tensors, Trained

logger = logging.getLogger(__name__)

SERVER, OWN, UPDATE = "server/", "own/", "update/"


@dataclass(frozen=True)
class RoundReport:
    """The report of a round: the mean loss of each client that took part, None if unknown, and why others were left out.

    `bytes_down` and `bytes_up` are the bytes of the tensors that the server sent and of the updates that it used.
    """

    losses: Mapping[str, float | None]
    left_out: Mapping[str, str]
    bytes_down: int
    bytes_up: int
    seconds: float

    @property
    def loss(self) -> str:
        """The text "loss 1.234", the mean over the clients that told their losses; "" if none did."""
        told = [loss for loss in self.losses.values() if loss is not None]
        return f"loss {sum(told) / len(told):.3f}" if told else ""


@dataclass(frozen=True)
class State:
    """The state after `len(rounds)` rounds: the server's tensors, and those that each client keeps for itself."""

    server: Tensors
    own: Mapping[str, Tensors] = field(default_factory=dict)
    rounds: tuple[RoundReport, ...] = ()


@dataclass(frozen=True)
class Kept:
    """The store of a federation in its folder, if any: the state after the last round, the updates of the running round."""

    folder: Path | None
    key: str

    def state(self) -> State | None:
        stored = self._read(self.key)
        if stored is None:
            return None
        tensors, said = stored
        names = sorted({name.split("/", 2)[1] for name in tensors if name.startswith(OWN)})
        own_tensors = {said["names"][number]: _below(tensors, f"{OWN}{number}/") for number in names}
        return State(_below(tensors, SERVER), own_tensors, tuple(RoundReport(**report) for report in said["rounds"]))

    def save_state(self, state: State) -> None:
        numbered = {str(number): name for number, name in enumerate(state.own)}
        tensors = _above(state.server, SERVER)
        for number, name in numbered.items():
            tensors |= _above(state.own[name], f"{OWN}{number}/")
        self._write(self.key, tensors, {"names": numbered, "rounds": [asdict(report) for report in state.rounds]})

    def trained(self, number: int, client: str) -> Trained | None:
        stored = self._read(self._of(number, client))
        if stored is None:
            return None
        tensors, said = stored
        return Trained(_below(tensors, UPDATE), _below(tensors, OWN), tuple(said["losses"]))

    def save_trained(self, number: int, client: str, trained: Trained) -> None:
        tensors = _above(trained.update, UPDATE) | _above(trained.own, OWN)
        self._write(self._of(number, client), tensors, {"losses": trained.losses})

    def forget(self, number: int, clients: Sequence[str]) -> None:
        """Delete the updates of a round whose resulting state is stored."""
        if self.folder is not None:
            for client in clients:
                drop_state(self.folder, self._of(number, client))

    def _of(self, number: int, client: str) -> str:
        return f"{self.key}-{number}-{text_digest(client)[:24]}"

    def _read(self, key: str) -> tuple[Tensors, dict[str, Any]] | None:
        state = None if self.folder is None else load_state(self.folder, key)
        if state is None:
            return None
        return state.tensors, state.about

    def _write(self, key: str, tensors: Tensors, said: Mapping[str, Any]) -> None:
        if self.folder is not None:
            save_state(self.folder, key, TrainingState(0, tensors, said))


def run_rounds(course: Course, strategy: Strategy, kept: Kept, min_clients: int, bar: Progress) -> State:
    """Run the rounds that remain after the kept state, and return the final state.

    Raises TrainingError if fewer than `min_clients` of a round's clients can be used; the state before that round and the
    usable updates are then kept, and the next call asks the other clients again.
    """
    state = kept.state() or State(strategy.first(course))
    shown = bar.add_task("rounds", total=course.rounds, completed=len(state.rounds), loss="")
    while len(state.rounds) < course.rounds:
        state = _round(course, strategy, kept, min_clients, state)
        bar.update(shown, advance=1, loss=state.rounds[-1].loss)
    return state


def _round(course: Course, strategy: Strategy, kept: Kept, min_clients: int, state: State) -> State:
    started, number = time.monotonic(), len(state.rounds) + 1
    drawn = draw(course, strategy, number, min_clients)
    own_tensors = {name: state.own.get(name, {}) for name in drawn}
    sent = {name: strategy.sent(course, state.server, course.clients[name], own_tensors[name]) for name in drawn}
    finished = {name: trained for name in drawn if (trained := kept.trained(number, name)) is not None}
    left_out: dict[str, str] = {}
    orders = [Order(name, number, sent[name], own_tensors[name]) for name in drawn if name not in finished]
    for name, outcome in here(course, strategy, orders):
        why = outcome if isinstance(outcome, str) else flaw(strategy, sent[name], outcome.update)
        if isinstance(outcome, str) or why:
            left_out[name] = why
            logger.warning("round %d goes on without client %r: %s", number, name, why)
        else:
            finished[name] = outcome
            kept.save_trained(number, name, outcome)
    _require_enough(number, drawn, left_out, min_clients)
    used = {name: finished[name] for name in drawn if name in finished}
    server = strategy.aggregate(course, state.server, {name: trained.update for name, trained in used.items()}, number)
    if broken := [name for name, value in server.items() if not bool(value.isfinite().all())]:
        raise TrainingError(f"round {number}: the updates are finite, but their aggregate {broken[0]!r} is not: lower lr")
    report = RoundReport(
        {name: _mean(trained.losses) for name, trained in used.items()},
        left_out,
        sum(map(num_bytes, sent.values())),
        sum(num_bytes(trained.update) for trained in used.values()),
        time.monotonic() - started,
    )
    kept_own = {name: trained.own for name, trained in used.items() if trained.own}
    after = replace(state, server=server, own={**state.own, **kept_own}, rounds=(*state.rounds, report))
    kept.save_state(after)
    kept.forget(number, drawn)
    return after


def _mean(losses: Sequence[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None


def draw(course: Course, strategy: Strategy, number: int, min_clients: int) -> list[str]:
    """Draw the clients of round `number`, by the seed and the number; return their names in the caller's order.

    Sampling by "count" draws a share `sample_rate` of them, at least `min_clients`; "poisson" each with that probability.
    """
    names, rate = list(course.clients), course.sample_rate
    chance = torch.rand(len(names), generator=seeded(course.settings.seed, "participation", number), dtype=torch.float64)
    if strategy.sampling == "poisson":
        return [name for name, value in zip(names, chance.tolist(), strict=True) if value < rate]
    count = max(min_clients, math.ceil(rate * len(names) - 1e-9))
    chosen = set(chance.argsort()[:count].tolist())
    return [name for place, name in enumerate(names) if place in chosen]


def flaw(strategy: Strategy, received: Tensors, update: object) -> str:
    """Return why a client's update cannot be used, as a phrase, or "" if it can; `received` is what the client was sent."""
    if not isinstance(update, Mapping) or not all(isinstance(value, torch.Tensor) for value in update.values()):
        return f"it sent {type(update).__name__}, and not named tensors"
    tensors = dict(update)
    expected = strategy.expected(received, tensors)
    if missing := [name for name in expected if name not in tensors]:
        return f"its update lacks {missing[0]!r}, one of {len(missing)} tensors"
    if unknown := [name for name in tensors if name not in expected]:
        return f"its update has {unknown[0]!r}, which is not one of the {len(expected)} tensors asked for"
    for name, shape in expected.items():
        value = tensors[name]
        if tuple(value.shape) != shape:
            return f"{name!r} of its update has shape {tuple(value.shape)} instead of {shape}"
        if not value.is_floating_point():
            return f"{name!r} of its update has numbers of type {value.dtype}"
        if not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            return f"{name!r} of its update has {count} values that are not finite"
    return ""


def _require_enough(number: int, drawn: Sequence[str], left_out: Mapping[str, str], min_clients: int) -> None:
    usable = len(drawn) - len(left_out)
    if left_out and usable < min_clients:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in list(left_out.items())[:3])
        raise TrainingError(
            f"round {number} has usable updates of {usable} of its {len(drawn)} clients, and min_clients is {min_clients} "
            f"({reasons}): mend those clients or lower min_clients. With checkpoint= the same call asks only them again"
        )


def here(course: Course, strategy: Strategy, orders: Sequence[Order]) -> Iterator[tuple[str, Trained | str]]:
    """Carry out the orders in this process, one by one; yield each client's name with its result or its exception's text."""
    for order in orders:
        try:
            with untouched(course.of(order.client).model):
                yield order.client, strategy.train(course, order)
        except Exception as error:
            yield order.client, f"{type(error).__name__}: {error}"


def num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the size of the tensors in bytes."""
    return sum(value.nbytes for value in tensors.values())


def _above(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: value.contiguous() for name, value in tensors.items()}


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
