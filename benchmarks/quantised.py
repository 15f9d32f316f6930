"""What an update loses when it is fused into a quantised base: per layer, and in the answers.

    python -m benchmarks quantised
    python -m benchmarks quantised --adapter plural --limits 0.1

The default base as several libraries quantise it, one adapter of the pool at weight 1, and prompts of the pool's tasks. The
loss of a layer is the error of quantising again over the size of the update. KL and other choices are over all tokens of the
prompts, against the same base with every update live, which is exact.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import typer

import loraweave as lw
from benchmarks._run import Run, Table, pairs
from loraweave.extensions.quantised import logits_loss

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    adapter: Annotated[str, typer.Option(help="of the example pool")] = "passive",
    forms: Annotated[str, typer.Option(help="rows, with semicolons")] = "int8;torchao int8;torchao int4 by 32;nf4",
    limits: Annotated[str, typer.Option(help="max_loss, beside none")] = "0.5",
    num_prompts: Annotated[int, typer.Option(help="that are read")] = 8,
) -> None:
    """A row for each form and limit: the losses, how many layers stay live, and what that does to the logits."""
    run: Run = context.obj
    given = lw.Adapter.from_pretrained(run.pool / adapter)
    rows = run.rows(adapter)
    texts = [f"{rows[0]['definition']}\n\nInput: {asked}\nOutput:" for asked, _ in pairs(rows, "test")[:num_prompts]]
    cells = ("base", "max_loss", "loss: median", "smallest", "largest", "live", "KL, nats", "other choice")
    table = Table(f"{adapter} fused into quantised bases, {num_prompts} prompts", cells)
    for form in forms.split(";"):
        with warnings.catch_warnings():
            # of the libraries, about their own versions
            warnings.simplefilter("ignore")
            model, tokenizer = lw.load_base(dtype=torch.float32, quantization_config=FORMS[form]())
        engine = lw.Composer(model, [given])
        for limit in (math.inf, *map(float, limits.split(","))):
            with engine.fused({adapter: 1.0}, max_loss=limit) as written:
                losses = sorted(each.loss for each in written.losses.values())
                live = sum(each.live for each in written.losses.values())
                answers = logits_loss(written, tokenizer, texts)
            spread = (f"{value:.2f}" for value in (statistics.median(losses), losses[0], losses[-1]))
            shown = f"{live} of {len(losses)}", f"{answers.kl:.4f}", f"{answers.other_choice:.1%}"
            table.add(form, "none" if math.isinf(limit) else f"{limit:g}", *spread, *shown)
    run.show(table)


def _bitsandbytes(**settings: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**settings)


def _torchao(config: str, **settings: Any) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, config)(**settings))


def _int4() -> Any:
    from torchao.quantization import PerGroup

    int4: Any = torch.int4  # type: ignore[attr-defined]
    return _torchao("IntxWeightOnlyConfig", weight_dtype=int4, granularity=PerGroup(32))


FORMS: Mapping[str, Callable[[], Any]] = {
    "int8": lambda: _bitsandbytes(load_in_8bit=True),
    "torchao int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao int4 by 32": _int4,
    "nf4": lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
