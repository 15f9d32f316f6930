"""Laplace-LoRA (Yang et al., ICLR 2024, arXiv 2308.13111): a posterior over a trained adapter's factors, and predictions.

theta are the entries of a and b of every layer. Around them, p(theta | data) is N(theta, (H + prior)^-1), H being the
curvature of the examples' loss, Kronecker-factored for each matrix: H_W = mean(x x^T) (x) sum(v g g^T), over the tokens of
all rows, each by itself ("expand" in Eschenhagen et al. 2023, arXiv 2311.00636). A row is an example with one label, f its
score, x the input of W, g the gradient of f by W's output, and v = p (1 - p) of the label, the diagonal of the loss's
curvature by scores. The authors' code keeps ten directions of the long side of a and b; here all are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loraweave import Adapter, AdapterUnsupported, Composer, CompositionError, Factors, InvalidTask, Task
from loraweave.extend import GivenRows, Positive, check_options, read_asked, require_whole, tracked
from loraweave.extend.composing import EnsemblePrediction
from loraweave.extend.scoring import batch, encode, token_losses, untouched
from loraweave.extend.training import seeded

EXAMPLES_PER_PASS = 4
# the bounds of the search for the prior's precision, as natural logarithms
LEAST, MOST = math.log(1e-4), math.log(1e10)


def laplace(
    engine: Composer, name: str, task: Task, *, prior: Positive | None = None, progress: bool = True
) -> LaplacePosterior:
    """Return the posterior of the engine's adapter `name` given a task's examples, ideally those it was trained on.

    The score f of a label is the summed log-likelihood of its tokens after the prompt, as predictions rank labels. `prior`
    is the precision of a Gaussian prior around 0 for every entry; by default the one of the highest marginal likelihood,

        sum of log p(y | x) - 1/2 (sum over eigenvalues l of H of log(1 + l / prior) + prior |theta|^2)

    It takes one forward and backward pass of every example with every label. Eigenvectors of all Kronecker factors are kept:
    8 (I^2 + O^2 + 2 R^2) bytes a layer. The model is left as it was. Raises InvalidTask for a task without labels or
    examples, AdapterUnsupported for an adapter that is more than linear layers' a and b, UnknownExpert, CompositionError
    without a tokenizer.
    """
    check_options("laplace()", {"prior": prior}, {"prior": Positive | None})
    adapter = engine.bound_pool[name]
    tokenizer = _require(engine, adapter, task)
    labels = tuple(task.labels or ())
    sums = {layer: _Sums.of(factors) for layer, factors in adapter.layers.items()}
    right_N = torch.tensor([labels.index(target) for _, target in task.examples])
    log_likelihood, done = 0.0, 0
    groups = list(_groups([text for text, _ in task.examples]))
    for group in tracked(groups, f"curvature of {name!r}", total=len(groups), shown=progress):
        scored = _scores(engine, tokenizer, name, task, group)
        log_NL = scored.f_NL.double().log_softmax(dim=1)
        log_likelihood += float(log_NL.gather(1, right_N[done : done + len(group), None]).sum())
        done += len(group)
        v_M = (log_NL.exp() * -torch.expm1(log_NL)).flatten()
        for layer, layer_sums in sums.items():
            layer_sums.add(*scored.seen[layer], scored.mask_MT, v_M)
    parts = {layer: of_layer.blocks() for layer, of_layer in sums.items()}
    curvatures = [block.curvature().flatten() for pair in parts.values() for block in pair]
    square = sum(float(factor.double().square().sum()) for f in adapter.layers.values() for factor in (f.a_RI, f.b_OR))

    def evidence(log_prior: float) -> float:
        precision = math.exp(log_prior)
        volume = sum(float(torch.log1p(eigenvalues / precision).sum()) for eigenvalues in curvatures)
        return log_likelihood - 0.5 * (volume + precision * square)

    log_prior = _highest(evidence) if prior is None else math.log(prior)
    return LaplacePosterior(engine, name, task, parts, math.exp(log_prior), evidence(log_prior))


@dataclass(frozen=True, eq=False)
class LaplacePosterior:
    """A posterior N(theta, (H + prior)^-1) of adapter `name`'s factors; `log_evidence` is log p(data) under this prior."""

    engine: Composer
    name: str
    task: Task
    parts: Mapping[str, tuple[_Block, _Block]]
    prior: float
    log_evidence: float

    def predict(self, inputs: GivenRows, *, samples: int = 1000, seed: int = 0, progress: bool = True) -> EnsemblePrediction:
        """Return the linearised model's prediction of the task's labels: the mean softmax over draws of the scores.

        Scores of one input are N(f, J (H + prior)^-1 J^T), J being the scores' Jacobian by the factors; `samples` draws of
        them are the members of the prediction, whose `disagreement` is then the uncertainty about the factors.
        """
        require_whole("samples", samples, 1, CompositionError)
        tokenizer = _require(self.engine, self.engine.bound_pool[self.name], self.task)
        draw = seeded(seed, "laplace")
        members, groups = [], list(_groups(read_asked(inputs)))
        for group in tracked(groups, "linearised answers", total=len(groups), shown=progress):
            mean_NL, covariance_NLL = self.scores(tokenizer, group)
            values_NL, vectors_NLL = torch.linalg.eigh(covariance_NLL)
            noise_SNL = torch.randn(samples, *mean_NL.shape, generator=draw, dtype=torch.float64)
            spread_SNL = (vectors_NLL @ (values_NL.clamp_min(0).sqrt() * noise_SNL)[..., None])[..., 0]
            members.append((mean_NL + spread_SNL).log_softmax(dim=-1))
        share_S = torch.full((samples,), 1 / samples, dtype=torch.float64)
        return EnsemblePrediction(torch.cat(members, dim=1), share_S, tuple(self.task.labels or ()))

    def scores(self, tokenizer: Any, inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return, for N inputs and the task's L labels, the scores f_NL and their covariance_NLL, float64."""
        scored = _scores(self.engine, tokenizer, self.name, self.task, inputs)
        num_rows, num_labels = scored.f_NL.shape
        covariance_NLL = torch.zeros(num_rows, num_labels, num_labels, dtype=torch.float64)
        for layer, blocks in self.parts.items():
            x_MTI, z_MTR, h_MTR, g_MTO = scored.seen[layer]
            for block, (block_inputs, taken) in zip(blocks, ((x_MTI, h_MTR), (z_MTR, g_MTO)), strict=True):
                # the Jacobian by W is the sum over tokens of g x^T; in the basis of the factors' eigenvectors, H is diagonal
                j_MPQ = torch.einsum("mtp,mtq->mpq", taken.double() @ block.out_OO, block_inputs.double() @ block.in_II)
                scaled_NLD = (j_MPQ / (block.curvature() + self.prior).sqrt()).view(num_rows, num_labels, -1)
                covariance_NLL += scaled_NLD @ scaled_NLD.mT
        return scored.f_NL.double(), covariance_NLL

    def draw(self, count: int, *, seed: int = 0) -> list[Adapter]:
        """Return `count` adapters drawn from the posterior, named "name~1" and so on, to predict with as an `ensemble`."""
        require_whole("count", count, 1, CompositionError)
        adapter = self.engine.bound_pool[self.name]
        adapters = []
        for number in range(1, count + 1):
            generator = seeded(seed, f"laplace {number}")
            layers = {}
            for layer, (of_a, of_b) in self.parts.items():
                factors = adapter.layers[layer]
                a_RI = (factors.a_RI.double() + of_a.draw(self.prior, generator)).to(factors.a_RI)
                b_OR = (factors.b_OR.double() + of_b.draw(self.prior, generator)).to(factors.b_OR)
                layers[layer] = replace(factors, a_RI=a_RI, b_OR=b_OR)
            adapters.append(replace(adapter, name=f"{self.name}~{number}", layers=layers))
        return adapters


@dataclass(frozen=True, eq=False)
class _Block:
    """The curvature of W_OI, a Kronecker product of factors (O, O) and (I, I), as their eigenvectors and eigenvalues."""

    in_II: Tensor
    in_I: Tensor
    out_OO: Tensor
    out_O: Tensor

    @classmethod
    def of(cls, in_II: Tensor, out_OO: Tensor) -> _Block:
        (in_I, u_II), (out_O, u_OO) = torch.linalg.eigh(in_II), torch.linalg.eigh(out_OO)
        return cls(u_II, in_I.clamp_min(0), u_OO, out_O.clamp_min(0))

    def curvature(self) -> Tensor:
        """Return the Hessian's eigenvalues l_OI, one for each pair of eigenvectors."""
        return self.out_O[:, None] * self.in_I

    def draw(self, prior: float, generator: torch.Generator) -> Tensor:
        """Draw noise_OI for W from a normal distribution of mean 0 and precision Hessian + `prior`, float64."""
        noise_OI = torch.randn(len(self.out_O), len(self.in_I), generator=generator, dtype=torch.float64)
        return self.out_OO @ (noise_OI / (self.curvature() + prior).sqrt()) @ self.in_II.T


@dataclass(eq=False)
class _Sums:
    """The sums over tokens of one layer's Kronecker factors: (inputs of a, gradients of a, inputs of b, gradients of b)."""

    factors: tuple[Tensor, Tensor, Tensor, Tensor]
    num_tokens: int = 0

    @classmethod
    def of(cls, own: Factors) -> _Sums:
        sizes = (own.a_RI.shape[1], own.rank, own.rank, own.b_OR.shape[0])
        a_in, a_out, b_in, b_out = (torch.zeros(size, size, dtype=torch.float64) for size in sizes)
        return cls((a_in, a_out, b_in, b_out))

    def add(self, x_MTI: Tensor, z_MTR: Tensor, h_MTR: Tensor, g_MTO: Tensor, mask_MT: Tensor, v_M: Tensor) -> None:
        real_MT = mask_MT.bool()
        v_K = v_M[:, None].expand_as(real_MT)[real_MT]
        for total, value, is_out in zip(self.factors, (x_MTI, h_MTR, z_MTR, g_MTO), (0, 1, 0, 1), strict=True):
            rows_KD = value[real_MT].double()
            total += (rows_KD * v_K[:, None] if is_out else rows_KD).T @ rows_KD
        self.num_tokens += int(real_MT.sum())

    def blocks(self) -> tuple[_Block, _Block]:
        a_in, a_out, b_in, b_out = self.factors
        return _Block.of(a_in / self.num_tokens, a_out), _Block.of(b_in / self.num_tokens, b_out)


@dataclass(frozen=True, eq=False)
class _Seen:
    """The record of a pass over N inputs with L labels each, M = N L rows: scores f_NL, the mask of real tokens, and `seen`.

    `seen` has for each layer x, z = a x, and the gradients of f by z and by the layer's output.
    """

    f_NL: Tensor
    mask_MT: Tensor
    seen: Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor]]


def _scores(engine: Composer, tokenizer: Any, name: str, task: Task, inputs: Sequence[Any]) -> _Seen:
    model: Any = engine.model
    adapter = engine.bound_pool[name]
    labels = tuple(task.labels or ())
    prompts = [task.prompt(text) for text in inputs for _ in labels]
    answers = [label for _ in inputs for label in labels]
    rows = batch(model, tokenizer, encode(model, tokenizer, prompts, answers, ends=[task.answer_end] * len(answers)))
    incoming: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def hook(layer: str) -> Any:
        def saw(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # a zero that requires a gradient, so that autograd reaches the first layer as well
            incoming[layer], made[layer] = args[0].detach(), output + output.new_zeros((), requires_grad=True)
            return made[layer]

        return saw

    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(engine.activate({name: 1.0}))
        stack.enter_context(torch.enable_grad())
        for layer in adapter.layers:
            stack.enter_context(modules[layer].register_forward_hook(hook(layer)))
        f_M = -token_losses(model, rows).sum(dim=1)
        # a row's score depends on its own tokens alone: one backward pass has the gradients of all
        gradients = torch.autograd.grad(f_M.sum(), list(made.values()))
    seen: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    for layer, g_MTO in zip(made, gradients, strict=True):
        factors, x_MTI = adapter.layers[layer], incoming[layer]
        a_RI, b_OR = factors.a_RI.to(x_MTI), factors.b_OR.to(x_MTI)
        seen[layer] = x_MTI.cpu(), (x_MTI @ a_RI.T).cpu(), (g_MTO @ b_OR).cpu(), g_MTO.cpu()
    return _Seen(f_M.detach().cpu().view(len(inputs), len(labels)), rows.inputs["attention_mask"].cpu(), seen)


def _groups(inputs: Sequence[Any]) -> Iterator[Sequence[Any]]:
    yield from (inputs[start : start + EXAMPLES_PER_PASS] for start in range(0, len(inputs), EXAMPLES_PER_PASS))


def _require(engine: Composer, adapter: Adapter, task: Task) -> Any:
    """Return the engine's tokenizer, if engine, task and adapter suit a Laplace posterior.

    Raises CompositionError without a tokenizer and for an encoder-decoder, InvalidTask for a task without labels or
    examples, AdapterUnsupported for an adapter that is more than the factors of linear layers.
    """
    if engine.tokenizer is None:
        raise CompositionError("a Laplace posterior reads texts: make the Composer with tokenizer=...")
    if not task.labels or not task.examples:
        raise InvalidTask("a Laplace posterior is of a task's labels on its examples: give both, Task([..], labels=[..])")
    model: Any = engine.model
    if model.config.is_encoder_decoder:
        raise CompositionError(f"a Laplace posterior is of a decoder, and {type(model).__name__} has an encoder too")
    for layer, pair in adapter.layers.items():
        if pair.kind != "linear" or pair.gain_O is not None or pair.bias_O is not None or adapter.heads or not pair.rank:
            raise AdapterUnsupported(
                f"a Laplace posterior is of the factors of linear layers, but adapter {adapter.name!r} has more in layer "
                f"{layer!r} (kind {pair.kind!r}), or a trained head: lw.to_lora makes a plain LoRA of DoRA"
            )
    return engine.tokenizer


def _highest(evidence: Any) -> float:
    from scipy.optimize import minimize_scalar

    return float(minimize_scalar(lambda log_prior: -evidence(log_prior), bounds=(LEAST, MOST), method="bounded").x)
