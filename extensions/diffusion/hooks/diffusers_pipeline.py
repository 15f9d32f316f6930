"""Live mixing in a diffusers pipeline, where mixtures may differ by step, by prompt and within one step.

    pipe(B prompts, n images each)
      text encoders          B rows, step 0 of 1
      unet, transformer      step s of S; under guidance by one doubled call: all rows without their prompts, then all with

    activate(...) --> calls: is it one mixture for all calls?   yes: an activation as in any model
                                                                no:  ByCall, asked by each part's _PartForward

A part's forward then runs inside an inner activation of what its call needs, so that threads, leases and records are as in
any activation. docs/extensions/diffusion.md says what a mixture means.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraweave import CompositionError, MixtureWeights, Router, ScopeError, WeightingError
from loraweave.extend.live import Activate, Handle, LiveHook, LiveModel, Resolve, StandIn, give_back
from loraweave.extend.routing import ByRow, needs_call
from loraweave.extensions.diffusion.pipelines.diffusers import Diffusers

# the beginning of the names of parts that run once for all steps
_TEXT = "text_encoder"
SUFFIXES = ("", "Img2Img", "Inpaint")
# pipelines of diffusers 0.42 whose guidance joins the rows without and with prompts in one call, and those that call twice
_JOINED = {f"StableDiffusion{kind}{way}Pipeline" for kind in ("", "XL", "3") for way in SUFFIXES}
_APART = {f"Flux{way}Pipeline" for way in SUFFIXES}


@dataclass(frozen=True)
class Composite:
    """A set of mixtures: the denoising part runs once under each, and its prediction is their mean.

    Text encoders run once, under the sum of the mixtures. LoRA Composite of Multi-LoRA Composition (arXiv 2402.16843) has
    one LoRA at weight 1 in each. Raises WeightingError unless there is at least one mapping of names to weights.
    """

    mixtures: tuple[Mapping[str, float], ...]

    def __post_init__(self) -> None:
        if not self.mixtures or not all(isinstance(mixture, Mapping) for mixture in self.mixtures):
            raise WeightingError(f"a Composite is a tuple of mappings {{name: weight}}, not {self.mixtures!r:.80}")

    def sum(self) -> dict[str, float]:
        """Return {name: weight}, each name's weight summed over the mixtures."""
        names = dict.fromkeys(name for mixture in self.mixtures for name in mixture)
        return {name: sum(mixture.get(name, 0.0) for mixture in self.mixtures) for name in names}


class CallWeights(MixtureWeights):
    """The weights of one call of a part, one row for each row of the call."""


class ByCall:
    """The mixtures of one activation, which may differ between calls of the pipeline's parts."""

    def __init__(self, pipeline: Diffusers, mixture: Any, resolve: Resolve, activate: Activate) -> None:
        self._pipeline = pipeline
        self._mixture = mixture
        self._resolve = resolve
        self._activate = activate
        # errors in the mixture are raised before a model runs
        first = mixture(0, 1) if callable(mixture) else mixture
        for component in first.mixtures if isinstance(first, Composite) else [first]:
            self._checked(component)

    def run(self, part: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a part's forward with these arguments, under the mixture of this call, and return its output."""
        mixture = self._mixture
        if callable(mixture):
            mixture = mixture(*(self._step(part, forward, args, kwargs) if not part.startswith(_TEXT) else (0, 1)))
        if not isinstance(mixture, Composite):
            return self._run(mixture, part, forward, args, kwargs)
        if part.startswith(_TEXT):
            return self._run(mixture.sum(), part, forward, args, kwargs)
        outputs = [self._run(component, part, forward, args, kwargs) for component in mixture.mixtures]
        predictions = [output[0] for output in outputs]
        if not all(isinstance(prediction, Tensor) for prediction in predictions):
            raise CompositionError(
                f"{part!r} does not return one tensor, and a Composite averages predictions: give one mixture"
            )
        mean = torch.stack(predictions).mean(dim=0)
        return (mean,) if isinstance(outputs[0], tuple) else type(outputs[0])(sample=mean)

    def _run(self, mixture: Any, part: str, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        weights = self._checked(mixture)
        if isinstance(weights, MixtureWeights):
            values_BTLE = weights.values_BTLE
            if weights.num_rows > 1:
                tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
                values_BTLE = self._rows(values_BTLE, part, tensors[0].shape[0], kwargs)
            weights = CallWeights(values_BTLE, weights.experts, weights.layers)
        with self._activate(weights):
            return forward(*args, **kwargs)

    def _checked(self, mixture: Any) -> MixtureWeights | Router:
        weights = self._resolve(mixture)
        name = type(self._pipeline.pipe).__name__
        if needs_call(weights):
            raise ScopeError(
                f"a {type(weights).__name__} looks at a whole call of one model, and a pipeline calls several: take a "
                "router that looks at a layer's input alone, or give weights"
            )
        if isinstance(weights, ByRow):
            raise ScopeError("a pipeline has one router for all prompts: give each row {name: weight} or MixtureWeights")
        if isinstance(weights, MixtureWeights) and weights.num_rows > 1 and name not in _JOINED | _APART:
            known = ", ".join(sorted(_JOINED | _APART))
            raise ScopeError(
                f"which rows of a {name}'s calls belong to which prompt is not known: run its prompts one by one, each with "
                f"its own mixture; rows work in {known}"
            )
        return weights

    def _rows(self, values_BTLE: Tensor, part: str, num_rows: int, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the weights for the rows of one call: each image gets its prompt's row, and guidance doubles all rows."""
        pipe, times = self._pipeline.pipe, 1
        if not part.startswith(_TEXT) and type(pipe).__name__ in _JOINED and kwargs.get("skip_layers") is None:
            if not hasattr(pipe, "_guidance_scale"):
                raise ScopeError(f"{part!r} ran before the pipeline itself, so that its rows are unknown: call the pipeline")
            times = 2 if pipe.do_classifier_free_guidance else 1
        images, rest = divmod(num_rows, times * len(values_BTLE))
        if rest or not images:
            raise ScopeError(
                f"the mixture has {len(values_BTLE)} rows, but {part!r} was called with {num_rows} rows"
                f"{', half of them without prompts' if times == 2 else ''}: give one mixture for each prompt"
            )
        return values_BTLE.repeat_interleave(images, dim=0).repeat(times, 1, 1, 1)

    def _step(self, part: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[int, int]:
        """Return (step, steps): the index of the call's timestep among the scheduler's timesteps, and their number."""
        pipe = self._pipeline.pipe
        t = torch.as_tensor(inspect.signature(forward).bind(*args, **kwargs).arguments["timestep"]).flatten()[0].cpu()
        times = torch.unique_consecutive(pipe.scheduler.timesteps.cpu())
        # rounded and divided as the pipeline does it
        called = times.to(t.dtype) if t.is_floating_point() else times
        called = called / 1000 if type(pipe).__name__ in _APART else called
        steps = [step for step in range(len(times)) if float(called[step]) == float(t)]
        if len(steps) > 1 and (exact := getattr(pipe, "_current_timestep", None)) is not None:
            steps = [step for step in steps if float(times[step]) == float(exact)]
        if len(steps) != 1:
            raise CompositionError(
                f"{part!r} was called at timestep {float(t)}, which is not one of the scheduler's, so that the step is "
                "unknown: call the pipeline itself, or give one mixture for all steps"
            )
        return steps[0], len(times)


class DiffusersPipeline(LiveHook):
    """The hook for a diffusers pipeline, whose parts are called one by one and never as one model."""

    def calls(
        self, model: nn.Module, mixture: Any, resolve: Resolve, activate: Activate
    ) -> tuple[MixtureWeights | Router, ByCall | None] | None:
        """Return (weights, None) for a mixture that all calls share, else (weights of no expert, the mixtures by call).

        For a pipeline, `mixture` may also be a function of (step, steps) that returns one, or a Composite. Returns None for
        another model. Raises ScopeError for rows in a pipeline whose batches are not known, and for routers that need the
        whole call, since a pipeline makes several.
        """
        if not isinstance(model, Diffusers):
            return None
        if isinstance(mixture, CallWeights):
            return resolve(mixture), None
        if not (isinstance(mixture, Composite) or (callable(mixture) and not hasattr(mixture, "weights"))):
            mixture = resolve(mixture)
            if getattr(mixture, "num_rows", 1) == 1 and not isinstance(mixture, ByRow) and not needs_call(mixture):
                return mixture, None
        for name, part in model.named_children():
            if getattr(model.pipe, name) is not part or getattr(part, "_compiled_call_impl", None) is not None:
                raise CompositionError(
                    f"{name!r} was compiled whole by torch.compile, which keeps one mixture for all its calls: compile its "
                    f"blocks instead, by pipe.{name}.compile_repeated_blocks(), or give one mixture"
                )
        return resolve({}), ByCall(model, mixture, resolve, activate)

    def install(self, live: LiveModel) -> Iterator[Handle]:
        """Make calls of each part of a pipeline count as model calls, each with its own mixture; yield the handles."""
        if isinstance(live.model, Diffusers):
            for name, part in live.model.named_children():
                yield from live.enters(part)
                yield _PartForward(name, part, live)


class _PartForward(StandIn):
    """A stand-in for the forward of a pipeline's part while an activation is open: it applies the mixture of each call."""

    def __init__(self, name: str, part: nn.Module, live: LiveModel) -> None:
        self._name = name
        self._part = part
        self._live = live
        self._own = vars(part).get("forward")
        self._forward = part.forward
        part.forward = self.run  # type: ignore[method-assign]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part's forward, under the call's mixture if mixtures differ by call."""
        activation = self._live.current()
        if activation is None or activation.plan.by_call is None:
            return self._forward(*args, **kwargs)
        return activation.plan.by_call.run(self._name, self._forward, args, kwargs)

    def remove(self) -> None:
        """Restore the part's own forward."""
        give_back(self._part, "forward", self._own, self)
