"""One layer's merges: spectral methods on the factors beside their dense forms, and a large layer in its own process."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _ratios import Gate, Way, compare, console, require
from peft.utils import merge_utils
from torch import Tensor

from loraweave import registry
from loraweave.hub.factorise import factorise
from loraweave.hub.truncation import compress
from loraweave.types import Factors

RANK = 16
DENSITY = 0.5


def random_layer(num: int, rank: int, shape: tuple[int, int], seed: int) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)
    num_out, num_in = shape
    return [
        Factors(
            torch.randn(rank, num_in, generator=generator) * num_in**-0.5,
            torch.randn(num_out, rank, generator=generator) * 0.02,
        )
        for _ in range(num)
    ]


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


def core_section(shape: tuple[int, int], num: int, rounds: int, seed: int) -> None:
    """TSV, Iso-C and TIES in the core space against the same on dense updates."""
    experts, ones = random_layer(num, RANK, shape, seed), [1.0] * num
    tsv, iso_c, core_space = (registry.get("methods", name) for name in ("tsv", "iso_c", "core_space"))
    doubles = [factors.b_OR.double() @ factors.a_RI.double() for factors in experts]
    console.rule(f"core space, K={num}, r={RANK}, {shape[0]}x{shape[1]}")
    require(
        [
            Gate("tsv equals its dense form in float64", apart(tsv(experts, ones), dense_tsv(doubles, RANK)), 1e-5),
            Gate("iso_c equals its dense form in float64", apart(iso_c(experts, ones), dense_iso_c(doubles, RANK)), 1e-5),
            Gate(
                "core space loses nothing of a sum",
                apart(core_space(experts, ones, inner="linear"), torch.stack(doubles).sum(dim=0)),
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
        compare(f"{name} K={num}", ways, rounds=rounds, seconds=40, tables={"times as fast": (f"{name}, dense", True)})
    least = 2 * sum(shape) * (num * RANK) ** 2 / 2
    console.print(f"limit: both Gram matrices of the stacked factors are {least / 1e9:.2f} GFLOP in float64")


def apart(found: Factors, expected: Tensor) -> float:
    return float((found.b_OR.double() @ found.a_RI.double() - expected).norm() / expected.norm())


def layer_section(shape: tuple[int, int], seed: int) -> None:
    """Time and peak of extra memory of one large layer, each way in a new process."""
    console.rule(f"one layer of {shape[0]}x{shape[1]} ({shape[0] * shape[1] * 4 / 1e6:.0f} MB in fp32), r={RANK}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for title, num, ways in (
            ("sum of 20 cut to rank 16", 20, ("loraweave, svd", "peft's dense sum, without its SVD")),
            ("TIES of 8 cut to rank 16", 8, ("loraweave, ties_per_layer", "peft's ties, without its SVD")),
        ):
            for way in ways:
                seconds, megabytes = pool.apply(measured, (way, num, shape, seed, torch.get_num_threads()))
                console.print(f"{title}: {way}: {seconds:.2f} s, {megabytes:.0f} MB", highlight=False)


def measured(way: str, num: int, shape: tuple[int, int], seed: int, threads: int) -> tuple[float, float]:
    """Seconds, and the peak of resident memory over what the process had before, of the second of two runs."""
    torch.set_num_threads(threads)
    warm(way, random_layer(2, RANK, (64, 96), seed))
    experts = random_layer(num, RANK, shape, seed)
    gc.collect()
    # from here on the kernel's high-water mark is that of this run
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    started = time.perf_counter()
    warm(way, experts)
    seconds = time.perf_counter() - started
    return seconds, (status("VmHWM") - before) / 1e3


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


def status(field: str) -> int:
    """A figure of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
