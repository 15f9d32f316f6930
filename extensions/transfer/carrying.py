"""Carries an adapter from the base model that it was trained on to another, and predicts how much of it arrives.

For each layer, x are its inputs and y its outputs, on the same tokens in the old base and in the new one. The update B A
becomes B' A' in one of three ways. Only "restore" makes a dense update, of one layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from loraweave import Adapter, AdapterUnsupported, BaseModelMismatch, Factors, InvalidTask, LayerMismatch, base_key
from loraweave.extend import Count, Fraction, GivenRows, Positive, Whole, check_options, factorise, options_of, tracked
from loraweave.extend.models import BaseLayer, as_base_layer, base_layer, require_same_base
from loraweave.extend.scoring import Asked, context_length, padded_inputs, takes, text_rows, untouched
from loraweave.extensions.transfer.drawn_regression import choose_ridge, drawn
from loraweave.extensions.transfer.old_answers import LR, Learning, agreement, answers, learned, split

Way = Literal["auto", "same", "activations", "restore"]
# the bytes of moments in memory at once; an adapter with more takes several passes over the samples
MAX_BYTES = 4 * 2**30
FIT, HELD_OUT = 0, 1
# the relative error up to which rounding explains the difference to a restored adapter
ROUNDING = 1e-3
# ways that need layers of equal sizes
EQUAL = ("same", "restore")
OTHER_WAYS = "way='same' and 'restore' need equal layers; 'activations' carries linear ones to another size or depth"


def transfer(
    adapter: Adapter,
    old: Any,
    new: Any,
    tokenizer: Any,
    samples: GivenRows,
    *,
    way: Way = "auto",
    prompts: Sequence[Asked] = (),
    least: Fraction = 0.5,
    ridge: Positive | None = None,
    rank: Count = 16,
    max_tokens: Count = 256,
    steps: Whole = 0,
    lr: Positive = LR,
    seed: Whole = 0,
    new_tokenizer: Any = None,
    progress: bool = True,
) -> Adapter:
    """Return an adapter of the model `old` carried to `new`, with the predicted share of its effect that it keeps.

    Both models read `samples`, texts or rows with input and target, up to `max_tokens` tokens of each; no label is learned
    from. Every second sample fits, the others are held out. "auto" is "restore" where that is exact, which shows that
    an adapter was fused, else "activations". The ways:

    - "same": B' = B, A' = A, for a base that was trained further, tuned or rounded (PortLLM, arXiv 2410.10870).
    - "activations": B' = N B, A' = A M, the ridge regressions y_new ~ N y_old and x_old ~ M x_new. `ridge` is relative to
      the mean square of a feature; it draws towards the identity where both sizes agree, else towards zero. By default
      each regression has the largest that its error on the other samples allows (`choose_ridge`).
    - "restore": B' A' is the best approximation, of at most `rank`, of B A - (W_new - W_old), also in the linear layers that
      the adapter leaves alone and the new base does not: while it is active, the new base is the old one. Where the new one
      is the old one with an adapter fused into it, `rank` of both ranks' sum is exact.

    Where the numbers of blocks differ, blocks are matched by relative depth, each at most once; the others are left out.

    The prediction of a layer is 1 - E|B A x_old - K B' A' x_new|^2 / E|B A x_old|^2 on held-out samples, at least 0, K being
    the regression y_old ~ K y_new on them; with "restore", 1 - E|(B A - (W_new - W_old) - B' A') x_old|^2 / E|B A x_old|^2.
    The adapter's is the mean over its layers, 0 for those left out. With `prompts`, of the adapter's own task and without
    answers, the prediction is instead the share of them that `new` with the new adapter answers word for word as `old` does
    with the old one, greedily, up to MAX_ANSWER tokens. With `steps`, the new adapter first learns those answers, by so many
    steps on its a and b at rates that fall from `lr`: the divergence of `new`'s predictions from `old`'s at their tokens.
    Every fourth prompt judges, alone, and the others teach, in an order that follows from `seed`. Where the steps bring it
    no nearer to those that judge, it stays as it was; `card["transfer"]["learned"]` says so, with the numbers of prompts and
    the loss before and after. `card["transfer"]` has all of these, the way and the bases; `card["recipe"]` has the parent.
    Scores are not taken over. `tokenizer` is read by both bases: of other vocabularies, `new_tokenizer` has to give the
    samples the same tokens. A base of another family does not; `distil_adapter` is for it.

    Raises AdapterUnsupported for a prediction below `least`, and for more than a plain LoRA of linear layers;
    BaseModelMismatch for an adapter of another base than `old`, or another vocabulary; LayerMismatch for layers
    without a counterpart; InvalidTask for too few samples or prompts; TrainingError for a loss that is not finite;
    WeightingError for settings outside their range.
    """
    settings: dict[str, Any] = {"way": way, "least": least, "ridge": ridge, "rank": rank}
    settings |= {"max_tokens": max_tokens, "steps": steps, "lr": lr, "seed": seed}
    check_options("transfer()", settings, options_of(transfer, after=5))
    _require_same_tokens(old, new, (tokenizer, new_tokenizer), samples, max_tokens)
    lessons, judges = split(prompts) if steps else ([], list(prompts))
    restored = _restored_layers(adapter, old, new, rank) if way == "auto" else {}
    if way == "auto":
        way = settings["way"] = "restore" if restored else "activations"
    layers, fates = _carried_layers(adapter, old, new, tokenizer, samples, restored, settings, progress)
    share = sum(layer["kept"] for layer in fates.values()) / len(fates)
    key = base_key(new)
    about = {"from": adapter.base_model, "to": key.id, "way": way, "kept": share, "layers": fates}
    made = replace(adapter, base_model=key.id, layers=layers, fingerprint=key.fingerprint)
    if judges:
        said = answers(old, adapter, tokenizer, judges, taught=bool(lessons), progress=progress)
        if lessons:
            shown = answers(old, adapter, tokenizer, lessons, taught=True, progress=progress)
            how = Learning(steps, lr, seed)
            made, about["learned"] = learned(made, new, tokenizer, shown, said, how, progress=progress)
        says = answers(new, made, tokenizer, judges, progress=progress)
        share = about["answers"] = agreement(tokenizer, said, says)
    if share < least:
        raise AdapterUnsupported(
            f"transfer of {adapter.name!r} from {adapter.base_model!r} to {key.id!r} by way={way!r} is predicted to keep "
            f"{share:.2f} of its {'answers' if prompts else 'effect'}, below least={least:g}: try another way, "
            f"{'more steps' if lessons else 'prompts and steps'}, train on the new base, or lower least"
        )
    # card entries about the old base do not hold for the new one
    card = {name: value for name, value in adapter.card.items() if name not in ("report", "peft", "scores")}
    parents = [{"hash": adapter.hash, "name": adapter.name}]
    card["recipe"] = {"method": "transfer", "options": settings, "parents": parents}
    return replace(made, card={**card, "transfer": about})


def _require_same_tokens(old: Any, new: Any, tokenizers: tuple[Any, Any], samples: GivenRows, max_tokens: int) -> None:
    way_out = "or use distil_adapter(), which teaches a base of another family what the adapter answers"
    counts = [model.get_input_embeddings().num_embeddings for model in (old, new)]
    if tokenizers[1] is not None:
        rows, others = (text_rows(old, tokenizer, samples, max_tokens) for tokenizer in tokenizers)
        differing = [number for number, pair in enumerate(zip(rows, others, strict=True), start=1) if pair[0] != pair[1]]
        if differing:
            raise BaseModelMismatch(
                f"the tokenizers read sample {differing[0]} as other tokens: pass one for both, {way_out}"
            )
    elif counts[0] != counts[1]:
        raise BaseModelMismatch(
            f"the old base has {counts[0]:,} tokens and the new one {counts[1]:,}: pass new_tokenizer=, {way_out}"
        )


def _carried_layers(
    adapter: Adapter,
    old: Any,
    new: Any,
    tokenizer: Any,
    samples: GivenRows,
    restored: Mapping[str, Factors],
    given: Mapping[str, Any],
    progress: bool,
) -> tuple[dict[str, Factors], dict[str, dict[str, Any]]]:
    """Return the carried layers by new name (those `restored` as they are), and each old layer's new name and kept share."""
    way, ridge = given["way"], given["ridge"]
    layers: dict[str, Factors] = {}
    fates: dict[str, dict[str, Any]] = {name: {"to": None, "kept": 0.0} for name in adapter.layers}
    with torch.no_grad():
        for group in _groups(matched(adapter, old, new, way)):
            seen = see(old, new, tokenizer, samples, group, max_tokens=given["max_tokens"], progress=progress)
            for pair in tracked(group, f"carrying {adapter.name!r}", total=len(group), shown=progress):
                factors, moments = _update_of(adapter, pair.old), seen[pair.old.name]
                carried = restored.get(pair.old.name)
                if carried is None:
                    carried = carry(factors, pair, moments, way, ridge=ridge, rank=given["rank"])
                layers[pair.new.name] = carried
                if pair.old.name in fates:
                    kept = kept_share(factors, carried, pair, moments, way, ridge=ridge)
                    fates[pair.old.name] = {"to": pair.new.name, "kept": kept}
    return layers, fates


def _restored_layers(adapter: Adapter, old: nn.Module, new: nn.Module, rank: int) -> dict[str, Factors]:
    """Return the factors that way "restore" gives each layer that differs, by old name, if a low `rank` makes all exact.

    Exact means up to rounding. Empty if one is not exact, or if the layers of the bases do not correspond.
    """
    try:
        pairs = matched(adapter, old, new, "restore")
    except LayerMismatch:
        return {}
    changed = [pair for pair in pairs if not torch.equal(pair.old.weight_OI, pair.new.weight_OI)]
    factors_by_layer: dict[str, Factors] = {}
    # any difference has a rank of its smaller side
    if any(2 * rank > min(_sizes(pair.old)) for pair in changed):
        return factors_by_layer
    for pair in changed:
        factors_by_layer[pair.old.name], error = _restored(_update_of(adapter, pair.old), pair, rank)
        if error > ROUNDING:
            return {}
    return factors_by_layer


def _restored(factors: Factors, pair: Pair, rank: int) -> tuple[Factors, float]:
    """Return the factors that way "restore" gives a layer, and their relative error."""
    a_RI, b_OR, error = factorise(_wanted(factors, pair).float(), rank=rank)
    return replace(factors, a_RI=a_RI, b_OR=b_OR), error


class Pair(NamedTuple):
    """A layer of the old base and its counterpart in the new one."""

    old: BaseLayer
    new: BaseLayer


class Moments:
    """Mean products of the bases' vectors on the same tokens, float64: oo (old by old), nn (new by new), no (new by old).

    Each is (2, rows, columns), over the samples of the fit and over those held out.
    """

    def __init__(self, num_old: int, num_new: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.oo, self.nn, self.no = zeros(2, num_old, num_old), zeros(2, num_new, num_new), zeros(2, num_new, num_old)

    def add(self, half: int, old_TF: Tensor, new_TF: Tensor, num_tokens: int) -> None:
        """Add one sample's vectors to half 0 (fit) or 1 (held out), divided by the number of tokens of that half."""
        old_TF, new_TF = (x.reshape(-1, x.shape[-1]).to(self.oo) for x in (old_TF, new_TF))
        for total, left, right in ((self.oo, old_TF, old_TF), (self.nn, new_TF, new_TF), (self.no, new_TF, old_TF)):
            total[half].addmm_(left.T, right, alpha=1 / num_tokens)


# the moments of a pair's inputs, and of its outputs
Seen = tuple[Moments, Moments]


def matched(adapter: Adapter, old: nn.Module, new: nn.Module, way: Way) -> list[Pair]:
    """Return the adapter's layers paired with their counterparts, without layers of blocks that have none."""
    asker = f"adapter {adapter.name!r}"
    require_same_base(asker, adapter.base, base_key(old))
    if adapter.heads:
        raise AdapterUnsupported(f"{asker} has trained parameters of one base, the first {next(iter(adapter.heads))!r}")
    if adapter.invocation:
        raise AdapterUnsupported(
            f"{asker} acts only from its invocation tokens {list(adapter.invocation)} on, which another tokenizer numbers "
            "otherwise: train it on the new base"
        )
    modules_old, modules_new = dict(old.named_modules()), dict(new.named_modules())
    pairs = []
    for name, factors in adapter.layers.items():
        if factors.kind != "linear" or not factors.bound or factors.gain_O is not None:
            raise AdapterUnsupported(
                f"{asker}: layer {name!r} is not a plain LoRA of a linear layer; lw.to_lora(adapter, old) converts a gain"
            )
        layer, target = base_layer(modules_old, name, asker), _counterpart(name, modules_old, modules_new)
        if (sizes := (len(factors.b_OR), factors.a_RI.shape[1])) != _sizes(layer):
            raise LayerMismatch(
                f"{asker} updates layer {name!r} of (O, I) {sizes}, which is {_sizes(layer)} in the old base"
            )
        if target is not None:
            pairs.append(Pair(layer, base_layer(modules_new, target, f"{asker}, carried to the new base,")))
        elif way in EQUAL:
            raise LayerMismatch(f"{asker}: layer {name!r} has no counterpart in the new base, of other depth; {OTHER_WAYS}")
    for one, other in pairs:
        alike = (one.name, *_sizes(one)) == (other.name, *_sizes(other))
        if other.kind != "linear" or (way in EQUAL and not alike):
            raise LayerMismatch(
                f"{asker}: layer {one.name!r} is {one.kind} {_sizes(one)} in the old base, and its counterpart "
                f"{other.name!r} is {other.kind} {_sizes(other)} in the new one; {OTHER_WAYS}"
            )
    return [*pairs, *_changed(modules_old, modules_new, adapter.layers)] if way == "restore" else pairs


def _changed(old: Mapping[str, nn.Module], new: Mapping[str, nn.Module], known: Collection[str]) -> list[Pair]:
    """Return the linear layers whose weights differ in the two bases, without the layers named `known`."""
    both = ((as_base_layer(name, old[name]), as_base_layer(name, new[name])) for name in old if name in new)
    return [
        Pair(one, other)
        for one, other in both
        if one is not None
        and other is not None
        and one.name not in known
        and one.kind == other.kind == "linear"
        and _sizes(one) == _sizes(other)
        and not torch.equal(one.weight_OI, other.weight_OI)
    ]


def _update_of(adapter: Adapter, layer: BaseLayer) -> Factors:
    """Return the adapter's update of a layer, of rank 0 where it has none."""
    none = Factors(torch.zeros(0, layer.num_inputs), torch.zeros(layer.num_outputs, 0))
    return adapter.layers.get(layer.name, none)


def _sizes(layer: BaseLayer) -> tuple[int, int]:
    return layer.num_outputs, layer.num_inputs


def _counterpart(name: str, old: Mapping[str, nn.Module], new: Mapping[str, nn.Module]) -> str | None:
    """Return the name of a layer's counterpart in the new base; None if its block (first number in its path) has none."""
    parts = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
    if parts is None:
        return name
    head, number, tail = parts.groups()
    depth_old, depth_new = (
        sum(1 for path in modules if path.startswith(head) and path[len(head) :].isdigit()) for modules in (old, new)
    )
    if not depth_new:
        return name
    ratio = (depth_new - 1) / max(depth_old - 1, 1)
    # nearest first; the earlier of two equally near blocks
    places = {block: round(block * ratio) for block in range(depth_old)}
    rivals = [block for block, place in places.items() if place == places[int(number)]]
    best = min(rivals, key=lambda block: (abs(block * ratio - places[block]), block))
    return f"{head}{places[best]}{tail}" if best == int(number) else None


def _groups(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    """Split the pairs into groups whose moments fit into MAX_BYTES."""
    sides = [tuple(zip(_sizes(pair.old), _sizes(pair.new), strict=True)) for pair in pairs]
    largest = max((sum(16 * (a * a + a * b + b * b) for a, b in both) for both in sides), default=1)
    count = max(1, MAX_BYTES // largest)
    return [pairs[start : start + count] for start in range(0, len(pairs), count)]


def see(
    old: Any, new: Any, tokenizer: Any, samples: GivenRows, pairs: Sequence[Pair], *, max_tokens: int, progress: bool
) -> dict[str, Seen]:
    """Return each pair's moments, by the old layer's name, from both models reading the samples one at a time."""
    rows = text_rows(old, tokenizer, samples, min(max_tokens, context_length(new) or max_tokens))
    highest = max(max(row.prompt + row.target) for row in rows)
    if highest >= (size := getattr(new.get_input_embeddings(), "num_embeddings", highest + 1)):
        raise BaseModelMismatch(
            f"the samples have token {highest}, but the new base's vocabulary has {size}; it must read the same tokens"
        )
    counts = [sum(map(len, rows[half::2])) for half in (FIT, HELD_OUT)]
    widest = max(size for pair in pairs for layer in pair for size in _sizes(layer))
    if min(counts) < widest:
        raise InvalidTask(
            f"the samples' halves have {counts[FIT]} and {counts[HELD_OUT]} tokens, too few for regressions on {widest} "
            "features: give more or longer samples"
        )
    device, sides = next(new.parameters()).device, list(zip(*pairs, strict=True))
    seen: dict[str, Seen] = {}
    for one, other in pairs:
        y, x = (Moments(*sizes, device) for sizes in zip(_sizes(one), _sizes(other), strict=True))
        seen[one.name] = (x, y)
    with untouched(old), untouched(new):
        for number, row in enumerate(tracked(rows, "reading samples", total=len(rows), shown=progress)):
            before, after = (
                _vectors(model, tokenizer, row, layers) for model, layers in zip((old, new), sides, strict=True)
            )
            for pair, was, now in zip(pairs, before, after, strict=True):
                if was[0].shape[:-1] != now[0].shape[:-1]:
                    raise AdapterUnsupported(
                        f"layer {pair.old.name!r} reads inputs {tuple(was[0].shape)} in the old base, and {pair.new.name!r} "
                        f"{tuple(now[0].shape)} in the new one; only layers that read the same tokens can be compared"
                    )
                for moments, left, right in zip(seen[pair.old.name], was, now, strict=True):
                    moments.add(number % 2, left, right, counts[number % 2])
    return seen


def _vectors(model: Any, tokenizer: Any, row: Any, layers: Sequence[BaseLayer]) -> list[tuple[Tensor, Tensor]]:
    """Return (inputs, outputs) of each layer's last call while the model reads one sample without padding."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def saw(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen[name] = (args[0] if args else next(iter(kwargs.values())), output)

    inputs, _ = padded_inputs(model, tokenizer, [row])
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(partial(saw, layer.name), with_kwargs=True).remove)
        model(**inputs, **({"use_cache": False} if takes(model, "use_cache") else {}))
    if missing := [layer.name for layer in layers if layer.name not in seen]:
        raise AdapterUnsupported(f"layer {missing[0]!r} never ran on the samples, so that nothing is known of it")
    return [seen[layer.name] for layer in layers]


def carry(factors: Factors, pair: Pair, seen: Seen, way: Way, *, ridge: float | None = None, rank: int = 16) -> Factors:
    """Return the update of one layer in the new base; a bias of the adapter is carried like its outputs."""
    if way == "same":
        return factors
    if way == "restore":
        return _restored(factors, pair, rank)[0]
    x, y = seen
    b_OS, a_RI = factors.b_OR.double(), factors.a_RI.double()
    if factors.bias_O is not None:
        b_OS = torch.cat([b_OS, factors.bias_O.double()[:, None]], dim=1)
    ridge_n = ridge or choose_ridge(y.oo, y.no, y.nn, FIT)
    gram_OO, cross_NO = drawn(y.oo[FIT], y.no[FIT], ridge_n)
    b_OS = cross_NO @ torch.linalg.solve(gram_OO, b_OS.to(gram_OO))
    ridge_m = ridge or choose_ridge(x.nn, x.no.mT, x.oo, FIT)
    gram_NN, cross_IN = drawn(x.nn[FIT], x.no[FIT].T, ridge_m)
    a_RI = torch.linalg.solve(gram_NN, cross_IN.T @ a_RI.T.to(gram_NN)).T
    b_OS, a_RI = b_OS.float().cpu(), a_RI.float().cpu().contiguous()
    bias_O = b_OS[:, -1].contiguous() if factors.bias_O is not None else None
    return replace(factors, a_RI=a_RI, b_OR=b_OS[:, : factors.rank].contiguous(), bias_O=bias_O)


def _wanted(factors: Factors, pair: Pair) -> Tensor:
    """Return B A - (W_new - W_old), float64 on the CPU: the update that makes the new layer act as the old one with B A."""
    return factors.b_OR.double() @ factors.a_RI.double() - (pair.new.weight_OI - pair.old.weight_OI)


def kept_share(factors: Factors, carried: Factors, pair: Pair, seen: Seen, way: Way, *, ridge: float | None = None) -> float:
    """Return the predicted share, 0 to 1, of one layer's effect that is kept; 1 for an update of zero."""
    if way != "restore":
        return _regressed(factors, carried, seen, ridge)
    update_OI = factors.b_OR.double() @ factors.a_RI.double()
    rest_OI = _wanted(factors, pair) - carried.b_OR.double() @ carried.a_RI.double()
    gram_II = seen[0].oo[HELD_OUT].cpu()
    left, whole = (float(((d_OI @ gram_II) * d_OI).sum()) for d_OI in (rest_OI, update_OI))
    return max(0.0, 1 - left / whole) if whole else 1.0


def reading_ridge(seen: Seen) -> float:
    """Return the ridge for the regression y_old ~ K y_new on the held-out samples, chosen by `choose_ridge`."""
    _, y = seen
    return choose_ridge(y.nn, y.no.mT, y.oo, HELD_OUT)


def _regressed(factors: Factors, carried: Factors, seen: Seen, ridge: float | None) -> float:
    x, y = seen
    b_OR, a_RI, new_b_OR, new_a_RI = (part.to(x.oo) for update in (factors, carried) for part in (update.b_OR, update.a_RI))
    gram_NN, cross_ON = drawn(y.nn[HELD_OUT], y.no[HELD_OUT].T, ridge or reading_ridge(seen))
    old, new = (a_RI, b_OR), (new_a_RI, cross_ON @ torch.linalg.solve(gram_NN, new_b_OR))
    terms = ((old, x.oo, old), (new, x.no, old), (new, x.nn, new))
    size, shared, new_size = (
        float((left[1].T @ right[1] * (left[0] @ moments[HELD_OUT] @ right[0].T)).sum()) for left, moments, right in terms
    )
    # the rest over size is 1 - (size - 2 shared + new_size) / size
    return max(0.0, (2 * shared - new_size) / size) if size else 1.0
