"""Federated training of an adapter: rounds of clients that train on data of their own, by a named strategy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loraweave import Adapter, Task, TrainingError, UnknownName
from loraweave import names as names_of
from loraweave.extend import (
    Count,
    GivenRows,
    Positive,
    Share,
    Whole,
    check_options,
    fingerprint,
    get,
    is_whole,
    nearest,
    options_of,
    progress_bar,
    text_digest,
)
from loraweave.extend.models import require_model
from loraweave.extend.scoring import untouched
from loraweave.extend.training import LoraSettings, Texts, checkpoint_folder, read_tasks, target_layers, training_rows
from loraweave.extensions.federated.rounds import Kept, RoundReport, State, run_rounds
from loraweave.extensions.federated.strategies._strategy import Client, Course, Strategy


@dataclass(frozen=True, eq=False)
class Federated:
    """The result of a federation: the global `adapter`, the reports of the `rounds`, and the strategy's own `figures`.

    An example of figures: the epsilon and delta of `dp_lora`.
    """

    adapter: Adapter
    rounds: tuple[RoundReport, ...]
    figures: Mapping[str, float]
    course: Course
    strategy: Strategy
    state: State

    def client(self, name: str) -> Any:
        """Return this client's final model: an Adapter, or with `fedms` an expert model on the base.

        Raises UnknownName for a name that is not a client's.
        """
        clients = self.course.clients
        if name not in clients:
            raise UnknownName(f"no client {name!r}{nearest(name, clients)}; there are {', '.join(clients)}")
        kept = self.state.own.get(name, {})
        return self.strategy.client(self.course, self.state.server, clients[name], kept, self.adapter.card)

    def __str__(self) -> str:
        lines = []
        for number, report in enumerate(self.rounds, start=1):
            traffic = f"{report.bytes_down / 1e6:.2f} MB down, {report.bytes_up / 1e6:.2f} MB up"
            parts = [
                f"{len(report.losses)} clients",
                *([report.loss] if report.loss else []),
                traffic,
                f"{report.seconds:.1f} s",
            ]
            lines.append(f"round {number}: {', '.join(parts)}")
            lines += [f"  without {name}: {why}" for name, why in report.left_out.items()]
        return "\n".join([*lines, *(f"{name} {value:g}" for name, value in self.figures.items())])


def federate(
    model: Any,
    tokenizer: Any,
    clients: Mapping[str, Task | GivenRows | Sequence[Task]],
    *,
    models: Mapping[str, Any] | None = None,
    strategy: str | Strategy = "flexlora",
    strategy_options: Mapping[str, Any] | None = None,
    rounds: Count = 5,
    rank: Count = 8,
    ranks: Mapping[str, int] | None = None,
    steps: Count = 20,
    alpha: Positive | None = None,
    lr: Positive = 3e-3,
    batch_size: Count = 8,
    warmup: Whole = LoraSettings.warmup,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    participation: Share = 1.0,
    min_clients: Count = 2,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Federated:
    """Run `rounds` rounds of federation on the clients' examples, {client: Task, rows, or a list of tasks}.

    In each round a share `participation` of the clients begins with what the server sends, takes `steps` steps on its own
    rows as `train_adapters` does, with a learning rate that warms up and decays in each round, and sends its update; the
    `strategy`, a name of `lw.names("strategies")` with its `strategy_options`, says what is sent and how updates are
    aggregated. `ranks` has the ranks of clients that differ from `rank`, for strategies that allow it; each client's scale
    is `alpha / rank`. `models` has the models of clients that bring their own, for strategies that take them; the tokenizer
    is the same for all, and a target module may exist in some models only.

    A client that raises, dies, or sends something missing, misshapen or not finite is left out of its round, and the report
    and a logged warning say why; it keeps what it had. A round with fewer than `min_clients` usable updates is refused, if
    any was left out. With `checkpoint`, a folder, the same call resumes where it was interrupted or refused, with the same
    result to the bit; only the clients that were running train again.

    Raises TrainingError for settings and options out of range and for a refused round, UnknownName
    for an unknown strategy, client or layer, InvalidTask for unusable examples, PackageMissing where the strategy
    needs a package that is not there, CompositionError for a value that is not a model.
    """
    require_model(model)
    lora: dict[str, Any] = {"rank": rank, "steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed, "warmup": warmup}
    round_by: dict[str, Any] = {"participation": participation, "min_clients": min_clients}
    options = {**lora, **round_by, "rounds": rounds, "alpha": alpha}
    check_options("federate()", options, options_of(federate), error=TrainingError)
    chosen = _strategy(strategy, strategy_options or {})
    settings = LoraSettings.of(target_modules, alpha, **lora)
    tasks = read_tasks(clients)
    if min_clients > len(tasks):
        raise TrainingError(f"min_clients is {min_clients}, but there are {len(tasks)} clients: lower it")
    own_ranks = _ranks(ranks or {}, chosen, tasks, rank)
    own_models = _models(models or {}, chosen, tasks)
    course = _course(model, tokenizer, tasks, own_models, own_ranks, settings, rounds, float(participation))
    chosen.require(course)
    kept = Kept(checkpoint_folder(checkpoint), _key(course, chosen))
    with untouched(model), progress_bar(progress, field="loss") as bar:
        state = run_rounds(course, chosen, kept, min_clients, bar)
    figures = chosen.figures(course, len(state.rounds))
    card = _card(course, chosen, state, figures)
    adapter = course.adapter(chosen.registered_name(), chosen.layers(course, state.server), card)
    return Federated(adapter, state.rounds, figures, course, chosen, state)


def _course(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Sequence[Task | Texts]],
    own_models: Mapping[str, Any],
    ranks: Mapping[str, int],
    settings: LoraSettings,
    rounds: int,
    sample_rate: float,
) -> Course:
    """Return the course, which has what all rounds share, with the clients' rows; `tasks` has {client: its tasks}."""
    members = {}
    for name, parts in tasks.items():
        rows = training_rows(own_models.get(name, model), tokenizer, parts, settings.seed)
        size = sum(len(task.examples) for task in parts)
        apart = not any(isinstance(task, Texts) or task.shown for task in parts)
        members[name] = Client(name, rows, size, ranks[name], apart)
    targets, own_targets = _layers(model, own_models, settings.target_modules)
    course = Course(model, tokenizer, settings, targets, members, rounds, sample_rate, fingerprint(model))
    own_courses = {
        name: replace(course, model=its, layers=own_targets[name], base=fingerprint(its)) for name, its in own_models.items()
    }
    return replace(course, own=own_courses)


def _card(course: Course, strategy: Strategy, state: State, figures: Mapping[str, float]) -> dict[str, Any]:
    """Return the adapter's card: {"recipe": settings, "federation": figures and, unless the strategy is secret, rounds}."""
    settings, done = asdict(course.settings), dict[str, Any](figures)
    if strategy.secret:
        del settings["seed"]
    else:
        done["clients"] = {name: client.size for name, client in course.clients.items()}
        done["rounds"] = [asdict(report) for report in state.rounds]
    recipe = {"method": "loraweave.federate", "strategy": _named(strategy), **settings, "rounds": course.rounds}
    return {"recipe": recipe, "federation": done}


def _strategy(given: str | Strategy, options: Mapping[str, Any]) -> Strategy:
    if not isinstance(options, Mapping):
        raise TrainingError(f"strategy_options is {options!r:.60}; pass a mapping of names to values")
    if isinstance(given, Strategy):
        if options:
            raise TrainingError(f"strategy_options has {', '.join(options)}, but the strategy is made already")
        return given
    made: type[Strategy] = get("strategies", given)
    check_options(f"strategy {given!r}", options, options_of(made), error=TrainingError)
    return made(**options)


def _require_clients(option: str, given: Mapping[str, Any], clients: Mapping[str, Any], what: str) -> None:
    if not isinstance(given, Mapping):
        raise TrainingError(f"{option} is {given!r:.60}; pass {{client: its {what}}}")
    if unknown := [name for name in given if name not in clients]:
        near = nearest(unknown[0], clients)
        raise UnknownName(f"{option} has {unknown[0]!r}{near}; the clients are {', '.join(clients)}")


def _ranks(given: Mapping[str, int], strategy: Strategy, clients: Mapping[str, Any], rank: int) -> dict[str, int]:
    """Return {client: its rank}, `rank` for those that `given` lacks.

    Raises TrainingError for ranks that the strategy cannot take, UnknownName for a name that is not a client's.
    """
    _require_clients("ranks", given, clients, "rank")
    for name, client_rank in given.items():
        if not is_whole(client_rank, 1):
            raise TrainingError(f"the rank of client {name!r} is {client_rank!r}; it must be a whole number of at least 1")
    client_ranks = {name: given.get(name, rank) for name in clients}
    if len(set(client_ranks.values())) > 1 and not strategy.mixed_ranks:
        mixed = [name for name in names_of("strategies") if get("strategies", name).mixed_ranks]
        raise TrainingError(
            f"strategy {strategy.registered_name()!r} averages factors of one rank, and the clients' ranks are "
            f"{sorted(set(client_ranks.values()))}: give all the same, or take {' or '.join(mixed)}"
        )
    return client_ranks


def _models(given: Mapping[str, Any], strategy: Strategy, clients: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given`, {client: its own model}, once checked. Raises TrainingError if the strategy takes no such models."""
    _require_clients("models", given, clients, "model")
    for name, model in given.items():
        require_model(model)
        if not strategy.own_models:
            take = [other for other in names_of("strategies") if get("strategies", other).own_models]
            raise TrainingError(
                f"strategy {strategy.registered_name()!r} exchanges updates of one model, and models has one of client "
                f"{name!r}: leave it out, or take {' or '.join(take)}"
            )
    return dict(given)


Layers = dict[str, tuple[int, int]]


def _layers(model: Any, own_models: Mapping[str, Any], endings: Sequence[str]) -> tuple[Layers, dict[str, Layers]]:
    """Return {target layer: (O, I)} of the model, and {client: the same for its own model}; `endings` select the layers.

    Raises UnknownName for an ending that matches no layer of any model, and for a model in which none matches.
    """

    def matches(model: Any, ending: str) -> bool:
        try:
            return bool(target_layers(model, (ending,)))
        except UnknownName:
            return False

    every = [model, *own_models.values()]
    nowhere = [ending for ending in endings if not any(matches(one, ending) for one in every)]

    def layers_of(model: Any) -> Layers:
        return target_layers(model, nowhere or [ending for ending in endings if matches(model, ending)] or endings)

    targets, own_targets = layers_of(model), {}
    for name, own_model in own_models.items():
        try:
            own_targets[name] = layers_of(own_model)
        except UnknownName as error:
            raise UnknownName(f"the model of client {name!r}: {error}") from error
    return targets, own_targets


def _named(strategy: Strategy) -> dict[str, Any]:
    return {"name": strategy.registered_name(), **strategy.options}


def _key(course: Course, strategy: Strategy) -> str:
    """Return the digest of all settings and data that the rounds depend on, under which their state is stored."""
    members = [
        [name, client.rank, client.size, [[row.prompt, row.target, row.labels] for row in client.rows]]
        for name, client in course.clients.items()
    ]
    about = [_named(strategy), asdict(course.settings), course.rounds, course.sample_rate, course.base.to_json(), members]
    if course.own:
        about.append({name: client_course.base.to_json() for name, client_course in course.own.items()})
    return text_digest(json.dumps(about, sort_keys=True))[:32]
