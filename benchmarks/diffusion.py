"""ZipLoRA and Mix-of-Show's fusion beside their authors' form, dense updates in the weights, on random weights.

    python -m benchmarks diffusion

ZipLoRA learns in a UNet of diffusers, 16 attention layers of width 32 and 64; the other form has W + D_c diag(m_c) +
D_s diag(m_s) as each layer's weight and the same optimiser. The fusion is of one layer 320 wide for two
concepts, on 600 random inputs each that lie in 200 directions; L-BFGS is the authors' optimiser, its settings are ours.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import loraweave as lw
from benchmarks._run import Run, Table
from benchmarks._timing import Gate, require
from loraweave.extensions.diffusion import zip_lora
from loraweave.extensions.statistics import LayerStatistics, Statistics

app = typer.Typer()
STEPS, LR, OVERLAP, RANK = 100, 0.01, 0.01, 4
NAMES = ("content", "style")
# width, inputs of each concept, directions that they lie in, iterations of L-BFGS
WIDTH, INPUTS, DIRECTIONS, ITERATIONS = 320, 600, 200, 50


@app.command()
def main(context: typer.Context) -> None:
    """A table for each: what the sum, ours and the other form reach, and the processor time beside the other form's."""
    run: Run = context.obj
    torch.manual_seed(run.seed)
    run.show(_zip_lora(), _fusion())


def _zip_lora() -> Table:
    import diffusers

    unet: Any = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet.eval()
    layers = {name: part for name, part in unet.named_modules() if isinstance(part, nn.Linear) and ".to_" in name}
    shapes = {f"unet.{path}": part.weight.shape for path, part in layers.items()}
    content, style = (_adapter(name, shapes) for name in NAMES)
    x = {name: torch.randn(4, 4, 16, 16) for name in NAMES}
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    before = time.process_time()
    made = zip_lora(pipe, content, style, lambda name: unet(x[name], 500), steps=STEPS, progress=False)
    learned = made.card["zip_lora"]
    own = time.process_time() - before
    before = time.process_time()
    dense = _dense_zip_lora(unet, layers, [content, style], x)
    other = time.process_time() - before
    wrong = max(abs(learned[name][0] / dense[name][0] - 1) for name in NAMES)
    require([Gate("the terms of the sum", wrong, 1e-3)])
    table = Table(f"ZipLoRA, {STEPS} steps", ("way", *(f"error on {name}" for name in NAMES), "overlap", "time"))
    table.add("sum", *(f"{learned[part][0]:.4f}" for part in (*NAMES, "overlap")), "")
    for way, found, seconds in (("loraweave", learned, own), ("dense updates", dense, other)):
        table.add(way, *(f"{found[part][1]:.4f}" for part in (*NAMES, "overlap")), f"{seconds / other:.2f}")
    return table


def _adapter(name: str, shapes: dict[str, torch.Size]) -> lw.Adapter:
    layers = {path: lw.Factors(0.3 * torch.randn(RANK, i), 0.3 * torch.randn(o, RANK)) for path, (o, i) in shapes.items()}
    return lw.Adapter(name, "random", layers)


def _dense_zip_lora(
    unet: nn.Module, layers: dict[str, Any], adapters: list[lw.Adapter], x: dict[str, Tensor]
) -> dict[str, list[float]]:
    deltas = {path: [adapter.delta(f"unet.{path}") for adapter in adapters] for path in layers}
    m = {path: torch.ones(2, part.in_features, requires_grad=True) for path, part in layers.items()}

    def predict(name: str, m_of: dict[str, Tensor]) -> Tensor:
        added = {path: (torch.stack(deltas[path]) * m_of[path][:, None]).sum(dim=0) for path in layers}
        weights = {f"{path}.weight": part.weight.detach() + added[path] for path, part in layers.items()}
        found: Tensor = functional_call(unet, weights, (x[name], 500))[0]
        return found

    with torch.no_grad():
        alone = {
            name: predict(name, {path: torch.eye(2)[[place]].T.expand_as(m[path]) for path in m})
            for place, name in enumerate(NAMES)
        }

    def terms() -> list[Tensor]:
        errors = [functional.mse_loss(predict(name, m), alone[name]) for name in NAMES]
        return [*errors, torch.stack([m_2I.prod(dim=0).abs().mean() for m_2I in m.values()]).sum()]

    found = {name: [float(term.detach())] for name, term in zip((*NAMES, "overlap"), terms(), strict=True)}
    optimizer = torch.optim.AdamW(m.values(), lr=LR, weight_decay=0.0)
    for _ in range(STEPS):
        content, style, overlap = terms()
        (content + style + OVERLAP * overlap).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, term in zip(found, terms(), strict=True):
        found[name].append(float(term.detach()))
    return found


def _fusion() -> Table:
    adapters = [_adapter(name, {"to_k": torch.Size((WIDTH, WIDTH))}) for name in NAMES]
    inputs = [torch.randn(INPUTS, DIRECTIONS) @ torch.randn(DIRECTIONS, WIDTH) / DIRECTIONS**0.5 for _ in NAMES]
    x_NI = torch.cat(inputs)
    y_NO = torch.cat([x @ adapter.delta("to_k").T for x, adapter in zip(inputs, adapters, strict=True)])
    statistics = [
        Statistics(adapter.hash, {"to_k": LayerStatistics(x.T @ x / len(x), None, len(x))})
        for adapter, x in zip(adapters, inputs, strict=True)
    ]

    def loss(d_OI: Tensor) -> Tensor:
        return functional.mse_loss(x_NI @ d_OI.T, y_NO)

    before = time.process_time()
    fused = lw.merge(adapters, [1.0, 1.0], method="least_squares", statistics=statistics)
    own = time.process_time() - before
    d_OI = torch.zeros(WIDTH, WIDTH, requires_grad=True)
    optimizer = torch.optim.LBFGS([d_OI], max_iter=ITERATIONS, history_size=25, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(d_OI)
        value.backward()
        return value

    before = time.process_time()
    optimizer.step(step)
    other = time.process_time() - before
    plain = torch.stack([adapter.delta("to_k") for adapter in adapters]).mean(dim=0)
    table = Table("Mix-of-Show's fusion of one layer, the adapters' mean = 1", ("way", "loss", "time"))
    for way, found, seconds in (("loraweave", fused.delta("to_k"), own), ("L-BFGS", d_OI.detach(), other)):
        table.add(way, f"{float(loss(found) / loss(plain)):.1e}", f"{seconds / other:.2f}")
    return table
