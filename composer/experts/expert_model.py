"""A base model with trainable LoRA experts, as `lw.experts` makes it."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import loraweave.registry as registry
from loraweave.common.process import holding
from loraweave.composer.experts.forms._form import Form, Weigh
from loraweave.composer.experts.parts import READER, ExpertParts, Parts, Starts, key_of, make_parts, places_of, shapes_of
from loraweave.composer.experts.running import RUNNING, Hook, LikeBase, Running, require_same_call, same_call
from loraweave.composer.experts.saving import (
    as_adapter,
    experts_as_files,
    one_expert,
    read_saved_experts,
    require_updates,
    write_experts,
)
from loraweave.composer.live.call import arguments_of
from loraweave.composer.live.kernels._parts import own_precision
from loraweave.composer.model.batches import IGNORED, tensors_in
from loraweave.errors import CompositionError, PackageMissing, ScopeError, TrainingError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import base_id
from loraweave.hub.formats._card import README, shared_card
from loraweave.hub.sources import push
from loraweave.routers.recipes._gate import Call, Gate, Weighing
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site
from loraweave.routers.tokens._call import prompted, with_tokenizer
from loraweave.routers.tokens._learned import Step, TrainingReport


class ExpertModel(LikeBase, ExpertParts):
    """A base model with a recipe's experts and gates, which act only in calls of this object; the base alone is unchanged.

    It is called and generates like the base, in transformers' pipelines and Trainers too; it has the base's attributes, and
    the base's parameters are frozen until `close()`. `task` gives the tasks of the rows, by name or id, one for each row or
    one for all, to recipes whose gates use tasks. In training mode the recipe's losses are added to the loss of a call with
    labels, in proportion to the call's share of the labels of a Trainer's step (`num_items_in_batch`); `terms` has the
    losses of the last call. `shapes`, {site: ExpertShape}, replaces the recipe's shapes, and `starts`, {site: [(a_RI, b_RO)
    or None]}, its first factors; `names` are the names of the first experts.
    """

    def __init__(
        self,
        base_model: nn.Module,
        recipe: Recipe,
        *,
        tokenizer: Any = None,
        shapes: Mapping[str, ExpertShape] | None = None,
        starts: Starts | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.terms, self.own_loss, self.notes, self.report, self.interrupted = {}, None, None, None, ("", "")
        self._given, self._starts = shapes, starts
        self.names = tuple(names)
        self._take(make_parts(base_model, recipe, shapes, starts))
        self._learning = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
        base_model.requires_grad_(False)
        model_class = type(self)
        self._handles = [base_model.register_forward_pre_hook(Hook(self, model_class._before_call), with_kwargs=True)]
        for name, site in self.sites.items():
            if not site.parts:
                self._put_in(name, model_class._after_site, name)
            for number, part in enumerate(site.parts):
                self._put_in(part.name, model_class._after_part, name, number, before=model_class._before_part)
        for block in self.form.blocks(base_model, recipe, self.sites):
            self._put_in(block, model_class._after_block, block, before=model_class._before_block)

    def _put_in(self, path: str, after: Any, *place: Any, before: Any = None) -> None:
        """Run the methods `before` and `after` around the base's module at `path`, with `place` as their first arguments."""
        module = self.base_model.get_submodule(path)
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(Hook(self, before, *place)))
        self._handles.append(module.register_forward_hook(Hook(self, after, *place)))

    def forward(self, *args: Any, task: Any = None, **kwargs: Any) -> Any:
        """Return the base's output, with the recipe's losses added to its `loss` in training mode."""
        self._require_open()
        if self.training and torch.is_grad_enabled():
            require_same_call(self.base_model)
        running = Running(self, self.task_ids(task), notes=self.training)
        output = self.form.run(self, running, args, kwargs)
        # without return_dict the loss is the first of a tuple
        of_tuple = isinstance(output, tuple) and arguments_of(self.base_model, args, kwargs).get("labels") is not None
        loss = output[0] if of_tuple else getattr(output, "loss", None)
        self.terms, self.own_loss = {}, loss
        if running.call.step is not None:
            self.notes = running.call.step
            self.terms = self.terms_of(running.call.step)
            if self.terms and loss is not None:
                added = torch.stack([term.to(loss) for term in self.terms.values()]).sum()
                loss = loss + added * _share_of_step(kwargs)
                if of_tuple:
                    return (loss, *output[1:])
                output.loss = loss
        return output

    def terms_of(self, step: Step) -> dict[str, Tensor]:
        """Return {name: loss} of the recipe's losses in one pass."""
        factors = {name: layer.a_SI for name, layer in self.named_layers().items() if hasattr(layer, "a_SI")}
        return {**self.recipe.losses(step), **self.recipe.factor_losses(factors)}

    def generate(self, *args: Any, task: Any = None, **kwargs: Any) -> Any:
        """Return the output of the base's `generate`; a gate's decisions by the prompt hold for the whole answer."""
        if not self.form.generates:
            raise ScopeError(f"recipe {self.recipe.name!r} generates no tokens: call the model")
        self._require_open()
        tensors = tensors_in(kwargs)
        names = ("inputs", "input_ids", "inputs_embeds", getattr(self.base_model, "main_input_name", "input_ids"))
        main: Any = args[0] if args else next((tensors[name] for name in names if name in tensors), None)
        mask_BT = tensors.get("attention_mask")
        is_text = main is not None and main.ndim == 2 and not main.is_floating_point()
        prompts = prompted(main, torch.ones_like(main) if mask_BT is None else mask_BT) if is_text else nullcontext()
        running = Running(self, self.task_ids(task), generates=True)
        with holding(RUNNING, running), prompts:
            running.begin_generation(self.base_model, main, tensors.get("inputs_embeds"), mask_BT)
            self.show_gates(running.call)
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    def show_gates(self, call: Call) -> None:
        """Let every gate prepare for `call` (`Gate.begin`)."""
        with with_tokenizer(self.tokenizer), own_precision(self.device):
            for gate in self.gates.values():
                gate.begin(call)  # type: ignore[operator]

    def with_experts(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor, call: Call) -> Tensor:
        """Return the site's output with its experts; y is the output of the site's module for `args`."""
        layer: Any = self.layers[key_of(name)]
        output: Tensor = layer(module, args, y, self._weighing(self.sites[name], layer, call))
        return output

    def _before_call(self, running: Running, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.begin(module, args, kwargs)
        self.show_gates(running.call)

    def _after_site(self, running: Running, name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return self.with_experts(name, module, args, y, running.call)

    def _before_part(self, running: Running, name: str, part: int, _: nn.Module, args: tuple[Any, ...]) -> Any:
        """Return new arguments for part number `part` of a site, instead of `args`."""
        layer: Any = self.layers[key_of(name)]
        seen = running.within.setdefault(name, {})
        weigh = self._weighing(self.sites[name], layer, running.call)
        return layer.before(part, self.base_model.get_submodule(name), args, weigh, seen)

    def _after_part(self, running: Running, name: str, part: int, _: nn.Module, args: tuple[Any, ...], y: Tensor) -> Any:
        """Return a new output of part number `part` of a site, in place of y, which the part returned for `args`."""
        layer: Any = self.layers[key_of(name)]
        is_last = part + 1 == len(self.sites[name].parts)
        seen = running.within.pop(name) if is_last else running.within[name]
        return layer.after(part, self.base_model.get_submodule(name), args, y, seen)

    def _before_block(self, running: Running, block: str, _: nn.Module, args: tuple[Any, ...]) -> Any:
        return self.form.before_block(running, block, args)

    def _after_block(self, running: Running, block: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.form.after_block(running, block, output)

    @property
    def form(self) -> type[Form]:
        """The class of the modules that compute the experts' outputs at each site, such as a sum of low-rank updates."""
        form: type[Form] = registry.get("forms", self.recipe.form)
        return form

    @property
    def reader(self) -> Gate | None:
        """The one gate that is shown each call, on behalf of all gates, or None if every gate is shown the call."""
        return dict(self.gates.items()).get(READER)  # type: ignore[return-value]

    def expert(self, number: int) -> Adapter:
        """Return one expert alone, at weight 1 wherever it is, as an adapter of its own.

        Raises ScopeError for a form that is not an update of layers, UnknownName for a number that no expert has.
        """
        return one_expert(self.base_model, self.recipe, self.named_layers(), number)

    def adapter(self, task: str | int | None = None) -> Adapter:
        """Return the whole mixture as one adapter, if its weights are constant or depend on the given task alone.

        Raises ScopeError for weights that depend on the input, UnknownName for an unknown task.
        """
        require_updates(self.recipe, self.named_layers(), "the mixture")
        if not all(gate.static for gate in self.gates.values()):
            raise ScopeError(
                f"the weights of recipe {self.recipe.name!r} depend on the input, so that no one adapter has them: export "
                "its experts one by one (expert(number)), or save_pretrained() the whole"
            )
        task_B = self.task_ids(task)
        if task_B is not None and len(task_B) != 1:
            raise ScopeError(f"one adapter is the mixture of one task, and {len(task_B)} are given: make one of each")
        call, layers = Call(task_B=task_B), {}
        with torch.no_grad():
            self.show_gates(call)
            for name, layer in self.named_layers().items():
                gate = self.gate_of(self.sites[name])
                w_E = torch.ones(layer.shape.num_experts) if gate is None else gate(None, call).w_BTE.flatten()
                layers[name] = layer.factors(w_E)
        named = self.recipe.name if task is None else f"{self.recipe.name}-{task}"
        return as_adapter(self.base_model, self.recipe, named, layers, {} if task is None else {"task": str(task)})

    def fit(self, dataset: Any, tokenizer: Any = None, **settings: Any) -> Self:
        """Train experts and gates on a dataset with transformers' Trainer; return the model in evaluation mode.

        The dataset is {name of a task: rows or a Task}, or rows: pairs (input, target), {"input", "target"} with
        "instruction" and "task" where known, {"prompt", "target"}, or {"input_ids", "labels"}. The loss is that of the
        targets, with the recipe's terms. For other models than language models, such as image models, a row is one example,
        {input name: value}; its loss is the base's own for "labels", or the setting `loss`. Parameters of the base that were
        unfrozen by hand learn, too. A recipe without tasks takes the dataset's names. docs/experts.md explains `settings`.
        Afterwards there is a `training_report`.

        Raises InvalidTask for rows that cannot be used, UnknownName for unknown tasks, TrainingError for
        settings out of range, for parameters without a gradient, and for a loss or gradient that is not finite: the model
        then has the last good parameters. Raises PackageMissing where no extension trains experts.
        """
        self.require_trainable()
        trainer().fit(self, dataset, self.tokenizer if tokenizer is None else tokenizer, settings, same_call=same_call)
        return self

    def require_trainable(self) -> None:
        """Raise TrainingError for a closed model, and for one without trainable parameters."""
        if not self._handles:
            raise TrainingError("the expert model is closed, so its experts no longer run: make it again, and load() it")
        if not any(parameter.requires_grad for parameter in self.expert_parameters().values()):
            raise TrainingError(
                f"no parameter of recipe {self.recipe.name!r} requires a gradient, so there is nothing to fit"
            )

    @property
    def training_report(self) -> TrainingReport:
        """The report of `fit`, which is saved with the model. Raises TrainingError for a model that was not fitted."""
        if self.report is None:
            raise TrainingError(f"recipe {self.recipe.name!r} has not been trained: fit() it first")
        return TrainingReport.from_json(self.report)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **settings: Any) -> None:
        """Turn on the base's gradient checkpointing, with experts in blocks that run again; `fit` has a setting instead."""
        kwargs = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False, "context_fn": same_call}
        base: Any = self.base_model
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **settings)
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, **settings)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **settings: Any) -> None:
        """Turn on gradient checkpointing, by the name that later versions of transformers have for it."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **settings)

    def save_pretrained(self, folder: str | Path, *, is_main_process: bool | None = None, state_dict: Any = None) -> Path:
        """Write experts, gates, recipe and report as a folder, whole or not at all, that `lw.experts(folder, base)` reads.

        A Trainer, which passes the last two arguments, has files of its own in the folder, which stay; it writes in its main
        process alone. Raises WeightingError for a folder that holds something else or cannot be written, and for other
        values than a path.
        """
        if is_main_process is False:
            return Path(folder)
        if unfrozen := [name for name, parameter in self.base_model.named_parameters() if parameter.requires_grad]:
            warnings.warn(
                f"{folder} gets experts and gates only, but {unfrozen[0]!r} and the base's other unfrozen parameters, "
                f"{len(unfrozen)} in all, may have learned too: save the base as well, and make this from it",
                stacklevel=2,
            )
        state = self.expert_state()
        made = experts_as_files(self.base_model, self.recipe, self.shapes, self.names, state, self.report)
        return write_experts(folder, made, beside=is_main_process is not None)

    def push_to_hub(
        self, repository: str, *, token: str | None = None, private: bool | None = None, commit_message: str | None = None
    ) -> str:
        """Upload the folder of `save_pretrained`, with a card, to `owner/name` on the model hub; return the commit's id.

        `lw.experts("owner/name", base)` reads it back. Raises what `Adapter.push_to_hub` raises.
        """

        def write(folder: Path) -> None:
            self.save_pretrained(folder)
            base = base_id(self.base_model)
            code = f"experts = lw.experts({repository!r}, model, tokenizer=tokenizer)  # model: the base"
            sections = {"Experts": ", ".join(self.expert_names), "Tasks": ", ".join(self.tasks)}
            title = f"Experts of recipe {self.recipe.name}"
            (folder / README).write_text(shared_card(title, base, None, "experts", code, sections), encoding="utf-8")

        message = commit_message or f"experts of recipe {self.recipe.name}"
        return push(write, repository, token=token, private=private, message=message)

    def load(self, folder: str | Path) -> Self:
        """Load a saved expert model of the same recipe and base into this one, with its tasks if this model has none.

        Raises AdapterNotFound for a folder without an expert model, AdapterCorrupt for a damaged one, BaseModelMismatch for
        another base, WeightingError for another recipe; this model is then unchanged.
        """
        saved = read_saved_experts(folder)
        recipe = replace(self.recipe, tasks=self.tasks or tuple(saved.options.get("tasks", ())))
        saved.require_base(self.base_model)
        saved.require_same(recipe, shapes_of(self.base_model, recipe, self._given))
        tensors = saved.tensors(self.base_model, recipe)
        if recipe != self.recipe:
            self.take_tasks(recipe.tasks)
        self.load_state_dict(tensors, strict=False)
        self.names, self.report = saved.names, saved.report
        return self

    def take_tasks(self, tasks: tuple[str, ...]) -> None:
        """Set the recipe's `tasks`. Parts whose size depends on the number of tasks are rebuilt; all other parts stay."""
        recipe = replace(self.recipe, tasks=tasks)
        parts = make_parts(self.base_model, recipe, self._given, self._starts)
        before, by_hand = self.expert_state(), self.set_by_hand()
        self.recipe = recipe
        self._take(parts)
        with torch.no_grad():
            for name, value in self.expert_state().items():
                if name in before and before[name].shape == value.shape:
                    value.copy_(before[name])
        self.set_again(by_hand)

    def set_by_hand(self) -> dict[str, bool]:
        """Return {name: requires_grad} of experts' and gates' parameters where it differs from the recipe's."""
        trainable = {name: parameter.requires_grad for name, parameter in self.expert_parameters().items()}
        return {name: learns for name, learns in trainable.items() if learns != self._learns[name]}

    def set_again(self, by_hand: Mapping[str, bool]) -> None:
        """Set `requires_grad` of parameters of experts and gates by `by_hand`, a result of `set_by_hand`."""
        for name, parameter in self.expert_parameters().items():
            parameter.requires_grad_(by_hand.get(name, parameter.requires_grad))

    def close(self) -> None:
        """Remove the experts and restore the base byte for byte. Closing twice does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        hooks = self.base_model._forward_pre_hooks.values()
        others = [hook.owner for hook in hooks if isinstance(hook, Hook) and hook.owner is not None]
        for other in others[:1]:
            # the base stays frozen for other expert models that are still on it
            other._learning += self._learning
        for parameter in [] if others else self._learning:
            parameter.requires_grad_(True)
        self._learning = []

    def _replicate_for_data_parallel(self) -> Self:
        # hooks of a replica's layers know the first model, whose calls do not run there
        raise ScopeError(
            "torch's DataParallel would run copies without their experts: let one process have one GPU, by torchrun or "
            "accelerate launch, or set CUDA_VISIBLE_DEVICES"
        )

    def _require_open(self) -> None:
        if not self._handles:
            raise CompositionError(
                "the expert model is closed, and would answer without experts: call the base itself, or make it again"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, parts: Parts) -> None:
        self.sites, self.layers, self.gates = parts
        # a new module is in training mode
        self.layers.train(self.training)
        self.gates.train(self.training)
        self._learns = {name: parameter.requires_grad for name, parameter in self.expert_parameters().items()}

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules except the base's batch norms, which stay in evaluation mode."""
        super().train(mode)
        for module in self.base_model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _weighing(self, site: Site, layer: Any, call: Call) -> Weigh:
        return partial(self._weigh, site, layer.shape.num_experts, self.gate_of(site), call)

    def _weigh(self, site: Site, num_experts: int, gate: Gate | None, call: Call, x_BTI: Tensor) -> Tensor:
        """Return the weights w_BTE of a site; note them for the losses in a training step."""
        if gate is None:
            return x_BTI.new_ones(1, 1, num_experts, dtype=torch.promote_types(x_BTI.dtype, torch.float32))
        with own_precision(x_BTI.device):
            weighing: Weighing = gate(x_BTI, call)
        w_BTE, scores_BTE, beside = weighing
        # a layer that a backward pass runs again was noted before
        if call.step is not None and torch._C._current_graph_task_id() == -1:
            run = call.run_of(site.name)
            place = site.name if not run else f"{site.name} (run {run + 1})"
            call.step.weights[place] = w_BTE
            if scores_BTE is not None:
                call.step.scores[place] = scores_BTE
            if beside is not None:
                call.step.beside[place] = beside
        return w_BTE

    def task_ids(self, task: Any) -> Tensor | None:
        """Return task_B, the ids of tasks given by name or id, one for each row or one for all; None if `task` is None.

        Raises UnknownName for an unknown task.
        """
        places = places_of(self.recipe, task)
        return None if places is None else torch.tensor(places, device=self.device)


def trainer() -> Any:
    """Return the module of an extension that trains expert models, and makes new ones whose experts start as adapters.

    Raises PackageMissing if no extension does.
    """
    module = next(registry.bringing("trainer"), None)
    if module is None:
        raise PackageMissing("none of the extensions at hand trains expert models, or begins them as adapters")
    return module


def _share_of_step(kwargs: Mapping[str, Any]) -> Any:
    """Return a call's share of its step's labels, if a Trainer gives their number; else 1."""
    labels, num_items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    return (labels != IGNORED).sum() / num_items if isinstance(labels, Tensor) and num_items is not None else 1


def require_expert_model(model: Any, asker: str) -> None:
    """Raise WeightingError, naming `asker`, for anything but an `ExpertModel`, such as a base model alone."""
    if not isinstance(model, ExpertModel):
        raise WeightingError(
            f"{asker} was given {type(model).__name__}, which has no experts: give what lw.experts(recipe, base_model) made"
        )
