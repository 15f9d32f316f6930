"""What writing a mixture into the weights costs, beside peft's merge and unmerge: 4 adapters on all seven linears.

    OMP_NUM_THREADS=1 python -m benchmarks fuse [--dtype float32]

A unit of work is one switch of the composition: peft merges the adapters and unmerges them again; we enter the block and
leave it, or switch inside it. peft's second way makes one adapter of the four first (`cat`). Ours includes making the
update from mixture and adapters. "Restoring" is leaving the block alone, with the check for changes by others; it is
compared with a copy of as many bytes between two tensors in one piece.

Before anything is timed, in fp32: the fused weights equal peft's merged ones, and the fused model's logits the live
mixture's. In the dtype that is timed: all bits are back after entering, switching and leaving.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn

import loraweave as lw
from benchmarks._models import (
    ALL,
    LIMIT,
    base_model,
    changes,
    difference,
    in_peft,
    mix_in_peft,
    random_adapters,
    tokens,
)
from benchmarks._run import Run, console, status_bytes
from benchmarks._timing import Gate, Way, compare, require

NUM_ROWS = 8
NUM_TOKENS = 128
MIXTURE = (0.5, 0.4, 0.3, -0.2)
OTHER = (0.3, -0.1, 0.6, 0.2)
CYCLES = 10
PEFT = "peft, merge_adapter and unmerge_adapter"
COPY = "a copy of the touched bytes"

app = typer.Typer()


class Setting:
    """The model with our Composer, the same model in peft, and two mixtures of the same adapters."""

    def __init__(self, model: Any, rank: int, seed: int) -> None:
        self.model = model
        experts = random_adapters(model, len(MIXTURE), "all", seed, rank=rank)
        self.engine = lw.Composer(model, experts)
        self.peft = in_peft(model, experts)
        self.names = [expert.name for expert in experts]
        self.mixture = dict(zip(self.names, MIXTURE, strict=True))
        self.other = dict(zip(self.names, OTHER, strict=True))
        mix_in_peft(self.peft, self.mixture)
        self.ids_BT = tokens(model, NUM_ROWS, NUM_TOKENS, seed)
        self._block: AbstractContextManager[Any] | None = None

    def weights(self, model: Any) -> dict[str, Tensor]:
        """Those that the adapters touch, by a name that is the same in peft."""
        found = {}
        for name, module in model.named_modules():
            if name.removesuffix(".base_layer").endswith(ALL) and isinstance(module, nn.Linear):
                found[name.removesuffix(".base_layer").removeprefix("base_model.model.")] = module.weight
        return found

    def enter(self, **options: Any) -> Any:
        self.leave()
        self._block = self.engine.fused(self.mixture, **options)
        return self._block.__enter__()

    def leave(self) -> None:
        """Does nothing when no mixture is fused, so that every way can begin with it."""
        if self._block is not None:
            block, self._block = self._block, None
            block.__exit__(None, None, None)

    def forward(self) -> Tensor:
        return self.model(input_ids=self.ids_BT, use_cache=False, logits_to_keep=1).logits  # type: ignore[no-any-return]

    def peft_cycle(self) -> None:
        self.peft.merge_adapter(self.names)
        self.peft.unmerge_adapter()

    def peft_cat(self) -> None:
        tuner = self.peft.base_model
        tuner.add_weighted_adapter(self.names, list(MIXTURE), "all", combination_type="cat")
        self.peft.merge_adapter(["all"])
        self.peft.unmerge_adapter()
        tuner.delete_adapter("all")


@torch.no_grad()
def gates(setting: Setting) -> list[Gate]:
    with setting.engine.activate(setting.mixture):
        live = setting.forward()
    base = setting.forward()
    setting.enter()
    fused = setting.forward()
    ours = {name: weight.clone() for name, weight in setting.weights(setting.model).items()}
    setting.leave()
    setting.peft.merge_adapter(setting.names)
    theirs = setting.weights(setting.peft)
    weights = max(difference(ours[name], theirs[name]) for name in ours)
    setting.peft.unmerge_adapter()
    return [
        Gate("fused logits equal those of the live mixture", difference(fused, live), LIMIT),
        Gate("fused weights equal peft's merged ones", weights, LIMIT),
        changes("adapters", difference(live, base)),
    ]


def bits_that_differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The share of values that are not the same bits."""
    wrong = sum(int((found[name].view(torch.uint8) != expected[name].view(torch.uint8)).sum()) for name in expected)
    return wrong / sum(tensor.numel() * tensor.element_size() for tensor in expected.values())


@torch.no_grad()
def restoring(setting: Setting) -> list[Gate]:
    """After some cycles of each way; peft's drift is printed and no gate."""
    ours, theirs = ({name: w.clone() for name, w in setting.weights(m).items()} for m in (setting.model, setting.peft))
    for place in ("memory", "disk"):
        for _ in range(2):
            setting.enter(originals=place).switch(setting.other)
            setting.leave()
    for _ in range(CYCLES):
        setting.peft_cycle()
    drift = bits_that_differ(setting.weights(setting.peft), theirs)
    far = max(difference(weight, theirs[name]) for name, weight in setting.weights(setting.peft).items())
    console.print(f"peft after {CYCLES} cycles: {drift:.0%} of the bytes differ, by {far:.1e} of the largest weight")
    return [Gate("share of bytes that differ after our cycles", bits_that_differ(setting.weights(setting.model), ours), 0.0)]


def print_memory(setting: Setting) -> None:
    touched = sum(weight.numel() * weight.element_size() for weight in setting.weights(setting.model).values())
    for place in ("memory", "disk"):
        before = status_bytes("VmRSS")
        kept = setting.enter(originals=place).original_bytes
        grown = status_bytes("VmRSS") - before
        setting.leave()
        console.print(
            f"originals={place!r}: {kept / 1e6:.0f} MB kept of {touched / 1e6:.0f} MB touched; memory grows by "
            f"{grown / 1e6:.0f} MB while fused"
        )


def ways(setting: Setting) -> dict[str, Way]:
    """Every way by its label; each begins with nothing fused."""
    entered: list[Any] = []

    def block(**options: Any) -> Callable[[], None]:
        def run() -> None:
            setting.enter(**options)
            setting.leave()

        return run

    def switched() -> None:
        entered[:] = [setting.enter()]

    touched = sum(weight.numel() for weight in setting.weights(setting.model).values())
    source, target = (torch.zeros(touched, dtype=setting.model.dtype) for _ in range(2))
    return {
        f"base model, {NUM_ROWS}x{NUM_TOKENS} tokens": Way(setting.forward, setting.leave),
        PEFT: Way(setting.peft_cycle, setting.leave),
        "peft, cat, merge, unmerge, delete": Way(setting.peft_cat, setting.leave),
        "loraweave, into the block and out": Way(block(), setting.leave),
        "loraweave, the same, originals on disk": Way(block(originals="disk"), setting.leave),
        "loraweave, switch inside the block": Way(lambda: entered[0].switch(setting.other), switched),
        "loraweave, restoring": Way(setting.leave, setting.enter),
        COPY: Way(lambda: target.copy_(source), setting.leave),
    }


@app.command()
def main(
    context: typer.Context,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="of the base model")] = "bfloat16",
    rank: Annotated[int, typer.Option(help="of each of the four adapters")] = 16,
) -> None:
    """Time for one switch of the composition."""
    run: Run = context.obj
    model, _ = base_model()
    setting = Setting(model, rank, run.seed)
    require(gates(setting))
    setting.model.to(getattr(torch, dtype))
    setting.peft.to(getattr(torch, dtype))
    require(restoring(setting))
    print_memory(setting)
    tables = {
        "time, base = 1": (f"base model, {NUM_ROWS}x{NUM_TOKENS} tokens", False),
        "speed, peft = 1": (PEFT, True),
        "speed, copy = 1": (COPY, True),
    }
    title = f"switching among {len(MIXTURE)} adapters of rank {rank}, {dtype}"
    with torch.no_grad():
        compare(run, title, ways(setting), tables, rounds=12, seconds=90.0)
    setting.leave()
