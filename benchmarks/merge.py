"""What merging costs beside peft's `add_weighted_adapter`, and how exact both are.

    python -m benchmarks merge all                the whole run, below 8 minutes on two idle cores
    python -m benchmarks merge svd --quick        one section on fewer blocks
    python -m benchmarks merge layer              one layer of 4096x11008, time and memory in a process of its own

Sections: svd (the sum cut to a rank), linear (the sum by concatenation), elementwise (methods on dense entries), core
(spectral methods on the factors against their dense forms), layer. Adapters are random, on the seven linear layers of
SmolLM2-135M's blocks. Every figure is a ratio of interleaved runs in one process, after the results were checked against
float64. "merge" is `lw.merge` with its report; "arithmetic" is the same layers without it. peft's time includes the new
adapter's modules, which `add_weighted_adapter` makes; hashes of ours are computed once for each adapter, before.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peft.utils import merge_utils
from torch import Tensor

import loraweave as lw
from benchmarks._models import ALL, base_model, in_peft, random_adapter, random_factors
from benchmarks._run import Run, Table, best_of, console, status_bytes
from benchmarks._timing import Gate, Way, compare, require
from loraweave import registry
from loraweave.common.process import side_by_side
from loraweave.lowrank.algebra import compress, compress_sum
from loraweave.lowrank.factorise import factorise
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
# of the sections of one layer
RANK = 16
CORE_SHAPE = (576, 1536)
LARGE_SHAPE = (4096, 11008)
WHOLE = 30
# of what peft takes long for
ROUNDS = 3

app = typer.Typer()


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
        self.adapters = [random_adapter(model, f"a{n:02d}", "all", seed, rank=rank, blocks=blocks) for n in range(num)]
        self.weights = weights(num)
        self.peft = in_peft(shortened(model, blocks), self.adapters)
        self.names = [adapter.name for adapter in self.adapters]
        self.layers = list(self.adapters[0].layers)
        for adapter in self.adapters:
            _ = adapter.hash

    def ours(self, method: str, **options: Any) -> lw.Adapter:
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


def best_seconds(run: Callable[[], object]) -> float:
    run()
    return best_of(run, time.perf_counter, 3)


def svd_section(run: Run, model: Callable[[], Any], cases: Sequence[tuple[int, int]], whole: int) -> None:
    square = torch.rand(1024, 1024, dtype=torch.float64)
    rate = 2 * 1024**3 / best_seconds(lambda: square @ square)
    for num, rank in cases:
        # ranks of 64 are beside the goals: a part of the model says as much
        blocks = whole if rank <= 16 else min(whole, FEW_BLOCKS)
        setting = Merging(model(), num, rank, blocks, run.seed)
        console.rule(f"svd, K={num}, r={rank}, {len(setting.layers)} layers")
        require(svd_gates(setting))
        ways = {
            "peft, svd": Way(lambda setting=setting: setting.in_peft("svd", svd_rank=setting.rank), setting.forget),
            "loraweave, merge": Way(lambda setting=setting: setting.ours("svd", rank=setting.rank)),
            "loraweave, arithmetic": Way(lambda setting=setting: setting.arithmetic(setting.rank)),
        }
        title = f"svd K={num} r={rank}, {len(setting.layers)} layers"
        compare(run, title, ways, {"times as fast": ("peft, svd", True)}, rounds=ROUNDS, seconds=90)
        floor = sum(least_products(setting.layers, setting.adapters, rank)) / rate
        share = floor / best_seconds(lambda setting=setting: setting.arithmetic(setting.rank))
        console.print(
            f"limit: the products alone, at the {rate / 1e9:.0f} GFLOP/s of float64, are {share:.0%} of the arithmetic"
        )


def least_products(layers: Sequence[str], experts: Sequence[lw.Adapter], rank: int) -> list[float]:
    """Floating point operations for each layer: half of both Gram matrices, and the factors of the result."""
    found = []
    for layer in layers:
        factors = experts[0].layers[layer]
        sides = factors.b_OR.shape[0] + factors.a_RI.shape[1]
        rows = len(experts) * factors.rank
        found.append(float(sides * rows * (rows + 2 * rank)))
    return found


def linear_section(run: Run, model: Callable[[], Any], whole: int) -> None:
    for num, rank in ((2, 16), (20, 16)):
        setting = Merging(model(), num, rank, whole, run.seed)
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
        compare(run, f"linear K={num} r={rank}, {len(setting.layers)} layers", ways, tables, rounds=5)
        speed = 2 * size / best_seconds(lambda source=source, target=target: target.copy_(source))
        console.print(f"limit: {size / 1e6:.0f} MB read and as much written; a copy moves {speed / 1e9:.0f} GB/s")


def elementwise_section(run: Run, model: Callable[[], Any], whole: int) -> None:
    num, rank = 8, 16
    setting = Merging(model(), num, rank, min(whole, FEW_BLOCKS), run.seed)
    for theirs, ours in ELEMENTWISE.items():
        console.rule(f"{ours} beside peft's {theirs}_svd, K={num}, r={rank}, {len(setting.layers)} layers")
        require(elementwise_gates(setting, theirs, ours))
        kind = f"{theirs}_svd"
        ways = {
            f"peft, {kind}": Way(lambda kind=kind: setting.in_peft(kind, svd_rank=rank, density=DENSITY), setting.forget),
            "loraweave, merge": Way(lambda ours=ours: setting.ours(ours, rank=rank, density=DENSITY)),
        }
        compare(run, kind, ways, {"times as fast": (f"peft, {kind}", True)}, rounds=ROUNDS, seconds=150)
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


def dense(experts: list[Factors]) -> list[Tensor]:
    return [factors.b_OR @ factors.a_RI for factors in experts]


def dense_tsv(deltas: list[Tensor], rank: int) -> Tensor:
    """Gargiulo et al. 2025 with the whole rank of each update kept, weights of one, as full-weight mergers compute it."""
    parts = [torch.linalg.svd(delta_OI, full_matrices=False) for delta_OI in deltas]
    u_OS = torch.cat([u_OR[:, :rank] for u_OR, _, _ in parts], dim=1)
    vh_SI = torch.cat([vh_RI[:rank] for _, _, vh_RI in parts])
    sigma_S = torch.cat([sigma_R[:rank] for _, sigma_R, _ in parts])
    (p_OS, _, ph_SS), (q_SS, _, qh_SI) = (torch.linalg.svd(stack, full_matrices=False) for stack in (u_OS, vh_SI))
    return (p_OS @ ph_SS * sigma_S) @ (q_SS @ qh_SI)


def dense_iso_c(deltas: list[Tensor], rank: int) -> Tensor:
    """Marczak et al. 2025 on the directions that the updates have."""
    u_OR, sigma_R, vh_RI = torch.linalg.svd(torch.stack(deltas).sum(dim=0), full_matrices=False)
    count = min(rank * len(deltas), len(sigma_R))
    return float(sigma_R[:count].mean()) * u_OR[:, :count] @ vh_RI[:count]


def dense_ties(deltas: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """peft's TIES of the dense updates, and the factors of what it gives."""
    merged_OI = merge_utils.ties(deltas, torch.ones(len(deltas)), DENSITY)
    u_OR, sigma_R, vh_RI = torch.linalg.svd(merged_OI)
    return u_OR[:, :RANK] * sigma_R[:RANK], vh_RI[:RANK], 0.0


def core_section(run: Run, shape: tuple[int, int], num: int) -> None:
    """TSV, Iso-C and TIES in the core space against the same on dense updates."""
    experts, ones = random_layer(num, shape, run.seed), [1.0] * num
    tsv, iso_c, core_space = (registry.get("methods", name) for name in ("tsv", "iso_c", "core_space"))
    doubles = [factors.b_OR.double() @ factors.a_RI.double() for factors in experts]
    console.rule(f"core space, K={num}, r={RANK}, {shape[0]}x{shape[1]}")
    require(
        [
            Gate(
                "tsv equals its dense form in float64", relative(product(tsv(experts, ones)), dense_tsv(doubles, RANK)), 1e-5
            ),
            Gate(
                "iso_c equals its dense form in float64",
                relative(product(iso_c(experts, ones)), dense_iso_c(doubles, RANK)),
                1e-5,
            ),
            Gate(
                "core space loses nothing of a sum",
                relative(product(core_space(experts, ones, inner="linear")), torch.stack(doubles).sum(dim=0)),
                1e-5,
            ),
        ]
    )
    # dense forms of the products' precision, fp32, with the products in their time as in ours
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "TSV": (lambda: dense_tsv(dense(experts), RANK), lambda: tsv(experts, ones)),
        "Iso-C": (lambda: dense_iso_c(dense(experts), RANK), lambda: iso_c(experts, ones)),
        "TIES": (
            lambda: dense_ties(dense(experts)),
            lambda: compress(core_space(experts, ones, inner="ties_per_layer", inner_options={"density": DENSITY}), RANK),
        ),
    }
    for name, (slow, fast) in pairs.items():
        ways = {f"{name}, dense": Way(slow), f"{name}, factors": Way(fast)}
        compare(run, f"{name} K={num}", ways, {"times as fast": (f"{name}, dense", True)}, rounds=ROUNDS, seconds=40)
    least = 2 * sum(shape) * (num * RANK) ** 2 / 2
    console.print(f"limit: both Gram matrices of the stacked factors are {least / 1e9:.2f} GFLOP in float64")


def random_layer(num: int, shape: tuple[int, int], seed: int) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)
    return [random_factors(*shape, RANK, generator) for _ in range(num)]


def layer_section(run: Run, shape: tuple[int, int]) -> None:
    """Time and peak of extra memory of one large layer, each way in a new process."""
    size = f"{shape[0]}x{shape[1]} ({shape[0] * shape[1] * 4 / 1e6:.0f} MB in fp32), r={RANK}"
    table = Table(f"one layer of {size}", ("what", "way", "seconds", "MB"))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for title, num, ways in (
            ("sum of 20 cut to rank 16", 20, ("loraweave, svd", "peft's dense sum, without its SVD")),
            ("TIES of 8 cut to rank 16", 8, ("loraweave, ties_per_layer", "peft's ties, without its SVD")),
        ):
            for way in ways:
                seconds, num_bytes = pool.apply(measured, (way, num, shape, run.seed, torch.get_num_threads()))
                table.add(title, way, f"{seconds:.2f}", f"{num_bytes / 1e6:.0f}")
    run.show(table)


def measured(way: str, num: int, shape: tuple[int, int], seed: int, threads: int) -> tuple[float, float]:
    """Seconds, and the peak of resident memory over what the process had before, of the second of two runs."""
    torch.set_num_threads(threads)
    warm(way, random_layer(2, (64, 96), seed))
    experts = random_layer(num, shape, seed)
    gc.collect()
    # from here on the kernel's high-water mark is that of this run
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    started = time.perf_counter()
    warm(way, experts)
    seconds = time.perf_counter() - started
    return seconds, status_bytes("VmHWM") - before


def warm(way: str, experts: list[Factors]) -> object:
    ones = [1.0] * len(experts)
    if way == "loraweave, svd":
        return compress(registry.get("methods", "linear")(experts, ones), RANK)
    if way == "loraweave, ties_per_layer":
        update = registry.get("methods", "ties_per_layer")(experts, ones, density=DENSITY)
        return factorise(update.delta_OI, rank=RANK)
    if way.startswith("peft's dense sum"):
        return merge_utils.task_arithmetic(dense(experts), torch.ones(len(experts)))
    return merge_utils.ties(dense(experts), torch.ones(len(experts)), DENSITY)


@app.command()
def main(
    context: typer.Context,
    section: Annotated[Section, typer.Argument(help="what is measured")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="one block and fewer cases, about a minute")] = False,
    blocks: Annotated[int, typer.Option(help="of the model, at most this many")] = WHOLE,
    cases: Annotated[str, typer.Option(help="of svd, adapters x rank, with commas: 8x16,20x16; all by default")] = "",
) -> None:
    """Speed, exactness and memory of merges."""
    run: Run = context.obj
    loaded, _ = base_model()

    def model() -> Any:
        # each case shortens its own
        return copy.deepcopy(loaded)

    def wanted(name: str) -> bool:
        return section in ("all", name)

    whole = QUICK_BLOCKS if quick else blocks
    if wanted("svd"):
        asked = [(int(num), int(rank)) for num, rank in (case.split("x") for case in cases.split(",") if case)]
        svd_section(run, model, asked or (SVD_CASES[:3] if quick else SVD_CASES), whole)
    if wanted("linear"):
        linear_section(run, model, whole)
    if wanted("elementwise"):
        elementwise_section(run, model, whole)
    if wanted("core"):
        core_section(run, CORE_SHAPE, 20)
    if wanted("layer"):
        layer_section(run, (1024, 2752) if quick else LARGE_SHAPE)
