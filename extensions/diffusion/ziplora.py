"""ZipLoRA: a merge of two adapters of a diffusers pipeline, with a learned weight for each input of each layer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import Adapter, Composer, CompositionError, Factors, MixtureWeights, WeightingError
from loraweave.extend import NonNegative, Positive, Whole, algebra, check_options, options_of, progress_bar
from loraweave.extend.scoring import untouched
from loraweave.extend.training import Descent, descend


class Call(NamedTuple):
    """The arguments that a denoising part was called with, and its prediction."""

    part: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prediction: Tensor


class _Merger(NamedTuple):
    """One layer of both adapters: their factors, and the learned weights m of its inputs, one row for each adapter."""

    parts: tuple[Factors, Factors]
    m_2I: Tensor


def zip_lora(
    pipe: Any,
    content: Adapter,
    style: Adapter,
    run: Callable[[str], object],
    *,
    steps: Whole = 100,
    learning_rate: Positive = 0.01,
    overlap: NonNegative = 0.01,
    progress: bool = True,
) -> Adapter:
    """Return both adapters as one of rank R_c + R_s: B_c A_c diag(m_c) + B_s A_s diag(m_s) in the denoiser's linear layers.

    `run(name)` runs the pipeline, or its denoiser, on inputs for the adapter of that name. It is called once under each
    adapter alone; the denoiser's inputs then, x_c and x_s, are kept with its predictions. From m = 1, `steps` steps of AdamW
    lower, a call of each adapter at a time,

        |D(x_c) - D_c(x_c)|^2 + |D(x_s) - D_s(x_s)|^2 + overlap * sum over layers of mean |m_c m_s|

    with D the denoiser under the merged update, D_c and D_s under one adapter, and squares as means over entries. ZipLoRA
    (2311.13600) takes 100 steps at 0.01 with overlap 0.01; the means are those of mkshing/ziplora-pytorch. The paper's x are
    noised training images: `run` may call `pipe.unet` on such itself.

    Convolutions, text encoders and layers of one adapter alone have the plain sum. `card["zip_lora"]` has the three terms,
    the first two as means over all calls, with m = 1 and at the end. The pipeline stays as it was.

    Raises WeightingError for adapters of one name or without a common linear layer in the denoiser, and for settings out of
    range; CompositionError if `run` does not call the denoiser; what Composer raises for adapters that do not fit.
    """
    settings = {"steps": steps, "learning_rate": learning_rate, "overlap": overlap}
    check_options("zip_lora()", settings, options_of(zip_lora, after=4))
    names = (content.name, style.name)
    if names[0] == names[1]:
        raise WeightingError(f"zip_lora() takes two adapters, and both are named {names[0]!r}: rename one")
    engine = Composer(pipe, [content, style])
    first, second = (engine.bound_pool[name].layers for name in names)
    mergers = {
        path: _Merger((first[path], second[path]), torch.ones(2, first[path].a_RI.shape[1], requires_grad=True))
        for path in first
        if path in second and first[path].kind == "linear" and not path.startswith("text_encoder")
    }
    if not mergers:
        raise WeightingError(
            f"{names[0]!r} and {names[1]!r} share no linear layer of the denoiser: lw.merge(..., method='linear') adds them"
        )
    calls = [_calls(engine, name, run) for name in names]
    rest = {path: dict.fromkeys(names, 1.0) for path in dict.fromkeys([*first, *second]) if path not in mergers}
    summed: Any = MixtureWeights.of_layers(rest, names) if rest else {}
    with untouched(engine.model), torch.enable_grad(), engine.activate(summed), _added(engine.model, mergers):
        before = _terms(engine.model, calls, mergers)
        descent = Descent([merger.m_2I for merger in mergers.values()], lambda _: learning_rate, limit=None)

        def loss(step: int) -> Tensor:
            chosen = [of_one[step % len(of_one)] for of_one in calls]
            return sum((_error(engine.model, call) for call in chosen), overlap * _overlap(mergers))

        with progress_bar(progress, field="loss") as bar:
            descend({"zip_lora": descent}, loss, steps, bar, title="learning the weights of inputs")
        after = _terms(engine.model, calls, mergers)
    card = {
        "recipe": {
            "method": "zip_lora",
            "options": settings,
            "parents": [{"hash": adapter.hash, "name": adapter.name} for adapter in (content, style)],
        },
        "zip_lora": {
            name: list(pair) for name, pair in zip((*names, "overlap"), zip(before, after, strict=True), strict=True)
        },
    }
    layers = {path: _merged(merger) for path, merger in mergers.items()}
    layers |= {path: algebra.add([layers_of[path] for layers_of in (first, second) if path in layers_of]) for path in rest}
    bound = engine.bound_pool[names[0]]
    return replace(bound, name="+".join(names), layers=layers, card=card)


@torch.no_grad()
def _calls(engine: Composer, name: str, run: Callable[[str], object]) -> list[Call]:
    """Return the denoiser's calls while `run(name)` runs the pipeline under that adapter alone."""
    calls: list[Call] = []

    def saw(part: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(part, _kept(args), _kept(kwargs), output[0].clone()))

    parts = {part: module for part, module in engine.model.named_children() if not part.startswith("text_encoder")}
    with ExitStack() as stack:
        for part, module in parts.items():
            stack.enter_context(module.register_forward_hook(partial(saw, part), with_kwargs=True))
        stack.enter_context(engine.activate({name: 1.0}))
        run(name)
    if not calls:
        raise CompositionError(
            f"run({name!r}) called none of {', '.join(parts) or 'the parts that denoise'}: call the pipeline"
        )
    return calls


def _kept(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.clone()
    if isinstance(given, dict):
        return {key: _kept(value) for key, value in given.items()}
    return tuple(_kept(value) for value in given) if isinstance(given, tuple) else given


@contextmanager
def _added(model: nn.Module, mergers: Mapping[str, _Merger]) -> Iterator[None]:
    """Add the merged update, with the current m, to each layer's output inside the block."""

    def add(merger: _Merger, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        update = _merged(merger)
        x = args[0].float()
        y = functional.linear(functional.linear(x, update.a_RI.to(x.device)), update.b_OR.to(x.device))
        return output + (y if update.bias_O is None else y + update.bias_O.to(y)).to(output.dtype)

    with ExitStack() as stack:
        for path, merger in mergers.items():
            stack.enter_context(model.get_submodule(path).register_forward_hook(partial(add, merger)))
        yield


def _merged(merger: _Merger) -> Factors:
    """Return B_c A_c diag(m_c) + B_s A_s diag(m_s) as factors."""
    scaled = [replace(part, a_RI=part.a_RI * m_I) for part, m_I in zip(merger.parts, merger.m_2I, strict=True)]
    total = algebra.add(scaled)
    return total if torch.is_grad_enabled() else replace(total, a_RI=total.a_RI.detach())


def _error(model: nn.Module, call: Call) -> Tensor:
    prediction: Tensor = model.get_submodule(call.part)(*call.args, **call.kwargs)[0]
    return functional.mse_loss(prediction.float(), call.prediction.float())


def _overlap(mergers: Mapping[str, _Merger]) -> Tensor:
    return torch.stack([merger.m_2I.prod(dim=0).abs().mean() for merger in mergers.values()]).sum()


@torch.no_grad()
def _terms(model: nn.Module, calls: list[list[Call]], mergers: Mapping[str, _Merger]) -> list[float]:
    """Return each adapter's mean squared error of prediction over its calls, and the overlap term."""
    errors = [sum(float(_error(model, call)) for call in of_one) / len(of_one) for of_one in calls]
    return [*errors, float(_overlap(mergers))]
