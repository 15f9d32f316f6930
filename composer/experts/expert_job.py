"""An expert model as one of many jobs on its base."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.batches import EncodedRow
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.own_width import OwnWidth
from loraweave.composer.experts.parts import key_of
from loraweave.composer.experts.running import Running, has_two_sequences
from loraweave.composer.experts.task_rows import TaskRow
from loraweave.composer.layer_kinds.linear import shape as linear_shape
from loraweave.composer.training.seeding import seeded
from loraweave.errors import TrainingError
from loraweave.routers.routing.prompts import unprompted


class ExpertJob:
    """A `TrainingJob`: the experts and gates of the model, for rows that are of their own tasks, or else of `task`.

    Gates see the job's own rows alone, and the recipe's losses are its penalty. What a step draws (dropout, noise of gates)
    follows from `seed`, the job's name and the step, for which torch's generator is seeded, and is drawn for the tokens that
    its rows have alone, whatever the width of the pass. Raises TrainingError for recipes whose experts are no updates of
    linear layers, ScopeError or UnknownName for a task that is missing or unknown.
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
        """Those of experts and gates."""
        return [parameter for parameter in self.model.expert_parameters().values() if parameter.requires_grad]

    def take(self, rows: Sequence[EncodedRow], step: int | None) -> None:
        self._rows, self._step, self._num_drawn = rows, step, 0

    def begin(self, inputs: Mapping[str, Any], prompt_BT: Tensor | None) -> None:
        """Shows the gates the job's rows; with gradients, takes notes for the recipe's losses."""
        learns = torch.is_grad_enabled()
        # not the base, which keeps its own mode
        self.model.layers.train(learns)
        self.model.gates.train(learns)
        base = self.model.base_model
        self._own = OwnWidth.of(inputs, self._rows, two_sequences=has_two_sequences(base))
        own = {
            name: self._own.cut(value, mask=name == "attention_mask") if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        self._running = Running(self.model, self._task_ids(), notes=learns)
        with unprompted():
            self._running.begin(base, (), own)
            if prompt_BT is not None:
                self._running.call.prompt_BT = self._own.cut(prompt_BT, mask=True).bool()
            self._tell_decoder_tokens()
            self._seed_draws()
            self.model.show_gates(self._running.call)

    def low_rank(self, layer: str) -> None:
        """Never: the weights are the gates'."""

    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        """What the site's experts add to its output."""
        module: nn.Module = self.model.base_model.get_submodule(layer)
        shape = linear_shape(module)
        assert shape is not None
        own_BTI = self._own.cut(x_BTI)
        zero_BTO = own_BTI.new_zeros(*own_BTI.shape[:-1], shape.num_outputs)
        self._seed_draws()
        with unprompted():
            own_BTO = self.model.with_experts(layer, module, (own_BTI,), zero_BTO, self._running.call)
        return self._own.put(own_BTO, x_BTI.shape[1])

    def penalty(self) -> Tensor | None:
        """The recipe's losses together, if it has any."""
        step = self._running.call.step
        terms = {} if step is None else self.model.terms_of(step)
        return torch.stack(list(terms.values())).sum() if terms else None

    def _task_ids(self) -> Tensor | None:
        """task_B of the rows; one for all of them where the job has one, None where no row has any."""
        tasks = [row.task for row in self._rows if isinstance(row, TaskRow)]
        return self.model.task_ids(tasks if any(task >= 0 for task in tasks) else self.task)

    def _tell_decoder_tokens(self) -> None:
        """A batch of an encoder-decoder has no labels to tell them by, but the rows have."""
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
    """Raises TrainingError for a recipe whose experts are no updates of linear layers."""
    for site in model.sites:
        module, form = model.base_model.get_submodule(site), model.layers[key_of(site)]
        if model.recipe.branches or model.sites[site].parts or not form.is_update or linear_shape(module) is None:
            raise TrainingError(
                f"job {name!r}: the experts of recipe {model.recipe.name!r} at {site!r} are no update of a linear "
                "layer, so its rows cannot share a pass with others: train it alone"
            )
