"""What mixtures cost as the base grows: blocks of four models by their shapes alone, from 135M to 8B parameters.

    python -m benchmarks --cpu --out runs/sizes sizes
    python -m benchmarks --cpu --out runs/sizes sizes --models llama-3-8b --dtypes bfloat16

Weights are random: time depends on shapes. Measured are a model's first blocks without embedding and head, adapters of rank
8 on all seven linear layers, another one or another mixture of four for each row; the base's own pass over the same tokens
is 1. Decoding reads every weight for a few rows, prefill computes with them. Each size is compared with peft in fp32 first.
--out keeps each figure, so that an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Annotated, Any

import torch
import transformers
import typer

from benchmarks._data import kept
from benchmarks._models import keep_blocks
from benchmarks._run import Run, Table, console
from benchmarks._timing import ratios, require, timed
from benchmarks.live import Setting, Shape, decode_way, gates, limits, prefill_way, ways

app = typer.Typer()

# class of the configuration; width, width inside, heads, heads of keys and values; blocks of the model, and of those here
MODELS: Mapping[str, tuple[type, tuple[int, int, int, int], int, int]] = {
    "smollm2-135m": (transformers.LlamaConfig, (576, 1536, 9, 3), 30, 6),
    "qwen2.5-0.5b": (transformers.Qwen2Config, (896, 4864, 14, 2), 24, 4),
    "qwen2.5-1.5b": (transformers.Qwen2Config, (1536, 8960, 12, 2), 28, 2),
    "llama-3-8b": (transformers.LlamaConfig, (4096, 14336, 32, 8), 32, 1),
}
RANK, POOL = 8, 8
BASE, PEFT = "base alone", "peft, adapter_names"


@app.command()
def main(
    context: typer.Context,
    models: Annotated[str, typer.Option(help="of the models in this file, with commas")] = ",".join(MODELS),
    passes: Annotated[str, typer.Option(help="of prefill and decode, with commas")] = "prefill,decode",
    dtypes: Annotated[str, typer.Option(help="of float32 and bfloat16, with commas")] = "float32,bfloat16",
    rows: Annotated[int, typer.Option(help="of the batch")] = 8,
    tokens: Annotated[int, typer.Option(help="of a row in prefill")] = 32,
) -> None:
    """A row for each model, pass and dtype: one adapter and a mixture of four by row, and peft's one adapter by row."""
    run: Run = context.obj
    table = Table(
        f"{rows} rows, rank {RANK} on all linear layers, {run.threads} thread(s)"
        f"{', processor time' if run.cpu else ''}; base = 1, median and 25-75 % over rounds",
        ("blocks of", "pass", "dtype", "own adapter by row", "limit", "mixture of four by row", "limit", "peft by row"),
    )
    for name, what, dtype in product(models.split(","), passes.split(","), dtypes.split(",")):
        one, four = (
            kept(
                run.folder() / f"{name}-{what}-{dtype}-{experts}.json",
                partial(measured, run, name, what, dtype, experts, rows, tokens),
            )
            for experts in (1, 4)
        )
        cells = (one["ours"], one["limit"], four["ours"], four["limit"], one["peft"])
        table.add(f"{name}, {MODELS[name][3]} of {MODELS[name][2]}", what, dtype, *cells)
        console.print(table.rows[-1])
    run.show(table)


def measured(run: Run, name: str, what: str, dtype: str, experts: int, rows: int, tokens: int) -> dict[str, str]:
    """Ratios to the base's pass, and the least that the mixtures' arithmetic (prefill) or bytes (decode) would take."""
    setting = Setting(blocks_of(name), Shape(rows, tokens, POOL, RANK, experts, "all"), peers=True, seed=run.seed)
    require(gates(setting))
    setting.to(getattr(torch, dtype))
    prefilled = what == "prefill"
    offered = ways(setting, prefill_way if prefilled else decode_way, prefilled)
    ours = f"loraweave, own {'adapter' if experts == 1 else 'mixture'} per row"
    asked = {label: way for label, way in offered.items() if label in (BASE, ours, PEFT)}
    taken = timed(run, f"{name} {what} {dtype} {experts}", asked, rounds=5, seconds=120.0)
    figures = {
        ratio.name: f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" for ratio in ratios(taken, reference=BASE)
    }
    return {"ours": figures[ours], "peft": figures.get(PEFT, ""), "limit": f"{limits(setting)[0 if prefilled else 1]:.3f}"}


def blocks_of(name: str) -> Any:
    """A model in float32 of a few blocks of that one's sizes, with random weights."""
    kind, (width, inside, heads, pairs), _, count = MODELS[name]
    sizes = {"hidden_size": width, "intermediate_size": inside, "num_attention_heads": heads, "num_key_value_heads": pairs}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**sizes, num_hidden_layers=count, vocab_size=1000))
    model.eval().requires_grad_(False)
    model.name_or_path = name
    keep_blocks(model, count)
    return model


if __name__ == "__main__":
    app()
