"""The training of several expert models on one base in the same passes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.common.descent import seeded
from loraweave.common.options import Count, Positive, Whole, check_options, options_of
from loraweave.composer.experts.expert_model import ExpertModel, trainer
from loraweave.composer.experts.parts import key_of
from loraweave.composer.experts.running import Running
from loraweave.composer.model.batches import EncodedRow, tensors_in
from loraweave.composer.model.kinds import linear
from loraweave.composer.train.jobs import WARMUP_STEPS, Pace, TrainingJob
from loraweave.composer.train.rows import Judging
from loraweave.composer.train.state import SharedReport
from loraweave.errors import TrainingError
from loraweave.routers.tokens._call import has_two_sequences, unprompted


def train_experts(
    model: Any,
    tokenizer: Any,
    jobs: Mapping[str, tuple[ExpertModel, Any]],
    *,
    steps: Count = 60,
    lr: Positive = 3e-3,
    batch_size: Count = 8,
    warmup: Whole = WARMUP_STEPS,
    seed: int = 0,
    jobs_per_batch: Count = 4,
    held_out: float | Mapping[str, Any] | None = None,
    evaluate_every: Count = 10,
    patience: Count | None = None,
    memory_bytes: Count | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> SharedReport:
    """Train expert models (`lw.experts`) on this base in place, in shared passes; return the report.

    `jobs` is {name: (expert model, examples)}. Each model has experts and gates of its own and learns from its own examples,
    a dataset as for `ExpertModel.fit`, rows with tasks included, by the loss of `train_adapters` and the losses of its
    recipe, with the gradients of being trained alone: AdamW without weight decay, clipped to norm 1. Rows share passes and
    jobs end as in `train_adapters`, whose options these are. With `checkpoint`, the same call resumes an interrupted
    training, with models as they were before it or as the interruption left them.

    Raises TrainingError for a model of another base, for one that is given twice, and for recipes whose experts are not
    updates of linear layers; InvalidTask for rows that cannot be used, or have no task where the recipe needs it,
    UnknownName for unknown tasks, PackageMissing where no extension trains experts.
    """
    pace = Pace(steps, lr, batch_size, seed, warmup)
    shared_by: dict[str, Any] = {"jobs_per_batch": jobs_per_batch, "memory_bytes": memory_bytes}
    checked = {**vars(pace), **shared_by, "evaluate_every": evaluate_every, "patience": patience}
    check_options("train_experts()", checked, options_of(train_experts), error=TrainingError)
    judging, kept = Judging(held_out, evaluate_every, patience), {"checkpoint": checkpoint, "progress": progress}
    report: SharedReport = trainer().train_together(model, tokenizer, jobs, pace, judging, **shared_by, **kept)
    return report


class ExpertJob(TrainingJob):
    """The experts and gates of a model as a `TrainingJob`, for rows that have tasks of their own, or else `task`.

    Gates see the job's own rows alone, and the recipe's losses are its penalty. A step's random draws (dropout, noise of
    gates) follow from `seed`, the job's name and the step, with which torch's generator is seeded; they are drawn for the
    width that the job's rows have alone, whatever the width of the pass. Raises TrainingError for recipes whose experts are
    not updates of linear layers, ScopeError or UnknownName for a task that is missing or unknown.
    """

    def __init__(self, name: str, model: ExpertModel, *, task: str | int | None = None, seed: int = 0) -> None:
        require_shareable(name, model)
        self.name = name
        self.model = model
        self.task = task
        self.seed = seed
        self._rows: Sequence[EncodedRow] = ()
        self._step: int | None = None
        self._num_drawn = 0
        self._running = Running(model, model.task_ids(task))
        self._own = OwnWidth()

    @property
    def layers(self) -> Collection[str]:
        return self.model.sites.keys()

    def parameters(self) -> list[Tensor]:
        """Return the parameters of experts and gates that train."""
        return [parameter for parameter in self.model.expert_parameters().values() if parameter.requires_grad]

    def take(self, rows: Sequence[EncodedRow], step: int | None) -> None:
        self._rows, self._step, self._num_drawn = rows, step, 0

    def begin(self, inputs: Mapping[str, Any], prompt_BT: Tensor | None) -> None:
        """Prepare the gates for the job's rows of a call with `inputs`; with gradients, record scores for the losses."""
        learns = torch.is_grad_enabled()
        # not the base, which keeps its own mode
        self.model.layers.train(learns)
        self.model.gates.train(learns)
        base = self.model.base_model
        self._own = OwnWidth.of(inputs, self._rows, two_sequences=has_two_sequences(base))
        cut = {name: self._own.cut(value, mask=name == "attention_mask") for name, value in tensors_in(inputs).items()}
        # of the rows, or of all where the job has one task; None where no row has any
        tasks = [getattr(row, "expert", -1) for row in self._rows]
        task_B = self.model.task_ids(tasks if any(task >= 0 for task in tasks) else self.task)
        self._running = Running(self.model, task_B, notes=learns)
        with unprompted():
            self._running.begin(base, (), {**inputs, **cut})
            if prompt_BT is not None:
                self._running.call.prompt_BT = self._own.cut(prompt_BT, mask=True).bool()
            self._tell_decoder_tokens()
            self._seed_draws()
            self.model.show_gates(self._running.call)

    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        """Return the experts' update, (B, T, O), to the output of the linear layer at the path `layer`."""
        module: nn.Module = self.model.base_model.get_submodule(layer)
        shape = linear.shape(module)
        assert shape is not None
        own_BTI = self._own.cut(x_BTI)
        zero_BTO = own_BTI.new_zeros(*own_BTI.shape[:-1], shape.num_outputs)
        self._seed_draws()
        with unprompted():
            own_BTO = self.model.with_experts(layer, module, (own_BTI,), zero_BTO, self._running.call)
        return self._own.put(own_BTO, x_BTI.shape[1])

    def penalty(self) -> Tensor | None:
        """Return the sum of the recipe's losses, or None if it has none."""
        step = self._running.call.step
        terms = {} if step is None else self.model.terms_of(step)
        return torch.stack(list(terms.values())).sum() if terms else None

    def _tell_decoder_tokens(self) -> None:
        """Note the decoder's real tokens by the lengths of the rows' targets, since a shared batch has no labels."""
        step = self._running.call.step
        if step is not None and step.decoder_BT is not None and self._rows:
            sizes_B = torch.tensor([len(row.target) for row in self._rows], device=step.decoder_BT.device)
            numbers_T = torch.arange(step.decoder_BT.shape[1], device=sizes_B.device)
            step.decoder_BT = self._running.call.decoder_BT = numbers_T < sizes_B[:, None]

    def _seed_draws(self) -> None:
        # other jobs draw in between, and a training that goes on has drawn nothing before
        if self._step is not None and torch.is_grad_enabled():
            torch.manual_seed(seeded(self.seed, self.name, self._step, self._num_drawn).initial_seed())
            self._num_drawn += 1


def require_shareable(name: str, model: ExpertModel) -> None:
    """Raise TrainingError unless the experts update linear layers and `fit` changes no parameter without a gradient."""
    if model.moved():
        raise TrainingError(
            f"job {name!r}: recipe {model.recipe.name!r} has a bias that fit() moves after each step and a shared pass does "
            "not: train it alone, or with bias_rate=0"
        )
    for site in model.sites:
        module, form = model.base_model.get_submodule(site), model.layers[key_of(site)]
        if model.sites[site].parts or not form.is_update or linear.shape(module) is None:
            raise TrainingError(
                f"job {name!r}: the experts of recipe {model.recipe.name!r} at {site!r} are not an update of a linear "
                "layer, so its rows cannot share a pass with others: train it alone"
            )


@dataclass(frozen=True)
class OwnWidth:
    """The columns of a job's own tokens in a pass: {width of a tensor: (first column, number of columns)}.

    An encoder-decoder has an entry for each of its two sequences. Cutting to these columns makes random draws and counts of
    padding independent of other jobs' rows.
    """

    columns: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], rows: Sequence[EncodedRow], *, two_sequences: bool) -> Self:
        """Return the columns that `rows` use; `inputs` are a call's arguments for these rows. Without a mask, all."""
        mask_BT = inputs.get("attention_mask")
        if not isinstance(mask_BT, Tensor) or mask_BT.ndim != 2 or not mask_BT.any():
            return cls()
        real = mask_BT.any(dim=0).nonzero()[:, 0].tolist()
        if not two_sequences:
            return cls({mask_BT.shape[1]: (real[0], real[-1] + 1 - real[0])})
        decoder_ids = inputs.get("decoder_input_ids")
        if decoder_ids is None or not rows or decoder_ids.shape[1] == mask_BT.shape[1]:
            return cls()
        # as `pad_apart` makes it of these rows
        decoder = max(2, *(len(row.target) for row in rows))
        encoder = real[-1] + 1
        return cls({mask_BT.shape[1]: (0, encoder + (encoder == decoder)), decoder_ids.shape[1]: (0, decoder)})

    def cut(self, value: Tensor, *, mask: bool = False) -> Tensor:
        """Return the job's own columns of a tensor (rows, tokens, ..), the last one repeated if the pass has fewer.

        Repeated columns are padding (`pad_apart` adds it): with `mask` they are 0. Tensors of other widths are returned
        unchanged.
        """
        if value.ndim < 2 or value.shape[1] not in self.columns:
            return value
        first, number = self.columns[value.shape[1]]
        own_columns = value[:, first : first + number]
        lacking = number - own_columns.shape[1]
        if not lacking:
            return own_columns
        more = own_columns[:, -1:].expand(-1, lacking, *own_columns.shape[2:])
        return torch.cat([own_columns, torch.zeros_like(more) if mask else more], dim=1)

    def put(self, value: Tensor, width: int) -> Tensor:
        """Return a tensor (rows, `width`, features) with `value` in the job's own columns and 0 elsewhere."""
        if width not in self.columns:
            return value
        first = self.columns[width][0]
        kept = value[:, : width - first]
        return functional.pad(kept, (0, 0, first, width - first - kept.shape[1]))
