"""Each token goes to the experts whose mean input is most similar to it: PHATGOOSE's gates without their training."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from loraweave import ExpertPool, ScopeError, WeightingError
from loraweave.extend import Count, Positive, Prompt, prompt_ids, tracked
from loraweave.extend.routing import LayerTensors, Members, ScoredRouter, read_prompts, without

TOP_K = 2


class AverageActivation(ScoredRouter):
    """A router with w = softmax over the `top_k` largest LN(m_e) . LN(x) / (sqrt(I) temperature), m_e e's mean input.

    `fit` measures m_e over the tokens of some prompts of the expert, read by the model with that expert. LN subtracts the
    mean and divides by the standard deviation, as PHATGOOSE does with the gates that it trains instead of m_e (Muqeeth et
    al. 2024, arXiv 2402.05859), and which it compares with average activations. `top_k` is by default 2, or all experts of a
    smaller pool. Raises what `ScoredRouter` raises.
    """

    per_expert: ClassVar[Mapping[str, str | None] | None] = {"means_": None}

    def __init__(self, pool: ExpertPool | Members, *, top_k: Count | None = None, temperature: Positive = 1.0) -> None:
        super().__init__(pool, top_k, temperature, default=TOP_K)
        shapes = {name: layer.num_inputs for name, layer in self.members.layers.items()}
        # means that were checked: asking a GPU in every call would wait for it
        self._complete: dict[str, Tensor] = {}
        self.means_ = LayerTensors({name: torch.zeros(len(self.experts), size) for name, size in shapes.items()})

    def fit(self, engine: Any, dataset: Any, *, num_texts: int = 20, progress: bool = True) -> Self:
        """Measure the mean inputs of the experts that the dataset names, on `num_texts` prompts each; return self.

        `dataset` is what `Logistic.fit` takes, `engine` a Composer with a tokenizer and the router's pool. The rows of the
        other experts stay as they are. Raises InvalidTask for rows that name no expert, UnknownExpert for others.
        """
        self.require_engine(engine)
        texts = {name: prompts[:num_texts] for name, prompts in read_prompts(dataset).items()}
        engine.pool.known(texts)
        layers = {layer: self.members.layers[layer].experts for layer in self.layers}
        for name, means in _input_means(engine, texts, layers, progress=progress):
            place = self.members.places[name]
            for layer, mean_I in means.items():
                self.means_[layer][place] = mean_I.to(self.means_[layer])
        return self

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return LN(m_e) . LN(x) / sqrt(I), -inf for experts not in the layer. Raises WeightingError without a mean."""
        m_EI, present = self.means_[layer], self.members.layers[layer].experts
        if self._complete.get(layer) is not m_EI:
            self._require_means(layer, m_EI)
        size = (m_EI.shape[1],)
        scores_BTE = layer_norm(x_BTI.to(m_EI.dtype), size) @ layer_norm(m_EI, size).T / math.sqrt(size[0])
        return without(scores_BTE, present)

    def _require_means(self, layer: str, m_EI: Tensor) -> None:
        known_E = m_EI.any(dim=1).tolist()
        if unknown := [self.experts[place] for place in self.members.layers[layer].experts if not known_E[place]]:
            raise WeightingError(
                f"router 'average_activation' knows no inputs of {', '.join(map(repr, unknown))} in layer {layer!r}: "
                "fit(engine, {expert: prompts or examples}) measures them"
            )
        self._complete[layer] = m_EI


def _input_means(
    engine: Any, prompts: Mapping[str, Sequence[Prompt]], layers: Mapping[str, Sequence[int]], *, progress: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (expert, {layer: mean_I}) over all tokens of the expert's prompts, with that expert at weight 1, in float64.

    `layers` is {layer: indices of the experts that update it}. The texts run one by one, without padding. Raises ScopeError
    for a layer that is not called with one vector a token.
    """
    modules = dict(engine.model.named_modules())
    places = engine.pool.places
    for name in tracked(prompts, "reading inputs", total=len(prompts), shown=progress):
        expert_modules = {layer: modules[layer] for layer, experts in layers.items() if places[name] in experts}
        sums = {layer: _Sum(layer) for layer in expert_modules}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(engine.activate({name: 1.0}))
            for layer, module in expert_modules.items():
                stack.enter_context(module.register_forward_pre_hook(sums[layer]))
            for prompt in prompts[name]:
                ids_BT = torch.tensor(prompt_ids(engine.tokenizer, [prompt]), device=engine.model.device)
                engine.model(input_ids=ids_BT)
        yield name, {layer: total.mean for layer, total in sums.items()}


class _Sum:
    """A forward pre-hook that sums up the inputs of one layer; `mean` is their mean over tokens (I)."""

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._total: Tensor | None = None
        self._count = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if not x.is_floating_point() or x.ndim not in (2, 3):
            raise ScopeError(
                f"layer {self._layer!r} ({type(module).__name__}) is called with {x.dtype} of shape {tuple(x.shape)}, and "
                "not with one vector for each token, of which there would be a mean: leave out the adapters that update it"
            )
        total_I = x.detach().double().reshape(-1, x.shape[-1]).sum(dim=0)
        self._total = total_I if self._total is None else self._total + total_I
        self._count += x.numel() // x.shape[-1]

    @property
    def mean(self) -> Tensor:
        if self._total is None:
            raise ScopeError(f"layer {self._layer!r} never ran on the texts, so that its inputs have no mean")
        return self._total / self._count
