"""Trains the experts and gates of an expert model; the base stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loraweave.composer.experts.beginning import began, determining, remembered
from loraweave.composer.experts.checkpointing import same_call
from loraweave.composer.experts.settings import ExpertSettings
from loraweave.composer.experts.task_rows import owners_of
from loraweave.composer.router_training.checkpointed_blocks import checkpointed_blocks
from loraweave.composer.router_training.kept_state import KeptState
from loraweave.composer.router_training.rows import RowReader
from loraweave.composer.training.caller_randomness import caller_randomness
from loraweave.errors import TrainingError
from loraweave.hub.progress import progress_bar

if TYPE_CHECKING:
    from loraweave.composer.experts.expert_model import ExpertModel


def fit(model: ExpertModel, dataset: Any, tokenizer: Any, given: Mapping[str, Any]) -> None:
    """Trains `model` on a dataset with these `ExpertSettings`; what `ExpertModel.fit` says."""
    # transformers' Trainer is slow to import
    from loraweave.composer.experts.course import Course
    from loraweave.composer.experts.trainer import ExpertTrainer

    settings = ExpertSettings.of(model.recipe, given)
    if (asked := getattr(model.base_model, "main_input_name", "input_ids")) != "input_ids":
        raise TrainingError(
            f"fit() reads texts and token ids, and {type(model.base_model).__name__} takes {asked}: train in a loop of your "
            "own, in which a call with labels has the terms in its loss"
        )
    owners = owners_of(model)
    rows = RowReader(owners, model.base_model, tokenizer).read(dataset)
    held = []
    if settings.evaluation is not None:
        reader = RowReader(owners.closed(), model.base_model, tokenizer)
        held = reader.read(settings.evaluation, what="evaluation", first=len(rows))
    before = model.tasks
    if tuple(owners.places) != before:
        model.take_tasks(tuple(owners.places))
    learning = [name for name, parameter in model.expert_parameters().items() if parameter.requires_grad]
    begun = "" if settings.checkpoint is None else began(model)
    kept = KeptState.of(model.recipe.name, [*determining(model, learning), begun], settings, rows, held)
    course = Course(model, settings, rows, held, kept)
    with ExitStack() as stack:
        stack.enter_context(caller_randomness())
        stack.enter_context(_as_it_was(model))
        stack.enter_context(checkpointed_blocks(model.base_model, settings.gradient_checkpointing, context_fn=same_call))
        folder = stack.enter_context(TemporaryDirectory(prefix="loraweave-"))
        try:
            trainer = ExpertTrainer(model, settings, rows, tokenizer, course, folder=folder)
        except TrainingError:
            if model.tasks != before:
                model.take_tasks(before)
            raise
        if begun:
            stack.enter_context(remembered(model, begun))
        bar = stack.enter_context(progress_bar(settings.progress and trainer.is_world_process_zero(), field="seen"))
        course.show(bar)
        if course.progress.first < settings.steps:
            trainer.train_from(course.progress.first)
        course.finish()


@contextmanager
def _as_it_was(model: ExpertModel) -> Iterator[None]:
    """After it, each module of the base is in the mode in which it was, and its settings are; the experts are for use."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    modes = [(module, module.training) for module in model.base_model.modules()]
    use_cache = getattr(model.config, "use_cache", None)
    shared = [(each._shared_state, dict(each._shared_state)) for each in (AcceleratorState, GradientState, PartialState)]
    try:
        yield
    finally:
        for state, before in shared:
            state.clear()
            state.update(before)
        for parameter in model.expert_parameters().values():
            parameter.grad = None
        # what mixed precision of a launched accelerate has put in its place
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.eval()
        for module, mode in modes:
            module.training = mode
