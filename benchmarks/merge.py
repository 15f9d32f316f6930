"""What merging costs beside peft's `add_weighted_adapter`, and how exact both are.

    python benchmarks/merge.py all                the whole run, below 8 minutes on two idle cores
    python benchmarks/merge.py svd --quick        one section on fewer blocks
    python benchmarks/merge.py layer              one layer of 4096x11008, time and memory in a process of its own

Sections: svd (the sum cut to a rank), linear (the sum by concatenation), elementwise (methods on dense entries), core
(spectral methods on the factors against their dense forms), layer. Adapters are random, on the seven linear layers of
SmolLM2-135M's blocks. Every figure is a ratio of interleaved runs in one process, after the results were checked against
float64. "merge" is `lw.merge` with its report; "arithmetic" is the same layers without it. peft's time includes the new
adapter's modules, which `add_weighted_adapter` makes; hashes of ours are computed once for each adapter, before.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
import typer
from _adapters import ALL, base_model, in_peft
from _merge_layer import core_section, layer_section
from _ratios import Gate, Way, compare, console, require
from peft.utils import merge_utils
from torch import Tensor

import loraweave as lw
from loraweave import registry
from loraweave.hub.adapter import Adapter
from loraweave.hub.factorise import factorise
from loraweave.hub.side_by_side import side_by_side
from loraweave.hub.truncation import compress_sum
from loraweave.types import Factors

Section = Literal["all", "svd", "linear", "elementwise", "core", "layer"]

SVD_CASES = ((2, 16), (8, 8), (8, 16), (20, 16), (2, 64), (8, 64), (20, 64))
# peft takes a minute and more for one of these merges of the whole model; all blocks have the same shapes
FEW_BLOCKS, QUICK_BLOCKS = 3, 1
# of an fp32 result: the rounding of two factors is 3.6e-8
EXACT = 1e-7
# ours, in place of peft's type of that name with "_svd"; density 0.5 throughout
ELEMENTWISE = {
    "ties": "ties_per_layer",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
    "magnitude_prune": "magnitude_prune",
}
RANDOM = ("dare_linear", "dare_ties")
DENSITY = 0.5
CORE_SHAPE = (576, 1536)
LARGE_SHAPE = (4096, 11008)
WHOLE = 30


def adapters(model: Any, num: int, rank: int, blocks: int, seed: int) -> list[Adapter]:
    """Random adapters on the first blocks of the model, with factors of the size of trained ones."""
    found = []
    for number in range(num):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        layers = {}
        for layer, module in model.named_modules():
            if layer.endswith(ALL) and int(layer.split(".layers.")[1].split(".")[0]) < blocks:
                a_RI = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
                layers[layer] = Factors(a_RI, torch.randn(module.out_features, rank, generator=generator) * 0.02)
        found.append(Adapter(f"a{number:02d}", model.name_or_path, layers))
    return found


def weights(num: int) -> list[float]:
    return [(0.3 + 0.1 * number) * (-1 if number % 5 == 4 else 1) for number in range(num)]


def shortened(model: Any, blocks: int) -> Any:
    """The model with its first blocks alone."""
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    return model


def product(factors: Factors) -> Tensor:
    return factors.b_OR.double() @ factors.a_RI.double()


def truncated_sum(experts: Sequence[Factors], values: Sequence[float], rank: int) -> tuple[Tensor, float]:
    """The dense truncation of the weighted sum in float64, and its relative error."""
    total_OI = torch.stack([w * product(f) for f, w in zip(experts, values, strict=True)]).sum(dim=0)
    u_OR, sigma_R, vh_RI = torch.linalg.svd(total_OI, full_matrices=False)
    return (u_OR[:, :rank] * sigma_R[:rank]) @ vh_RI[:rank], float(sigma_R[rank:].norm() / sigma_R.norm())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


class Merging:
    """The same adapters with us and in peft."""

    def __init__(self, model: Any, num: int, rank: int, blocks: int, seed: int) -> None:
        self.rank = rank
        self.adapters = adapters(model, num, rank, blocks, seed)
        self.weights = weights(num)
        self.peft = in_peft(shortened(model, blocks), self.adapters)
        self.names = [adapter.name for adapter in self.adapters]
        self.layers = list(self.adapters[0].layers)
        for adapter in self.adapters:
            _ = adapter.hash

    def ours(self, method: str, **options: Any) -> Adapter:
        return lw.merge(self.adapters, self.weights, method=method, progress=False, **options)

    def arithmetic(self, rank: int | None) -> list[Factors]:
        """The weighted sum of every layer, cut to a rank or not, and nothing else."""
        stacks = ([adapter.layers[layer] for adapter in self.adapters] for layer in self.layers)
        if rank is None:
            linear = registry.get("methods", "linear")
            return [linear(experts, self.weights) for experts in stacks]
        cuts = side_by_side(
            lambda experts: compress_sum(experts, self.weights, rank)[0],
            stacks,
            worth=lambda _: len(self.adapters) * rank > 64,
        )
        return list(cuts)

    def in_peft(self, kind: str, **options: Any) -> None:
        self.peft.base_model.add_weighted_adapter(self.names, self.weights, "merged", combination_type=kind, **options)

    def forget(self) -> None:
        if "merged" in self.peft.peft_config:
            self.peft.base_model.delete_adapter("merged")

    def peft_delta(self, layer: str) -> Tensor:
        module = self.peft.base_model.model.get_submodule(layer)
        product_OI = module.lora_B["merged"].weight.double() @ module.lora_A["merged"].weight.double()
        return product_OI * module.scaling["merged"]


@torch.no_grad()
def svd_gates(setting: Merging) -> list[Gate]:
    """Ours and peft's first block against float64."""
    merged = setting.ours("svd", rank=setting.rank)
    alone = dict(zip(setting.layers, setting.arithmetic(setting.rank), strict=True))
    setting.in_peft("svd", svd_rank=setting.rank)
    ours, theirs, told, bare = 0.0, 0.0, 0.0, 0.0
    for layer in setting.layers[: len(ALL)]:
        experts = [adapter.layers[layer] for adapter in setting.adapters]
        expected, error = truncated_sum(experts, setting.weights, setting.rank)
        ours = max(ours, relative(product(merged.layers[layer]), expected))
        bare = max(bare, relative(product(alone[layer]), expected))
        theirs = max(theirs, relative(setting.peft_delta(layer), expected))
        told = max(told, abs(merged.report[layer].relative_error - error))
    setting.forget()
    console.print(f"largest error against float64: loraweave {ours:.1e}, peft {theirs:.1e}, {theirs / ours:.0f} times")
    console.print(f"largest error of the arithmetic: {bare:.1e}, {theirs / bare:.0f} times smaller than peft's")
    return [
        Gate("merge against float64", ours, EXACT),
        Gate("arithmetic against float64", bare, EXACT),
        Gate("reported error against float64", told, 1e-5),
        Gate("peft's result against float64", theirs, 1e-2),
    ]


def best_seconds(run: Callable[[], object], times: int = 3) -> float:
    run()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return min(taken)


def svd_section(model: Callable[[], Any], quick: bool, whole: int, rounds: int, seed: int) -> None:
    square = torch.rand(1024, 1024, dtype=torch.float64)
    rate = 2 * 1024**3 / best_seconds(lambda: square @ square)
    for num, rank in SVD_CASES[:3] if quick else SVD_CASES:
        # ranks of 64 are beside the goals: a part of the model says as much
        blocks = whole if rank <= 16 else min(whole, FEW_BLOCKS)
        setting = Merging(model(), num, rank, blocks, seed)
        console.rule(f"svd, K={num}, r={rank}, {len(setting.layers)} layers")
        require(svd_gates(setting))
        ways = {
            "peft, svd": Way(lambda setting=setting: setting.in_peft("svd", svd_rank=setting.rank), setting.forget),
            "loraweave, merge": Way(lambda setting=setting: setting.ours("svd", rank=setting.rank)),
            "loraweave, arithmetic": Way(lambda setting=setting: setting.arithmetic(setting.rank)),
        }
        compare(f"svd K={num} r={rank}", ways, rounds=rounds, seconds=90, tables={"times as fast": ("peft, svd", True)})
        floor = sum(least_products(setting.layers, setting.adapters, rank)) / rate
        share = floor / best_seconds(lambda setting=setting: setting.arithmetic(setting.rank))
        console.print(
            f"limit: the products alone, at the {rate / 1e9:.0f} GFLOP/s of float64, are {share:.0%} of the arithmetic"
        )


def least_products(layers: Sequence[str], experts: Sequence[Adapter], rank: int) -> list[float]:
    """Floating point operations for each layer: half of both Gram matrices, and the factors of the result."""
    found = []
    for layer in layers:
        factors = experts[0].layers[layer]
        sides = factors.b_OR.shape[0] + factors.a_RI.shape[1]
        rows = len(experts) * factors.rank
        found.append(float(sides * rows * (rows + 2 * rank)))
    return found


def linear_section(model: Callable[[], Any], whole: int, seed: int) -> None:
    for num, rank in ((2, 16), (20, 16)):
        setting = Merging(model(), num, rank, whole, seed)
        console.rule(f"linear, K={num}, r={rank}, {len(setting.layers)} layers")
        merged, layer = setting.ours("linear"), setting.layers[0]
        experts = [adapter.layers[layer] for adapter in setting.adapters]
        expected = torch.stack([w * product(f) for f, w in zip(experts, setting.weights, strict=True)]).sum(dim=0)
        require([Gate("linear against float64", relative(product(merged.layers[layer]), expected), EXACT)])
        size = sum(part.numel() * 4 for factors in merged.layers.values() for part in (factors.a_RI, factors.b_OR))
        source, target = torch.rand(size // 4), torch.empty(size // 4)
        ways = {
            "copy into old memory": Way(lambda source=source, target=target: target.copy_(source)),
            "copy into new memory": Way(lambda source=source: source.clone()),
            "loraweave, merge": Way(lambda setting=setting: setting.ours("linear")),
            "loraweave, arithmetic": Way(lambda setting=setting: setting.arithmetic(None)),
            "peft, cat": Way(lambda setting=setting: setting.in_peft("cat"), setting.forget),
        }
        tables = {"share of the copy": ("copy into old memory", True), "of a new copy": ("copy into new memory", True)}
        compare(f"linear K={num} r={rank}", ways, rounds=5, seconds=60, tables=tables)
        speed = 2 * size / best_seconds(lambda source=source, target=target: target.copy_(source))
        console.print(f"limit: {size / 1e6:.0f} MB read and as much written; a copy moves {speed / 1e9:.0f} GB/s")


def elementwise_section(model: Callable[[], Any], whole: int, rounds: int, seed: int) -> None:
    num, rank = 8, 16
    setting = Merging(model(), num, rank, min(whole, FEW_BLOCKS), seed)
    for theirs, ours in ELEMENTWISE.items():
        console.rule(f"{ours} beside peft's {theirs}_svd, K={num}, r={rank}, {len(setting.layers)} layers")
        require(elementwise_gates(setting, theirs, ours))
        kind = f"{theirs}_svd"
        ways = {
            f"peft, {kind}": Way(lambda kind=kind: setting.in_peft(kind, svd_rank=rank, density=DENSITY), setting.forget),
            "loraweave, merge": Way(lambda ours=ours: setting.ours(ours, rank=rank, density=DENSITY)),
        }
        compare(kind, ways, rounds=rounds, seconds=60, tables={"times as fast": (f"peft, {kind}", True)})
    setting.forget()


@torch.no_grad()
def elementwise_gates(setting: Merging, theirs: str, ours: str) -> list[Gate]:
    """The first block: the method against peft's formula on the dense updates in float64, unless it is random; the cut."""
    found, cut = 0.0, 0.0
    method = registry.get("methods", ours)
    seeds = {"seeds": list(range(len(setting.adapters)))} if theirs in RANDOM else {}
    for layer in setting.layers[: len(ALL)]:
        experts = [adapter.layers[layer] for adapter in setting.adapters]
        delta_OI = method(experts, setting.weights, density=DENSITY, **seeds).delta_OI
        if theirs not in RANDOM:
            values = torch.tensor(setting.weights)
            expected = getattr(merge_utils, theirs)([f.b_OR @ f.a_RI for f in experts], values, DENSITY)
            # an entry at the threshold may fall on either side of it by rounding
            found = max(found, float(((delta_OI - expected).abs() > 1e-5 * expected.abs().max()).float().mean()))
        a_RI, b_OR, _ = factorise(delta_OI, rank=setting.rank)
        sigma_R = torch.linalg.svdvals(delta_OI.double())
        best = float(sigma_R[setting.rank :].norm() / sigma_R.norm())
        cut = max(cut, relative(b_OR.double() @ a_RI.double(), delta_OI.double()) / best - 1)
    gates = [Gate("error of the cut above the best", cut, 1e-6)]
    return gates if theirs in RANDOM else [Gate("share of entries that differ from peft's", found, 1e-4), *gates]


def main(
    section: Annotated[Section, typer.Argument(help="what is measured")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="one block and fewer cases, about a minute")] = False,
    rounds: Annotated[int, typer.Option(help="at most so many rounds of what peft takes long for")] = 3,
    blocks: Annotated[int, typer.Option(help="of the model, at most so many")] = WHOLE,
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its own number")] = 0,
    seed: Annotated[int, typer.Option(help="of the adapters")] = 0,
) -> None:
    """Speed, exactness and memory of merges."""
    console.print(f"{threads or torch.get_num_threads()} thread(s) of torch", highlight=False)
    if threads:
        torch.set_num_threads(threads)
    loaded, _ = base_model()

    def model() -> Any:
        # each case shortens its own
        return copy.deepcopy(loaded)

    def wanted(name: str) -> bool:
        return section in ("all", name)

    whole = QUICK_BLOCKS if quick else blocks
    if wanted("svd"):
        svd_section(model, quick, whole, rounds, seed)
    if wanted("linear"):
        linear_section(model, whole, seed)
    if wanted("elementwise"):
        elementwise_section(model, whole, rounds, seed)
    if wanted("core"):
        core_section(CORE_SHAPE, 20, rounds, seed)
    if wanted("layer"):
        layer_section((1024, 2752) if quick else LARGE_SHAPE, seed)


if __name__ == "__main__":
    typer.run(main)
