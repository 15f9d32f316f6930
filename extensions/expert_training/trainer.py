"""The training of the experts and gates of an expert model, and of parameters that a user unfroze in its base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from loraweave import TrainingError
from loraweave.extend import progress_bar
from loraweave.extend.recipes import ExpertModel
from loraweave.extend.training import KeptState, Stream, caller_randomness, checkpointed_blocks, seeded
from loraweave.extensions.expert_training.feeds import Feed, feed_of, owners_of
from loraweave.extensions.expert_training.identity import remember_start, start_digest, training_identity
from loraweave.extensions.expert_training.starts import start_from as start_from
from loraweave.extensions.expert_training.steps import ExpertSettings, ExpertSteps
from loraweave.extensions.expert_training.together import train_together as train_together


def fit(model: ExpertModel, dataset: Any, tokenizer: Any, given: Mapping[str, Any], *, same_call: Callable[[], Any]) -> None:
    """Train `model` on a dataset with `given`, the fields of `ExpertSettings`, as `ExpertModel.fit` says.

    `same_call` returns the contexts in which a block that gradient checkpointing runs again sees the same call.
    """
    settings, owners = ExpertSettings.of(model.recipe, given), owners_of(model.recipe)
    feed = feed_of(model, dataset, tokenizer, settings.loss, digests=settings.checkpoint is not None)
    rows, evaluation = feed.read(dataset, owners), settings.evaluation
    held: Sequence[Any] = () if evaluation is None else feed.read(evaluation, owners.closed(), "evaluation")
    before = model.tasks
    if tuple(owners.places) != before:
        model.take_tasks(tuple(owners.places))
    begun = "" if settings.checkpoint is None else start_digest(model)
    kept = KeptState.of(model.recipe.name, [*training_identity(model, list(model.learning())), begun], settings, rows, held)
    course = ExpertSteps(model, settings, rows, held, kept, feed)
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
            stack.enter_context(remember_start(model, begun))
        bar = stack.enter_context(progress_bar(settings.progress and trainer.is_world_process_zero(), field="seen"))
        course.progress.show(bar, model.recipe.name)
        if course.progress.first < settings.steps:
            trainer.train_from(course.progress.first)
        course.finish()


@contextmanager
def _as_it_was(model: ExpertModel) -> Iterator[None]:
    """Restore the base's modes and settings and accelerate's state afterwards; leave the experts in evaluation mode."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    modes = [(module, module.training) for module in model.base_model.modules()]
    use_cache = getattr(model.config, "use_cache", None)
    shared = [(kind._shared_state, dict(kind._shared_state)) for kind in (AcceleratorState, GradientState, PartialState)]
    try:
        yield
    finally:
        for state, before in shared:
            state.clear()
            state.update(before)
        for parameter in model.parameters():
            parameter.grad = None
        # a launched accelerate with mixed precision has replaced the forward
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.eval()
        for module, mode in modes:
            module.training = mode


class ExpertTrainer(Trainer):  # type: ignore[misc]
    """A Trainer of an expert model, whose `ExpertSteps` keep, watch and check the steps.

    In one process the model stays on its device; each of several processes has the model on a device of its own.
    """

    def __init__(
        self,
        model: ExpertModel,
        settings: ExpertSettings,
        rows: Sequence[Any],
        feed: Feed,
        course: ExpertSteps,
        *,
        folder: str,
    ) -> None:
        self._settings, self._course, self.feed = settings, course, feed
        super().__init__(
            model=model,
            args=_arguments(model, settings, folder),
            data_collator=feed.inputs_of,
            train_dataset=_RowsOfSteps(rows, settings),
            optimizers=(course.progress.optimizer, _scheduler(course, settings)),
            callbacks=[course, *settings.callbacks],
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise TrainingError(
                "experts are trained with the whole base in each process, but FSDP or DeepSpeed was launched: launch "
                "processes without them, or one with a model that device_map spreads"
            )
        self.remove_callback(PrinterCallback)
        # compute_loss scales each pass by its share of its step
        self.loss_is_scaled_for_ga = True
        # older versions have accelerate divide by the passes a second time
        self.accelerator.gradient_accumulation_steps = 1
        course.begin(self)

    def get_train_dataloader(self) -> Any:
        """Return a loader of the batches of all steps' passes, in order."""
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_size=self.args.per_device_train_batch_size, collate_fn=self.feed.inputs_of)
        )

    def compute_loss_context_manager(self) -> ExitStack:
        """Return the contexts of a pass: products in bfloat16 if the settings ask for them, and its own random numbers."""
        stack: ExitStack = super().compute_loss_context_manager()
        device = self.model.device
        stack.enter_context(torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type))
        place = self._course.num_passes * self.args.world_size + self.args.process_index
        torch.manual_seed(seeded(self._settings.seed, "dropout", self.state.global_step, place).initial_seed())
        stack.enter_context(self._settings.products(device))
        return stack

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the pass's share of its step's loss: a mean over the step's tokens or rows, terms as a mean over passes."""
        output, mean = self.feed.run(model, inputs)
        count = self.feed.count(inputs)
        # the tokens or rows in all passes and processes of a step
        whole_count = count if num_items_in_batch is None else num_items_in_batch
        loss = mean * (count / (self._settings.batch_size if self.feed.counts_rows else whole_count))
        terms = {name: term / self.args.gradient_accumulation_steps for name, term in self.model.terms.items()}
        self._course.see(loss, terms, inputs)
        # gradients of several processes are averaged
        whole = torch.stack([self.accelerator.num_processes * loss, *(term.to(loss) for term in terms.values())]).sum()
        return (whole, output) if return_outputs else whole

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: `ExpertSteps` has restored the state already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Do nothing: `ExpertSteps` has restored the state already."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: random numbers depend on seed and step alone."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.args.world_size > 1:
            super()._move_model_to_device(model, device)

    def train_from(self, step: int) -> None:
        """Take the steps that are left after `step` steps."""
        if not step:
            self.train()
            return
        # Trainer resumes from a checkpoint folder, of which it then reads this file alone
        args, folder = self.args, Path(self.args.output_dir)
        TrainerState(
            global_step=step,
            max_steps=args.max_steps,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            train_batch_size=args.train_batch_size,
        ).save_to_json(str(folder / "trainer_state.json"))
        self.train(resume_from_checkpoint=str(folder))


class _RowsOfSteps(Dataset[Any]):
    """The rows of all steps; those of a step are ordered by length, so that passes have little padding."""

    def __init__(self, rows: Sequence[Any], settings: ExpertSettings) -> None:
        self._stream = Stream(rows, settings.seed, "rows")
        self._settings = settings
        self._step: tuple[int, list[Any]] = (-1, [])

    def __len__(self) -> int:
        return self._settings.steps * self._settings.batch_size

    def __getitem__(self, place: int) -> Any:
        step, offset = divmod(place, self._settings.batch_size)
        if self._step[0] != step:
            self._step = (step, sorted(self._stream.at(step, self._settings.batch_size), key=len))
        return self._step[1][offset]


def _arguments(model: ExpertModel, settings: ExpertSettings, folder: str) -> TrainingArguments:
    """Return the Trainer's arguments. Raises TrainingError for an indivisible batch and for another device."""
    accumulation = settings.gradient_accumulation or 1
    args = TrainingArguments(
        output_dir=folder,
        max_steps=settings.steps,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.highest_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip or 0.0,
        seed=settings.seed,
        use_cpu=model.device.type == "cpu",
        average_tokens_across_devices=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    parts = accumulation * args.world_size
    if settings.batch_size % parts:
        raise TrainingError(
            f"batch_size is {settings.batch_size}, which does not divide by {accumulation} passes (gradient_accumulation) "
            f"of {args.world_size} processes: take a multiple of {parts}"
        )
    args.per_device_train_batch_size = settings.batch_size // parts
    # a Trainer in one process would spread the model over all GPUs
    args._n_gpu = min(1, args.n_gpu)
    device, trainer_device = model.device, args.device
    if args.world_size == 1 and device.type == "cuda" and device != trainer_device and not hasattr(model, "hf_device_map"):
        raise TrainingError(
            f"the model is on {device}, but Trainer trains on {trainer_device}: move it there, or set CUDA_VISIBLE_DEVICES"
        )
    return args


def _scheduler(course: ExpertSteps, settings: ExpertSettings) -> torch.optim.lr_scheduler.LambdaLR:
    progress = course.progress
    for group in progress.optimizer.param_groups:
        group["initial_lr"] = settings.highest_rate
    return torch.optim.lr_scheduler.LambdaLR(
        progress.optimizer, lambda step: settings.rate(step) / settings.highest_rate, last_epoch=progress.first - 1
    )
