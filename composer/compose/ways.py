"""The choice of trials that compose() runs: the plain ones, and the method asked for or, for "auto", what it averages.

"auto" learns twice from the examples: weights for the stored adapters, and a LoRA under prompts that show the examples. Its
answer is the average of both members' probabilities, which leave-one-out on the example pool put above either alone and
above choosing one of them on held-out examples (benchmarks/TABLES.md). A third member is the program of stored adapters that
the examples point to, unless its loss is far above that of prompts alone. Where one stored adapter answers the examples
already, it is taken as it is: what was trained on more than five examples is not learned from them again.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter, methodcaller

from loraweave.common.checks import says_something
from loraweave.composer.compose.candidates import skills
from loraweave.composer.compose.learning import (
    averaged,
    few_shot,
    long_lora,
    of_start,
    program,
    routed,
    search_of,
    stated_program,
)
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.settings import CALIBRATING, OTHER_WAYS, Settings
from loraweave.composer.compose.trials import Bench, Split, Trial, best_single, fixed
from loraweave.errors import InvalidLicense, InvalidTask, SearchFailed, WeightingError
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

# evaluations of the search of "auto": 5 steps of the gradient
EACH = 10
# the least budget with which "auto" trains too
TRAINS_FROM = 40
# a single adapter of less than this share of the loss without adapters is taken as it is
SURE = 0.5
# the ways that neither learn from the examples nor take an adapter of a skill
UNLEARNED = ("base", "in_context", "in_context_adapter")
# a task with labels does not take it if its loss is luck with at least this probability
LUCK = 0.05
# no program is sought if a way that learned nothing has a lower loss, in nats a token
NEAR = 0.5
# a program is no member of the average if its loss is FAR times that of the best way that learned nothing
FAR = 2.0
# the search of "auto", and the search that replaces it for an objective without gradients
SEARCHES = ("gradient", "lorahub")


@dataclass
class Outcome:
    """The trials that were run, in order; `to_return` is the name of the one to return, unless a guard finds a better one.

    It is None if "auto" learned nothing. `remarks` say what was left out and why, and where a training began.
    """

    trials: list[Trial]
    to_return: str | None = None
    remarks: list[str] = field(default_factory=list)


def calibrated(task: Task, settings: Settings) -> Task:
    """Return the task, for "auto" with calibrated labels, so that no label wins because prompts alone make it likely."""
    if settings.method != "auto" or not task.labels:
        return task
    return replace(task, calibrated=(settings.inputs or task.examples)[:CALIBRATING])


def ways_of(bench: Bench, settings: Settings) -> tuple[list[Trial], list[Trial]]:
    """Return two lists of trials, none of which has run: plain ones to compare with, and those of the settings' method.

    With "auto" the latter are those that it may average; `measure` adds trials that depend on the losses of others. Raises
    an error, before anything runs, for what the settings or the pool forbid.
    """
    learning = _learning(bench, settings)
    plain: list[Trial] = []
    # without examples there is nothing to compare on
    if bench.task.examples:
        requested = [trial.name for trial in learning]
        uniform = MixtureWeights.of(dict.fromkeys(bench.names, 1 / len(bench.names)), bench.names)
        base = fixed("base", bench, MixtureWeights.of({}, bench.names))
        compared = [base, best_single(bench), fixed("uniform", bench, uniform)]
        plain = [trial for trial in compared if trial.name not in requested]
    return plain, learning


def _learning(bench: Bench, settings: Settings) -> list[Trial]:
    """Return the trials of the settings' method that are not plain; for "auto", those that it may average."""
    if settings.routes:
        return [routed(bench, settings)]
    match settings.method:
        case "few_shot":
            return [few_shot(bench, settings)]
        case "in_context":
            return [_in_context(bench)]
        case "auto":
            return [] if _is_one(bench.task, settings) else _search_and_trainings(bench, settings)
    if settings.method in OTHER_WAYS:
        return []
    if len(bench.names) == 1 and settings.learns and settings.method != "grid":
        raise WeightingError(
            f"method {settings.name!r} weighs adapters against each other, but there is only {bench.names[0]!r}: "
            "take it as it is (method='best_single'), let method='grid' find its strength, or give more adapters"
        )
    return [search_of(bench, settings)]


def _search_and_trainings(bench: Bench, settings: Settings) -> list[Trial]:
    """Return the trials of the search of "auto", if there are several adapters to weigh, and of its trainings."""
    trials = []
    if len(bench.names) > 1:
        method, budget = next(method for method in SEARCHES if settings.can_run(method)), settings.budget
        if method == "gradient" and budget is not None:
            budget = min(EACH, budget)
        trials.append(search_of(bench, replace(settings, method=method, budget=budget, options={})))
    if len(bench.task.examples) > 1 and not _untrained(settings):
        trials.append(few_shot(bench, settings))
        if settings.has_many(bench.task):
            trials.append(long_lora(bench, settings))
    return trials


def _in_context(bench: Bench) -> Trial:
    return fixed("in_context", bench.with_demonstrations(), MixtureWeights.of({}, bench.names))


def measure(plain: list[Trial], learning: list[Trial], bench: Bench, settings: Settings, folds: Sequence[Split]) -> Outcome:
    """Run the plain trials, then those of the method; "auto" decides by their losses which others to run.

    With "auto", a trial is left out if none of its candidates can be scored.
    """
    for trial in [*plain, *(learning if settings.method != "auto" else [])]:
        trial.run(folds)
    if settings.method == "auto":
        measured = _auto(plain, learning, bench, settings, folds)
    else:
        measured = Outcome([*plain, *learning], settings.name)
    if bench.start is not None and any(trial.name == "few_shot" for trial in measured.trials):
        measured.remarks.append(f"few_shot began as the hub's {bench.start.name!r}")
    return measured


def _auto(plain: list[Trial], learning: list[Trial], bench: Bench, settings: Settings, folds: Sequence[Split]) -> Outcome:
    """Run the trials of "auto", once the plain ones have run; return all that ran, and the name of the one to return."""
    task, remarks, run = bench.task, list[str](), methodcaller("run", folds)
    is_one = _is_one(task, settings)
    prompts: list[Trial] = []
    # where there are other examples to show: the base in context, and the adapter that learned to read them
    if not task.demonstrations and (is_one or len(task.examples) > 1):
        reader = [] if bench.start is None else [of_start(bench)]
        prompts = _that_run([_in_context(bench), *reader], run, remarks)
    plain = [*plain, *prompts]
    stated = [] if task.demonstrations else _stated(bench, plain, run, remarks)
    if not folds and not stated and _is_sure(plain, bench, settings):
        return Outcome(plain, "best_single", remarks)
    unlearned = min([trial.held_out_loss for trial in plain if trial.name in UNLEARNED])
    if stated and stated[0].held_out_loss < SURE * unlearned:
        return Outcome([*plain, *stated], stated[0].name, remarks)
    if is_one:
        remarks.append("one example is shown in prompts, and not learned from: two would tell how well ways do")
        return _averaged([*plain, *stated], prompts, folds, remarks)
    least, untrained, searched = min([trial.held_out_loss for trial in plain]), _untrained(settings), list[Trial]()
    # a program is sought if the instruction states none, and neither prompts nor one adapter come near a task without labels
    is_far = task.labels is None and not untrained and len(task.examples) > 1 and least >= NEAR
    if is_far and not stated and bench.retriever is not None:
        searched = [program(bench, bench.retriever, settings)]
    if settings.has_many(task):
        # only the way that is best on held-out examples goes on to learn from all
        learned = _that_run([*learning, *searched], methodcaller("hold_out", folds), remarks)
        best = min([*plain, *stated, *learned], key=attrgetter("held_out_loss"))
        if best in learned:
            best.finish()
        return Outcome([*plain, *stated, *learned], best.name, remarks)
    members = _that_run(learning, run, remarks)
    programs = [*stated, *_that_run(searched, run, remarks)]
    averaged = members + [program for program in programs if _joins(program, least, remarks)]
    if untrained:
        used = "".join(f", and {trial.name} used {trial.evaluations} evaluations" for trial in averaged)
        remarks.append(f"{untrained}, so that it trains nothing{used}")
    return _averaged([*plain, *members, *programs], averaged, folds, remarks)


def _that_run(trials: Iterable[Trial], run: Callable[[Trial], object], remarks: list[str]) -> list[Trial]:
    """Run the trials; return those that succeeded, and add to `remarks` why the others failed."""
    ran = []
    for trial in trials:
        try:
            run(trial)
            ran.append(trial)
        except (SearchFailed, InvalidTask, InvalidLicense) as error:
            # an objective that scores nothing, demonstrations beyond the model's context, adapters that cannot be asked
            remarks.append(f"{trial.name} was left out: {error}")
    return ran


def _averaged(trials: list[Trial], members: list[Trial], folds: Sequence[Split], remarks: list[str]) -> Outcome:
    """Run the average of `members`, if there are several; the outcome returns the average, or the only member."""
    average: list[Trial] = [averaged(members)] if len(members) > 1 else []
    for trial in average:
        trial.run(folds)
    best = [*average, *members]
    return Outcome([*trials, *average], best[0].name if best else None, remarks)


def _stated(bench: Bench, plain: Sequence[Trial], run: Callable[[Trial], object], remarks: list[str]) -> list[Trial]:
    """Run the program of the two adapters whose descriptions together match the instruction, if there are such two.

    Return [its trial] if it answers better than the best single adapter, and not far worse than prompts alone; else [].
    """
    if bench.retriever is None or not says_something(bench.task.instruction):
        return []
    records = [bench.retriever.hub.record(name) for name in bench.scores]
    described = [record for record in records if says_something(record.description)]
    texts = [str(text) for text, _ in bench.task.examples]
    pair = skills(bench.retriever.space, described, bench.task, texts)[0] if described else []
    if len(pair) != 2:
        return []
    losses = {trial.name: trial.held_out_loss for trial in plain}
    most = min(FAR * min(losses.values()), losses["best_single"])
    stated = _that_run([stated_program(bench, pair)], run, remarks)
    if not stated or (loss := stated[0].held_out_loss) < most:
        return stated
    remarks.append(f"program {pair[0].name} > {pair[1].name} was left out: its loss is {loss:.3f}, not below {most:.3f}")
    return []


def _joins(program: Trial, least: float, remarks: list[str]) -> bool:
    """Return True unless the program has one step, or a loss of `FAR` times `least` or more; add a sentence to `remarks`."""
    steps = [] if program.chosen is None else list(program.chosen.composition.steps)
    loss, why = program.held_out_loss, ""
    if len(steps) == 1:
        why = " was left out: it has one step"
    elif loss >= FAR * least:
        why = f" was left out: its loss is {loss:.3f}, and {least:.3f} without anything learned"
    remarks.append(f"program {' > '.join(steps)}{why}")
    return not why


def _is_sure(plain: Sequence[Trial], bench: Bench, settings: Settings) -> bool:
    """Return True if the best single adapter's loss is far below that of prompts alone, and not by luck.

    A single example cannot be shown in its own prompt: the adapter must then also be the first that retrieval finds. With
    labels the best of many adapters can be right by luck, so the `luck` of its loss must be below LUCK.
    """
    losses = {trial.name: trial.held_out_loss for trial in plain}
    if _is_one(bench.task, settings) and bench.best([0], 1).keys() != set(list(bench.scores)[:1]):
        return False
    if losses["best_single"] >= SURE * min(losses[name] for name in UNLEARNED if name in losses):
        return False
    return bench.task.labels is None or _luck_of_best(bench) < LUCK


def _luck_of_best(bench: Bench) -> float:
    """Return the `luck` of the best single adapter; adapters that retrieval ranks below it do not count as tried."""
    examples = bench.task.examples
    (single,) = best = bench.best(range(len(examples)), 1)
    loss = ExampleLoss(bench.engine, bench.tokenizer, bench.task, kind="labels", l1=0.0)
    (losses_N,), _ = loss.scores([MixtureWeights.of(best, bench.names)])
    ranked = list(bench.scores)
    num_tried = ranked.index(single) + 1 if ranked else len(bench.names)
    return luck(losses_N.tolist(), [label for _, label in examples], num_tried)


def luck(losses_N: Sequence[float], labels_N: Sequence[str], num_tried: int) -> float:
    """Return a bound on the probability that the best of `num_tried` adapters finds the labels so likely by chance.

    `losses_N` are -log p of each example's label, among all labels. If labels are drawn without regard to the inputs, an
    adapter finds them x times as likely as their own frequencies do with a probability of at most 1 / x (Markov's
    inequality; universal inference, Wasserman et al. 2020, arXiv 1912.11436).
    """
    frequencies = [labels_N.count(label) / len(labels_N) for label in labels_N]
    log_guess = math.fsum(map(math.log, frequencies))
    return math.exp(min(0.0, math.log(num_tried) + log_guess + math.fsum(losses_N)))


def _is_one(task: Task, settings: Settings) -> bool:
    """Return True if "auto" has a single example, so that none is left to compare trials on."""
    return settings.method == "auto" and len(task.examples) == 1 and not task.demonstrations and settings.asks_the_task


def _untrained(settings: Settings) -> str:
    """Return why the settings let "auto" do no more than search; "" if it may train."""
    if settings.seconds is not None:
        return f"seconds={settings.seconds:g} bounds auto"
    if settings.budget is not None and settings.budget < TRAINS_FROM:
        return f"auto's budget of {settings.budget} is below {TRAINS_FROM}"
    return "" if settings.asks_the_task else "auto is given another loss than the task's, or another meaning of weights"


# the ways that a searched composition is compared with
PLAIN = ("base", "best_single")
REASONS = {
    "average": "the members' probabilities, averaged",
    "best_single": "it answers the examples already, far better than prompts alone",
    "program": "the instruction asks for both skills, and it answers the examples far better than prompts alone",
}


def guard(
    asked: str | None, held_out_losses: Mapping[str, float], *, guarded: bool, best_of_all: bool = False
) -> tuple[str, str]:
    """Return the name of the trial to return, and the reason; `held_out_losses` has the losses of all trials by name.

    If `asked` is None, that is the better of "base" and "best_single". Otherwise it is `asked`, unless it is `guarded` and
    has a higher loss than the better of these two, which then replaces it. With `best_of_all` a guarded choice is the trial
    of the lowest loss, among equal ones the better of these two.
    """
    if asked is not None and not guarded:
        return asked, REASONS.get(asked, f"auto became {asked}") if best_of_all else "as asked"
    plain = min(PLAIN, key=lambda name: held_out_losses[name])
    if asked is None:
        return plain, "there was nothing to learn"
    if best_of_all:
        best = min(held_out_losses, key=lambda name: (held_out_losses[name], name != plain))
        return best, "lowest loss on held-out examples"
    if held_out_losses[asked] > held_out_losses[plain]:
        figures = f"{held_out_losses[asked]:.3f} against {held_out_losses[plain]:.3f}"
        return plain, f"{asked} was worse than {plain} on held-out examples: loss {figures}"
    return asked, "not worse than base and best single on held-out examples"
