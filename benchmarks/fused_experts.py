"""What LoRA on fused experts costs live: one adapter, and one for each row, beside peft, which makes the dense update.

    python -m benchmarks --cpu fused_experts

A random model of Mixtral's layout: 4 blocks of width 512, 16 experts of width 1024 of which a token takes two, and adapters
of rank 8 on both parameters of every block. Nothing is measured unless the outputs are peft's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import loraweave as lw
from benchmarks._run import Run
from benchmarks._timing import Gate, Way, compare, require

SIZES = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 16, "num_experts_per_tok": 2}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
NUM_ADAPTERS = 4

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    shapes: Annotated[str, typer.Option(help="rows x tokens of a call, several with commas")] = "1x1,1x64,4x64",
    rank: Annotated[int, typer.Option(help="of each expert's update")] = 8,
) -> None:
    """A table for each shape: the time of a forward pass, that of the base model being 1."""
    run: Run = context.obj
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = [Path(folder, f"a{number}") for number in range(NUM_ADAPTERS)]
        theirs = [_peft_model(path, rank, number) for number, path in enumerate(paths)]
        model = _model()
        engine = lw.Composer(model, [lw.Adapter.from_pretrained(path) for path in paths])
        for shape in shapes.split(","):
            num_rows, num_tokens = map(int, shape.split("x"))
            ids = torch.randint(0, SIZES["vocab_size"], (num_rows, num_tokens), generator=torch.Generator().manual_seed(1))
            ways = {"base": partial(_forward, model, ids), "peft": partial(_forward, theirs[0], ids)}
            ways["loraweave"] = partial(_under, engine, {"a0": 1.0}, ids)
            rows = [{f"a{number % NUM_ADAPTERS}": 1.0} for number in range(num_rows)]
            if num_rows > 1:
                ways["loraweave, an adapter a row"] = partial(_under, engine, rows, ids)
            require(_gates(ways, theirs, ids))
            compare(run, f"{shape} tokens", {name: Way(way) for name, way in ways.items()}, {"time": ("base", False)})


def _gates(ways: Mapping[str, Callable[[], Any]], theirs: list[Any], ids: torch.Tensor) -> list[Gate]:
    expected = {"loraweave": ways["peft"]()}
    if len(ids) > 1:
        each = [_forward(theirs[number % NUM_ADAPTERS], row[None]) for number, row in enumerate(ids)]
        expected["loraweave, an adapter a row"] = torch.cat(each)
    size = float(expected["loraweave"].abs().max())
    return [Gate(name, float((ways[name]() - wanted).abs().max()) / size, 1e-5) for name, wanted in expected.items()]


def _model() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES)).eval()
    model.name_or_path = "random-mixtral"
    return model


def _peft_model(path: Path, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    model, config = _model(), LoraConfig(r=rank, target_modules=[], target_parameters=PARAMETERS, init_lora_weights=False)
    torch.manual_seed(seed + 1)
    made = get_peft_model(model, config).eval()
    made.save_pretrained(str(path), save_embedding_layers=False)
    return made


def _forward(model: Any, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, use_cache=False).logits


def _under(engine: lw.Composer, mixture: Any, ids: torch.Tensor) -> Any:
    with engine.activate(mixture):
        return _forward(engine.model, ids)
