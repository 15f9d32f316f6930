"""Trains the experts and gates of an expert model, and what of its base was unfrozen by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loraweave.composer.experts.beginning import began, determining, remembered
from loraweave.composer.experts.checkpointing import same_call
from loraweave.composer.experts.feed import TokenFeed
from loraweave.composer.experts.settings import ExpertSettings
from loraweave.composer.experts.task_rows import owners_of
from loraweave.composer.experts.tensor_rows import TensorFeed, TensorReader, are_tensors
from loraweave.composer.router_training.checkpointed_blocks import checkpointed_blocks
from loraweave.composer.router_training.kept_state import KeptState
from loraweave.composer.router_training.rows import Owners, RowReader
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
    owners, base = owners_of(model), model.base_model
    tensors = are_tensors(dataset, base, settings.loss)

    def reader(owners: Owners) -> RowReader | TensorReader:
        if not tensors:
            return RowReader(owners, base, tokenizer)
        return TensorReader(owners, base, settings.loss, digests=settings.checkpoint is not None)

    rows = reader(owners).read(dataset)
    held: Sequence[Any] = []
    if settings.evaluation is not None:
        held = reader(owners.closed()).read(settings.evaluation, what="evaluation")
    before = model.tasks
    if tuple(owners.places) != before:
        model.take_tasks(tuple(owners.places))
    begun = "" if settings.checkpoint is None else began(model)
    kept = KeptState.of(model.recipe.name, [*determining(model, list(model.learning())), begun], settings, rows, held)
    feed = TensorFeed(model, settings.loss) if tensors else TokenFeed(model, tokenizer)
    course = Course(model, settings, rows, held, kept)
    with ExitStack() as stack:
        stack.enter_context(caller_randomness())
        stack.enter_context(_as_it_was(model))
        stack.enter_context(checkpointed_blocks(model.base_model, settings.gradient_checkpointing, context_fn=same_call))
        folder = stack.enter_context(TemporaryDirectory(prefix="loraweave-"))
        try:
            trainer = ExpertTrainer(model, settings, rows, feed, course, folder=folder)
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
        for parameter in model.parameters():
            parameter.grad = None
        # what mixed precision of a launched accelerate has put in its place
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.eval()
        for module, mode in modes:
            module.training = mode
