"""The hypotheses on what answered in place of the adapter that was asked: other adapters, and known faults of engines."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loraweave import Adapter, Factors
from loraweave.extend.formats import entry
from loraweave.extend.models import head_size

Layers = Mapping[str, Factors]

# parts of layers' names that engines compute together, and may leave out together
PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# layers that engines may take for each other
EXCHANGED = (("k_proj", "v_proj"), ("gate_proj", "up_proj"))
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A verdict, and the weighted adapters that answer if it is true; no adapters for the base."""

    verdict: str
    parts: tuple[tuple[Adapter, float], ...] = ()

    @cached_property
    def mixture(self) -> dict[str, float] | None:
        """The weights of the adapters that answer if the hypothesis is true, {content hash: weight}; None for the base."""
        mixture: dict[str, float] = defaultdict(float)
        for adapter, weight in self.parts:
            mixture[adapter.hash] += weight
        return dict(mixture) or None

    @cached_property
    def sign(self) -> frozenset[tuple[str, float]]:
        """The mixture rounded to six digits: hypotheses with equal signs have the same effect."""
        return frozenset((content, round(weight, 6)) for content, weight in (self.mixture or {}).items())


BASE = Hypothesis("got the base")


def likely(asked: Adapter) -> list[Hypothesis]:
    """Return the faults that a probe must tell apart: the base alone, half the scale, and each kind of layer left out."""
    return [BASE, Hypothesis("scale halved", ((asked, 0.5),)), *_without_sites(asked)]


def possible(
    asked: Adapter,
    others: Iterable[tuple[str, Adapter]],
    older: Iterable[tuple[str, Adapter]] = (),
    parts: Sequence[tuple[Adapter, float]] = (),
    config: Any = None,
) -> list[Hypothesis]:
    """Return every known fault, the plainest first, without duplicates.

    `others` and `older` are (name, adapter) of other adapters and older versions; `parts` are the adapters of a weighted sum
    with their weights; `config` is the base model's configuration, which has the number of heads.
    """
    others, faults = list(others), likely(asked)
    if parts:
        faults.append(Hypothesis("weights of the sum not applied", tuple((part, 1.0) for part, _ in parts)))
    faults += [Hypothesis(f"got {name}", ((other, 1.0),)) for name, other in others]
    faults += [Hypothesis(f"an older version: {name}", ((other, 1.0),)) for name, other in older]
    faults += [Hypothesis(verdict, ((asked, factor),)) for factor, verdict in _scales(asked).items()]
    if len(parts) > 1:
        for left, _ in parts:
            rest = tuple((part, weight) for part, weight in parts if part is not left)
            faults.append(Hypothesis(f"{left.name} left out", rest))
    faults += [_changed(verdict, asked, layers) for verdict, layers in _damaged(asked, config)]
    faults += [Hypothesis(f"{name} added to it", ((asked, 1.0), (other, 1.0))) for name, other in others]
    known, kept = {Hypothesis("", ((asked, 1.0),)).sign}, []
    for hypothesis in faults:
        if hypothesis.sign not in known:
            known.add(hypothesis.sign)
            kept.append(hypothesis)
    return kept


def _changed(verdict: str, asked: Adapter, layers: Layers) -> Hypothesis:
    return Hypothesis(verdict, ((replace(asked, layers=layers), 1.0),))


def _scales(asked: Adapter) -> dict[float, str]:
    """Return {wrong factor of the scale: verdict} for the adapter."""
    root = asked.rank**0.5
    verdicts = {
        2.0: "scale doubled, or added twice",
        -1.0: "subtracted instead of added",
        1 / root: f"scale 1/{root:.3g} of its own: rank-stabilised scaling not applied?",
        root: f"scale {root:.3g} times its own: rank-stabilised scaling where there is none?",
        float(asked.rank): f"scale {asked.rank} times its own: alpha not divided by the rank?",
        1 / asked.rank: f"scale 1/{asked.rank} of its own: divided by the rank twice?",
    }
    alpha = entry(asked.card.get("peft"), "lora_alpha", (int, float))
    if alpha and (scale := alpha / asked.rank) != 1:
        verdicts.setdefault(1 / scale, f"scale {1 / scale:.3g} times its own: alpha not applied?")
    for factor in (0.25, 4.0):
        verdicts.setdefault(factor, f"scale {factor:g} times its own")
    return verdicts


def _without_sites(asked: Adapter) -> list[Hypothesis]:
    sites = {_site(layer) for layer in asked.layers}
    groups = [(site,) for site in sorted(sites)] + [group for group in PACKED if set(group) < sites]
    faults = []
    for group in groups:
        layers = {layer: factors for layer, factors in asked.layers.items() if _site(layer) not in group}
        if layers:
            faults.append(_changed(f"{' and '.join(group)} not applied", asked, layers))
    return faults


def _damaged(asked: Adapter, config: Any) -> Iterator[tuple[str, Layers]]:
    """Yield (verdict, damaged layers) for each way in which engines are known to load an adapter wrongly."""
    layers = asked.layers
    yield from _in_other_blocks(layers)
    for order, interleaved in (("as for a GGUF of llama's", True), ("as if taken from a GGUF", False)):
        if (turned := _turned(layers, config, interleaved)) is not None:
            yield f"rows of q_proj and k_proj permuted {order}", turned
    for left, right in EXCHANGED:
        if (exchanged := _exchanged(layers, left, right)) is not None:
            yield f"{left} and {right} exchanged", exchanged
    if (half := asked.rank // 2) and any(factors.rank > half for factors in layers.values()):
        cut = {
            layer: replace(factors, a_RI=factors.a_RI[:half], b_OR=factors.b_OR[:, :half])
            for layer, factors in layers.items()
        }
        yield f"only {half} of {asked.rank} ranks applied", cut
    for what, names in (("DoRA's magnitude", ("magnitude_O", "gain_O")), ("the trained bias", ("bias_O", "base_bias_O"))):
        if any(getattr(factors, name) is not None for factors in layers.values() for name in names):
            nothing: dict[str, Any] = dict.fromkeys(names)
            yield f"{what} not applied", {layer: replace(factors, **nothing) for layer, factors in layers.items()}


def _in_other_blocks(layers: Layers) -> Iterator[tuple[str, Layers]]:
    blocks = sorted({block for layer in layers if (block := _block(layer)) is not None})
    if len(blocks) < 2:
        return
    for verdict, kept in (
        (f"block {blocks[0]} not applied", set(blocks[1:])),
        (f"block {blocks[-1]} not applied", set(blocks[:-1])),
        (f"only blocks {blocks[0]} to {blocks[len(blocks) // 2 - 1]} applied", set(blocks[: len(blocks) // 2])),
        (f"only blocks {blocks[len(blocks) // 2]} to {blocks[-1]} applied", set(blocks[len(blocks) // 2 :])),
    ):
        yield verdict, {layer: factors for layer, factors in layers.items() if _block(layer) in kept}
    orders = (
        ("blocks in the order of their numbers as text", sorted(blocks, key=str)),
        ("blocks one too late", [blocks[-1], *blocks[:-1]]),
        ("blocks one too early", [*blocks[1:], blocks[0]]),
    )
    for verdict, order in orders:
        source = dict(zip(blocks, order, strict=True))
        moved = {
            layer: layer if (block := _block(layer)) is None else _BLOCK.sub(str(source[block]), layer, count=1)
            for layer in layers
        }
        fits = all(name in layers and _shape(layers[name]) == _shape(layers[layer]) for layer, name in moved.items())
        if fits and order != blocks:
            yield verdict, {layer: layers[name] for layer, name in moved.items()}


def _turned(layers: Layers, config: Any, interleaved: bool) -> Layers | None:
    """Return the layers with the halves of q's and k's heads interleaved, so that rotary pairs are adjacent, or parted."""
    width = head_size(config)
    concerned = [layer for layer in layers if _site(layer) in ("q_proj", "k_proj")]
    if not concerned or not width or any(layers[layer].b_OR.shape[0] % width for layer in concerned):
        return None
    sides, turned = (2, width // 2) if interleaved else (width // 2, 2), dict(layers)
    for layer in concerned:
        b_OR = layers[layer].b_OR
        b_OR = b_OR.reshape(-1, *sides, b_OR.shape[1]).transpose(1, 2).reshape(b_OR.shape)
        turned[layer] = replace(layers[layer], b_OR=b_OR)
    return turned


def _exchanged(layers: Layers, left: str, right: str) -> Layers | None:
    exchanged = dict(layers)
    for layer in layers:
        if _site(layer) == left:
            other = layer.removesuffix(left) + right
            if other not in layers or _shape(layers[layer]) != _shape(layers[other]):
                return None
            exchanged[layer], exchanged[other] = layers[other], layers[layer]
    return exchanged if any(exchanged[layer] is not layers[layer] for layer in layers) else None


def _site(layer: str) -> str:
    return layer.rpartition(".")[2]


def _block(layer: str) -> int | None:
    match = _BLOCK.search(layer)
    return None if match is None else int(match[0])


def _shape(factors: Factors) -> tuple[int, int]:
    return factors.b_OR.shape[0], factors.a_RI.shape[1]
