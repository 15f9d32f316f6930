"""The memory that a step of fused training was estimated to take, beside what it took.

    python benchmarks/training_memory.py --jobs 4 --rows 4 --tokens 64

One size a process, since on a CPU the measured peak is the whole process's since it began.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import typer
from _adapters import ALL, ATTENTION, base_model
from _ratios import console

import loraweave as lw

NUM_STEPS = 2


def main(
    jobs: Annotated[int, typer.Option(help="that share a step")] = 4,
    rows: Annotated[int, typer.Option(help="of each job in a step")] = 4,
    tokens: Annotated[int, typer.Option(help="of each row, about")] = 64,
    targets: Annotated[Literal["qv", "all"], typer.Option(help="layers that are trained")] = "qv",
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
) -> None:
    """Prints both figures and their ratio."""
    torch.set_num_threads(threads)
    model, tokenizer = base_model()
    # about a token a word
    words = " ".join(["word"] * (tokens - 16))
    tasks = {f"task {number}": lw.Task([(f"{words} {number}", "one two three")] * rows) for number in range(jobs)}
    found = lw.train_adapters(
        model,
        tokenizer,
        tasks,
        steps=NUM_STEPS,
        batch_size=rows,
        jobs_per_batch=jobs,
        target_modules=ALL if targets == "all" else ATTENTION,
        progress=False,
    )
    report = found.report
    assert report is not None
    computed = report.num_computed // (report.num_steps * jobs * rows)
    console.print(f"{jobs} jobs x {rows} rows x {computed} tokens, {targets}", highlight=False)
    console.print(f"estimated {report.estimated_bytes / 1e6:,.0f} MB", highlight=False)
    if report.peak_bytes is None:
        console.print("[red]no peak was measured[/]: the process had used more before")
        raise SystemExit(1)
    ratio = report.estimated_bytes / report.peak_bytes
    console.print(f"measured {report.peak_bytes / 1e6:,.0f} MB: the estimate is {ratio:.2f} of it", highlight=False)


if __name__ == "__main__":
    typer.run(main)
