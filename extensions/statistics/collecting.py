"""The recording of adapters' layers on texts: the Gram matrices of their inputs, and their weights' Fisher information."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loraweave import Adapter, Composer, CompositionError, InvalidTask, LayerMismatch
from loraweave.extend import Count, GivenRows, algebra, check_options, get, one_or_many, tracked
from loraweave.extend.models import ExpertMatrix, GradientTap, expert_matrix, linear, multiplies_columns, tied_parameters
from loraweave.extend.scoring import EncodedRow, last_logits, padded_inputs, takes, text_rows, untouched
from loraweave.extensions.statistics.saved import LayerStatistics, Statistics

KINDS = ("gram", "fisher")
# the number of positions whose distribution over the vocabulary is summed in float64 at once
DRAWN_AT_ONCE = 64


def collect_statistics(
    model: Any,
    tokenizer: Any,
    adapter: Adapter,
    texts: GivenRows,
    *,
    what: Collection[str] = KINDS,
    layers: Collection[str] = (),
    batch_size: int = 8,
    max_tokens: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Statistics:
    """Return an adapter's statistics for `merge(statistics=...)`, from running the model with it over texts of its task.

    For each layer of the adapter (and those linear ones named in `layers`): gram_II = X^T X / n over the n real tokens of
    all texts, and fisher_OI = the mean over texts of (d log p / d W)^2 entry by entry, log p being that of labels drawn from
    the model itself at each position (Matena and Raffel 2022), or of one class where the model is a classifier. The draw
    depends on `seed` and the text alone. `what` limits both to one of them; without "fisher" there is no backward pass.

    For an expert of a fused parameter, X has zeros in the rows of tokens that do not reach it.

    `texts` are texts, or rows with input and target (`loraweave.common.rows`), which an encoder-decoder needs; the first
    `max_tokens` tokens count (of each side for an encoder-decoder). Whole Gram and Fisher matrices are held, the gradient of
    one layer at a time. The model is left as it was: weights, gradients, training mode, random state.

    Raises InvalidTask for texts or settings that cannot be used; what Composer raises for an adapter that does not fit, or
    has layers that are not linear; CompositionError for a layer that never runs or a model without class probabilities.
    """
    kinds = one_or_many(what)
    if not kinds or not set(kinds) <= set(KINDS):
        raise InvalidTask(f"what={what!r} is not one or both of {', '.join(map(repr, KINDS))}")
    sizes = {"batch_size": batch_size, "max_tokens": max_tokens}
    check_options("collect_statistics()", sizes, dict.fromkeys(sizes, Count), error=InvalidTask)
    # heads are written into the model separately, since mixtures cannot contain them
    engine = Composer(model, {adapter.name: replace(adapter, heads={})})
    recorders = make_recorders(model, [*adapter.layers, *layers], kinds)
    rows = text_rows(model, tokenizer, texts, max_tokens)
    # one by one for an encoder-decoder: a layer does not tell whether it sees the encoder's tokens or the decoder's
    size = 1 if model.config.is_encoder_decoder else batch_size
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    draws = _draws(rows, seed)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(_heads(model, adapter))
        stack.enter_context(engine.activate({adapter.name: 1.0}))
        stack.enter_context(torch.set_grad_enabled("fisher" in kinds))
        stack.enter_context(recording(recorders))
        for group in tracked(groups, f"statistics of {adapter.name!r}", total=len(groups), shown=progress):
            inputs, mask_BT = padded_inputs(model, tokenizer, [rows[index] for index in group])
            for recorder in recorders.values():
                recorder.begin(mask_BT)
            _run(model, inputs, mask_BT, [draws[index] for index in group], kinds, recorders)
    return Statistics(adapter.hash, results(recorders, len(rows)))


def record_inputs(model: Any, adapter: Adapter, run: Callable[[], object]) -> Statistics:
    """Return {layer: X^T X / n} of the inputs of an adapter's layers while `run()` runs `model` under that adapter alone.

    `model` may be a pipeline of several parts. All n rows of all calls count. Raises LayerMismatch for layers that are not
    linear, CompositionError for a layer that does not run, and what Composer raises for an adapter that does not fit.
    """
    engine = Composer(model, [adapter])
    paths = engine.model.paths(adapter.layers, f"adapter {adapter.name!r}")
    recorders = dict(zip(paths, make_recorders(engine.model, paths.values(), ("gram",)).values(), strict=True))
    for recorder in recorders.values():
        # a mask of one row, so that every token counts
        recorder.begin(torch.ones(1, 1, dtype=torch.bool))
    with recording(recorders), torch.no_grad(), engine.activate({adapter.name: 1.0}):
        run()
    return Statistics(adapter.hash, results(recorders, 1))


class Recorder:
    """A hook that sums up one layer's x^T x over tokens and its squared weight gradient over texts, on its device.

    `shape` is (O, I) of the weight, `kinds` says which of "gram" and "fisher" are recorded.
    """

    def __init__(self, name: str, module: nn.Module, shape: tuple[int, int], kinds: Collection[str]) -> None:
        self.name = name
        self.module = module
        self.num_tokens = 0
        device = next(module.parameters()).device
        num_out, num_in = shape
        self.gram_II = torch.zeros(num_in, num_in, device=device) if "gram" in kinds else None
        self.fisher_OI = torch.zeros(num_out, num_in, device=device) if "fisher" in kinds else None
        # a zero that requires a gradient, so that autograd reaches the first layer as well
        self._wanted = torch.zeros((), device=device, requires_grad="fisher" in kinds)

    def begin(self, mask_BT: Tensor) -> None:
        """Begin the next batch, with the mask of its real tokens; in a batch of one row all tokens count as real."""
        self._mask_BT = mask_BT
        self._num_calls = 0
        self._seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def saw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        self.num_tokens += sum(map(len, self._real(x)))
        return self._record(x, output, self._real)

    def _record(self, x: Tensor, output: Tensor, by_text: Callable[[Tensor], list[Tensor]]) -> Tensor | None:
        self._num_calls += 1
        if self.gram_II is not None:
            x_TI = torch.cat(by_text(x)).float()
            self.gram_II.addmm_(x_TI.T, x_TI)
        if self.fisher_OI is None:
            return None
        receive = partial(self._receive, by_text)
        return GradientTap.apply(output, self._wanted, x, receive)  # type: ignore[no-untyped-call, no-any-return]

    def _receive(self, by_text: Callable[[Tensor], list[Tensor]], gradient: Tensor, x: Tensor) -> None:
        """Store a run's input and gradient of log p by the layer's output; call `finish` after the batch's last run."""
        self._seen.append((by_text(gradient), by_text(x)))
        if len(self._seen) == self._num_calls:
            self.finish()

    def finish(self) -> None:
        """Add each text's squared weight gradient to fisher_OI: the gradient is the sum over tokens and runs of g^T x."""
        if self.fisher_OI is None or not self._seen:
            return
        for row in range(len(self._seen[0][0])):
            g_TO = torch.cat([gradients[row] for gradients, _ in self._seen]).float()
            x_TI = torch.cat([xs[row] for _, xs in self._seen]).float()
            gradient_OI = g_TO.T @ x_TI
            self.fisher_OI.addcmul_(gradient_OI, gradient_OI)
        self._seen = []

    def _real(self, x: Tensor) -> list[Tensor]:
        """Split a batch's tensor into the real tokens of each text, (T, features) each."""
        mask_BT = self._mask_BT.to(x.device)
        if len(mask_BT) == 1:
            return [x.reshape(-1, x.shape[-1])]
        if x.ndim == 2 and len(x) == len(mask_BT):
            return [row[None] for row in x]
        if x.ndim != 3 or x.shape[:2] != mask_BT.shape:
            raise CompositionError(
                f"layer {self.name!r} runs on an input of shape {tuple(x.shape)} for a batch of {tuple(mask_BT.shape)} "
                "tokens, so that padding cannot be told from text: use batch_size=1"
            )
        return [row[kept] for row, kept in zip(x, mask_BT, strict=True)]


class ExpertRecorder(Recorder):
    """A recorder for one expert of a fused parameter. If `turned`, its adapter's factors have the sides as (I, O)."""

    def __init__(self, matrix: ExpertMatrix, kinds: Collection[str]) -> None:
        sides = matrix.num_outputs, matrix.num_inputs
        self.turned = multiplies_columns(matrix.module) != matrix.transposed
        name = f"{matrix.path}.{matrix.parameter}.{matrix.number}"
        super().__init__(name, matrix.module, sides[::-1] if self.turned else sides, kinds)
        self.place = matrix.parameter, matrix.number

    def saw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Count the batch's real tokens when the module of all experts runs; `reached` records this expert's values."""
        self.num_tokens += self._mask_BT.numel() if len(self._mask_BT) == 1 else int(self._mask_BT.sum())

    def reached(self, x_NI: Tensor, token_N: Tensor, made_NO: Tensor, num_tokens: int) -> Tensor:
        """Record the expert's inputs x_NI and outputs made_NO for the N tokens that reached it, and return the outputs.

        `token_N` are the tokens' indices among the call's `num_tokens`.
        """
        mask_BT = self._mask_BT.to(token_N.device)
        if num_tokens != mask_BT.numel():
            raise CompositionError(
                f"the experts of {self.name!r} run on {num_tokens} tokens for a batch of {tuple(mask_BT.shape)}, so that "
                "padding cannot be told from text: use batch_size=1"
            )
        real_N = mask_BT.flatten()[token_N]
        row_N = (token_N // mask_BT.shape[1])[real_N]

        def by_text(value: Tensor) -> list[Tensor]:
            return [value[real_N][row_N == row] for row in range(len(mask_BT))]

        tapped_NO = self._record(x_NI.detach(), made_NO, by_text)
        return made_NO if tapped_NO is None else tapped_NO


@contextmanager
def recording(recorders: Mapping[str, Recorder]) -> Iterator[None]:
    """Attach the recorders, by name, to their layers inside the block."""
    experts: dict[nn.Module, dict[tuple[str, int], ExpertRecorder]] = {}
    with ExitStack() as stack:
        for recorder in recorders.values():
            stack.enter_context(recorder.module.register_forward_hook(recorder.saw, with_kwargs=True))
            if isinstance(recorder, ExpertRecorder):
                experts.setdefault(recorder.module, {})[recorder.place] = recorder
        for module, by_place in experts.items():
            stack.enter_context(get("hooks", "expert_matrices").watched(module, partial(_show, by_place)))
        yield


def _show(
    recorders: Mapping[tuple[str, int], ExpertRecorder],
    parameter: str,
    number: int,
    x_NI: Tensor,
    token_N: Tensor,
    made_NO: Tensor,
    num_tokens: int,
) -> Tensor:
    recorder = recorders.get((parameter, number))
    return made_NO if recorder is None else recorder.reached(x_NI, token_N, made_NO, num_tokens)


def _run(
    model: Any,
    inputs: Mapping[str, Tensor],
    mask_BT: Tensor,
    draws: Sequence[np.random.Philox],
    kinds: Collection[str],
    recorders: Mapping[str, Recorder],
) -> None:
    settings: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    if "fisher" not in kinds:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if all(recorder.module is not head for recorder in recorders.values()):
            settings |= last_logits(model)
        model(**inputs, **settings)
        return
    logits: Any = getattr(model(**inputs, **settings), "logits", None)
    shape = tuple(getattr(logits, "shape", ()))
    if not 2 <= len(shape) <= 3 or shape[-1] < 2:
        raise CompositionError(
            f"the Fisher information needs the probabilities of classes or tokens, but {type(model).__name__} gives logits "
            f"of shape {shape or 'none'}; take what=('gram',), or a model with a head that classifies"
        )
    if not logits.requires_grad:
        raise CompositionError(f"none of the {len(recorders)} layers takes part in the model's output")
    logits.backward(_drawn_gradient(logits.detach(), mask_BT, draws))  # type: ignore[no-untyped-call]
    for recorder in recorders.values():
        recorder.finish()


def _drawn_gradient(logits: Tensor, mask_BT: Tensor, draws: Sequence[np.random.Philox]) -> Tensor:
    """Return d log p(labels) / d logits = onehot(labels) - p, labels drawn from p for each real position (or each text)."""
    whole_BTV = logits if logits.ndim == 3 else logits[:, None]
    gradient_BTV = torch.empty_like(whole_BTV)
    real_BT = mask_BT.to(logits.device) if whole_BTV.shape[:2] == mask_BT.shape else None
    for row, draw in enumerate(draws):
        p_TV = torch.softmax(whole_BTV[row].float(), dim=-1)
        uniform_T = (draw.random_raw(len(p_TV)) >> np.uint64(11)) * 2.0**-53
        for start in range(0, len(p_TV), DRAWN_AT_ONCE):
            part_CV = p_TV[start : start + DRAWN_AT_ONCE]
            total_CV = part_CV.cumsum(dim=1, dtype=torch.float64)
            height_C1 = torch.from_numpy(uniform_T[start : start + DRAWN_AT_ONCE, None]).to(total_CV.device)
            label_C1 = torch.searchsorted(total_CV, height_C1 * total_CV[:, -1:], right=True).clamp(max=p_TV.shape[1] - 1)
            part_CV.neg_().scatter_add_(1, label_C1, torch.ones_like(label_C1, dtype=p_TV.dtype))
        if real_BT is not None:
            p_TV[~real_BT[row]] = 0.0
        gradient_BTV[row] = p_TV
    return gradient_BTV.view(logits.shape)


def _draws(rows: Sequence[EncodedRow], seed: int) -> list[np.random.Philox]:
    """Return a random stream for each text, a function of the seed, its tokens, and its number among equal texts."""
    counts: dict[str, int] = {}
    streams = []
    for row in rows:
        text = json.dumps([row.prompt, row.target])
        counts[text] = counts.get(text, -1) + 1
        digest = hashlib.sha256(f"{seed}/{counts[text]}/{text}".encode()).digest()
        streams.append(np.random.Philox(key=int.from_bytes(digest[:8], "little")))
    return streams


@contextmanager
def _heads(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Put the adapter's trained heads into the model's parameters for the block; after it, the base's bit for bit."""
    parameters = dict(model.named_parameters())
    for name, head in adapter.heads.items():
        shape = tuple(parameters[name].shape) if name in parameters else "none"
        if shape != tuple(head.shape):
            raise LayerMismatch(
                f"adapter {adapter.name!r} has a head for parameter {name!r} of shape {tuple(head.shape)}, the model {shape}"
            )
    tied = tied_parameters(model) if adapter.heads else {}
    for name in adapter.heads:
        if name in tied:
            raise CompositionError(
                f"cannot put the head of adapter {adapter.name!r} into {name!r}: its memory is also {tied[name]!r} (tied "
                "weights), which would change too; load the model with tie_word_embeddings=False"
            )
    kept = {name: parameters[name].detach().clone() for name in adapter.heads}
    try:
        with torch.no_grad():
            for name, head in adapter.heads.items():
                parameters[name].copy_(head)
        yield
    finally:
        with torch.no_grad():
            for name, original in kept.items():
                parameters[name].copy_(original)


def make_recorders(model: nn.Module, names: Iterable[str], kinds: Collection[str]) -> dict[str, Recorder]:
    """Return {layer: recorder} for these paths of layers.

    Raises LayerMismatch for a layer that is neither linear nor an expert of a fused parameter.
    """
    modules = dict(model.named_modules())
    recorders: dict[str, Recorder] = {}
    for name in dict.fromkeys(names):
        if name not in modules and name.rpartition(".")[2].isdigit() and name.rsplit(".", 2)[0] in modules:
            recorders[name] = ExpertRecorder(expert_matrix(modules, name, None, "collect_statistics()"), kinds)
            continue
        shape = linear.shape(modules[name]) if name in modules else None
        if shape is None:
            what = type(modules[name]).__name__ if name in modules else "none of the model's"
            raise LayerMismatch(f"statistics are of linear layers (torch.nn.Linear, Conv1D), and {name!r} is {what}")
        recorders[name] = Recorder(name, modules[name], shape[:2], kinds)
    return recorders


def results(recorders: Mapping[str, Recorder], num_texts: int) -> dict[str, LayerStatistics]:
    """Return {layer: its statistics} after passes over `num_texts` texts.

    Raises CompositionError for a layer that never ran and for values that are not finite.
    """
    layers: dict[str, LayerStatistics] = {}
    fishers = {name: _mean(name, recorder.fisher_OI, num_texts) for name, recorder in recorders.items()}
    present = [tensor for tensor in fishers.values() if tensor is not None]
    norm = float(sum(float(tensor.double().square().sum()) for tensor in present)) ** 0.5 if present else None
    for name, recorder in recorders.items():
        if not recorder.num_tokens:
            raise CompositionError(f"layer {name!r} never ran on these texts, so there is nothing to record of it")
        gram_II = _mean(name, recorder.gram_II, recorder.num_tokens)
        fisher_OI, turned = fishers[name], isinstance(recorder, ExpertRecorder) and recorder.turned
        fisher_OI = fisher_OI.T.contiguous() if turned and fisher_OI is not None else fisher_OI
        layers[name] = LayerStatistics(gram_II, fisher_OI, recorder.num_tokens, norm, turned)
    return layers


def _mean(name: str, total: Tensor | None, count: int) -> Tensor | None:
    if total is None:
        return None
    mean = (total / max(count, 1)).cpu()
    if not algebra.all_finite(mean):
        raise CompositionError(f"layer {name!r} has activations or gradients that are NaN or infinite on these texts")
    return mean
