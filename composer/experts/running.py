"""The running call of an expert model, the hooks that act in it, and the class that makes the model look like its base.

transformers inspects a model before it works with it: a pipeline the name of its class, a Trainer whether it is a
PreTrainedModel, and the arguments of `forward` for the columns of a data set. It sees the base's (`LikeBase`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.composer.live.call import arguments_of
from loraweave.composer.model.batches import IGNORED, tensors_in
from loraweave.composer.train.progress import Contexts
from loraweave.errors import ScopeError, TrainingError
from loraweave.routers.recipes._gate import Call
from loraweave.routers.tokens._call import current_prompts, has_two_sequences
from loraweave.routers.tokens._learned import Step


@dataclass(eq=False)
class Running:
    """A running call of an expert model, or a running generation, which makes many calls of the base.

    `owner` is the expert model. `task_B` are the tasks of the given rows; in a call that `generates` several copies of a
    row, they share its task. With `notes` each call has a `Step`, which records scores and weights for losses; `kept` is
    `Call.kept`, `call` the base's current call. `within` is {site: data that its parts share in one run (`Form`)}, `beside`
    data of the experts' form, `begun_BT` marks the real tokens at the beginning of a generation.
    """

    owner: object
    task_B: Tensor | None = None
    notes: bool = False
    generates: bool = False
    kept: dict[Hashable, Any] = field(default_factory=dict)
    call: Call = field(default_factory=Call)
    beside: Any = None
    begun_BT: Tensor | None = None
    within: dict[str, dict[str, Any]] = field(default_factory=dict)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a base's call with these arguments. Raises ScopeError for no rows or if the number of tasks does not fit."""
        arguments = arguments_of(model, args, kwargs)
        tensors = tensors_in(arguments)
        ids_BT, embeds_BTI = tensors.get("input_ids"), tensors.get("inputs_embeds")
        main = ids_BT if embeds_BTI is None else embeds_BTI
        if main is None:
            main = next(iter(tensors.values()), None)
        num_rows = _num_rows(main)
        real_BT = _real_tokens(main, tensors.get("attention_mask"))
        if real_BT is None and self.begun_BT is not None and num_rows and main is not None:
            real_BT = _of_beams(self.begun_BT, main)
        task_B = None if self.task_B is None else self._tasks(num_rows, self.task_B, copies=self.generates)
        two_sequences = has_two_sequences(model)
        step = None
        if self.notes:
            labels_B = torch.full((num_rows,), -1) if task_B is None else task_B
            mask_BT = torch.ones(num_rows, 1) if main is None or main.ndim < 2 else torch.ones(main.shape[:2])
            step = Step(mask_BT.to(main.device) if real_BT is None and main is not None else real_BT, labels_B)  # type: ignore[arg-type]
            step.decoder_BT = _decoder_tokens(tensors) if two_sequences else None
        past = arguments.get("past_key_values")
        follows = past is not None and past.get_seq_length() > 0
        # an encoder-decoder's labels belong to the decoder, not to the prompt
        labels = None if two_sequences else tensors.get("labels")
        if "logits_to_keep" in arguments:
            labels = _of_last_tokens(main, labels)
        prompt_BT = None if main is None else _prompt_tokens(main, real_BT, labels)
        embed = None if ids_BT is None and embeds_BTI is None else partial(_embedded, model, ids_BT, embeds_BTI)
        self.call = Call(
            real_BT, prompt_BT, ids_BT, task_B, follows, self.kept, step, embed, two_sequences, num_rows or None
        )
        if step is not None and step.decoder_BT is not None:
            self.call.real_BT, self.call.decoder_BT = step.mask_BT.bool(), step.decoder_BT

    def begin_generation(
        self, model: nn.Module, given: Tensor | None, embeds_BTI: Tensor | None, mask: Tensor | None
    ) -> None:
        """Begin a generation from the current prompts, or else from `given`, its main input.

        This runs before the first call of the base, because an encoder runs outside those. Raises ScopeError for no rows,
        and if the number of tasks fits no rows.
        """
        known = current_prompts()
        if known is None and given is None:
            return
        ids_BT, main = (None, given) if known is None else (known.ids_BT, known.ids_BT)
        real_BT = _real_tokens(main, mask) if known is None else known.mask_BT.bool()
        num_rows = _num_rows(main)
        task_B = None if self.task_B is None else self._tasks(num_rows, self.task_B)
        has_embeddings = ids_BT is not None or embeds_BTI is not None
        embed = partial(_embedded, model, ids_BT, None if known else embeds_BTI) if has_embeddings else None
        # a static cache leaves the first call of the base no mask of tokens
        self.begun_BT = real_BT
        self.call = Call(real_BT, real_BT, ids_BT, task_B, False, self.kept, None, embed, has_two_sequences(model))

    def _tasks(self, num_rows: int, task_B: Tensor, *, copies: bool = False) -> Tensor:
        """Return the tasks of `num_rows` rows; with `copies` each prompt may have several adjacent rows, such as beams.

        Raises ScopeError if the number of tasks does not fit the rows.
        """
        if not num_rows or num_rows % len(task_B) or (len(task_B) not in (1, num_rows) and not copies):
            raise ScopeError(
                f"{len(task_B)} tasks were given for {num_rows} rows: give one for each row in their order, or one for all"
            )
        return task_B.repeat_interleave(num_rows // len(task_B))


# the running call of each thread and asyncio task
RUNNING: ContextVar[Running | None] = ContextVar("loraweave_experts", default=None)


class Hook:
    """A hook on a module that calls the expert model's method `act` in that model's calls, with `place` as first arguments.

    The result of `act` is that of the hook. Hooks in a copy or a pickle of the expert model belong to the copy; hooks in a
    copy of the base alone have no `owner`.
    """

    def __init__(self, owner: Any, act: Callable[..., Any], *place: Any) -> None:
        self.owner = owner
        self._act = act
        self._place = place

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        running = RUNNING.get()
        if running is None or running.owner is not self.owner:
            return None
        return self._act(self.owner, running, *self._place, module, *given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(memo.get(id(self.owner)), self._act, *self._place)


def require_same_call(model: nn.Module) -> None:
    """Raise TrainingError if gradient checkpointing would run a block again without the running call, so without experts."""
    for module in model.modules():
        again = getattr(module, "_gradient_checkpointing_func", None)
        is_ours = getattr(again, "keywords", {}).get("context_fn") is same_call
        if getattr(module, "gradient_checkpointing", False) and not is_ours:
            raise TrainingError(
                "the base's gradient checkpointing runs blocks again without their experts: turn it on with the expert "
                "model's own gradient_checkpointing_enable(), or by fit(gradient_checkpointing=True)"
            )


class Again:
    """A context that restores `running`, in its state when this object was made, as the running call.

    A gate that decides inside a block decides again in the block's second run; earlier decisions are kept.
    """

    def __init__(self, running: Running | None) -> None:
        self._running = None if running is None else _as_now(running)
        self._tokens: list[Token[Running | None]] = []

    def __enter__(self) -> None:
        # a second run may itself be repeated
        self._tokens.append(RUNNING.set(None if self._running is None else _as_now(self._running)))

    def __exit__(self, *_: object) -> None:
        RUNNING.reset(self._tokens.pop())


def same_call() -> Contexts:
    """Return the contexts for `context_fn` of `torch.utils.checkpoint`, so that a block's second run has the same call."""
    return nullcontext(), Again(RUNNING.get())


def _as_now(running: Running) -> Running:
    within = {name: dict(seen) for name, seen in running.within.items()}
    call = replace(running.call, kept=dict(running.call.kept), runs=Counter(running.call.runs))
    return replace(running, call=call, within=within)


def _num_rows(main: Tensor | None) -> int:
    """Return the number of rows of a call; 0 if `main` is None. Raises ScopeError for a tensor without rows."""
    if main is None:
        return 0
    if not len(main):
        raise ScopeError(f"a call has inputs of shape {tuple(main.shape)}, with no rows: give at least one")
    return len(main)


def _real_tokens(main: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return real_BT of the call's own tokens; None unless `mask` has two axes and at least as many tokens as `main`."""
    if main is None or main.ndim < 2 or mask is None or mask.ndim != 2 or mask.shape[1] < main.shape[1]:
        return None
    return mask[:, -main.shape[1] :].bool()


def _decoder_tokens(found: Mapping[str, Tensor]) -> Tensor | None:
    """Return decoder_BT, a decoder's real tokens, from the call's labels, mask or ids; None if it has none of them."""
    labels, mask, ids = (found.get(name) for name in ("labels", "decoder_attention_mask", "decoder_input_ids"))
    if labels is not None and labels.ndim == 2:
        return labels != IGNORED
    if mask is not None:
        return mask.bool()
    return None if ids is None else torch.ones_like(ids, dtype=torch.bool)


def _of_beams(real_BT: Tensor, main: Tensor) -> Tensor | None:
    """Return real_BT with each row repeated for the k beams that `main` has of it; None if the shapes do not fit."""
    copies, beyond = divmod(len(main), len(real_BT))
    if beyond or main.ndim < 2 or main.shape[1] != real_BT.shape[1]:
        return None
    return real_BT.to(main.device).repeat_interleave(copies, dim=0)


def _of_last_tokens(main: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Return `labels` (B, K) of a call's last K tokens, padded in front with IGNORED to all T tokens of its input `main`."""
    if main is None or labels is None or labels.ndim != 2 or labels.shape[1] >= main.shape[1]:
        return labels
    return functional.pad(labels, (main.shape[1] - labels.shape[1], 0), value=IGNORED)


def _embedded(model: nn.Module, ids_BT: Tensor | None, given: Tensor | None) -> Tensor:
    """Return x_BTI, the first layer's input: `given`, or ids_BT embedded. Raises ScopeError without an embedding module."""
    if given is not None:
        return given
    if (embeddings := input_embeddings(model)) is None:
        raise ScopeError(f"{type(model).__name__} has no input embeddings to decide by: call it with inputs_embeds")
    x_BTI: Tensor = embeddings(ids_BT)
    return x_BTI


def input_embeddings(model: nn.Module) -> Any:
    """Return the module of the model's token embeddings, or None if it has none."""
    try:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embeddings if isinstance(embeddings, nn.Embedding) else None


def _prompt_tokens(main: Tensor, real_BT: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Return prompt_BT: the tokens that `prompted` names, else those before the first label, else `real_BT`."""
    known = current_prompts()
    if known is not None:
        # in a generation the first call has the prompts alone, each as often as it has beams
        copies, beyond = divmod(main.shape[0], len(known.mask_BT))
        if beyond or known.mask_BT.shape[1] != main.shape[1]:
            return real_BT
        return known.mask_BT.to(main.device).bool().repeat_interleave(copies, dim=0)
    if labels is not None and labels.shape == main.shape[:2]:
        before_BT = (labels != IGNORED).cumsum(dim=1) == 0
        return before_BT if real_BT is None else before_BT & real_BT
    return real_BT


class LikeBase(nn.Module):
    """A module around `base_model` that passes for an instance of the base's class, with its arguments and attributes."""

    base_model: nn.Module
    # tells a Trainer that something trainable is on top of a quantised base
    _hf_peft_config_loaded = True

    def __new__(cls, base_model: nn.Module, *_: Any, **__: Any) -> Any:
        original: Any = cls
        return _make(original, type(base_model))

    def __reduce__(self) -> tuple[Any, ...]:
        # a class made here has no name that a pickle could find it by
        original, *_ = (ancestor for ancestor in type(self).__mro__ if "_on" not in vars(ancestor))
        return _make, (original, type(self.base_model)), object.__getstate__(self)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_model" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.base_model, name)

    @property
    def generation_config(self) -> Any:
        """The generation config of the base, which `generate` follows."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.base_model.generation_config = value

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """The names of the base's tensors, which a Trainer's checkpoint leaves out."""
        return [name for name in self.state_dict() if name.startswith("base_model.")]


def _make(own: Any, base: Any) -> Any:
    return nn.Module.__new__(_class_on(own, base))


@cache
def _class_on(own: Any, base: Any) -> Any:
    """Return a subclass of `own` for models of class `base`; `own` itself if it is one already."""
    if hasattr(own, "_on"):
        return own
    signature = inspect.signature(base.forward)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [parameter for parameter in signature.parameters.values() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    task = inspect.Parameter("task", inspect.Parameter.KEYWORD_ONLY, default=None)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own.forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*named, task, *rest])  # type: ignore[attr-defined]
    forward.__doc__ = own.forward.__doc__
    made = {"forward": forward, "__class__": property(lambda _: base), "__module__": own.__module__, "_on": base}
    return type(own.__name__, (own,), made)
