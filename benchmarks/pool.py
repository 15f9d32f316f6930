"""What pools of tens to ten thousand adapters cost: attaching them, running rows with them, and paging their factors.

    python -m benchmarks pool attach         20 to 1,000 adapters of a hub, beside reading the files; one more, beside peft
    python -m benchmarks pool rows prefill   8 rows with 8 adapters, pools of 20 to 10,000 (or: rows decode)
    python -m benchmarks pool paging         bringing adapters where the layers are, beside copying as many bytes

The adapters are of rank 8 on all seven linear layers of the default model, random, 9.8 MB each in fp32. Names share contents
beyond `--distinct`, which keeps the disk small; each name is opened from its file all the same. A process compares a file's
checksum when it first opens it, which is most of that opening's time.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import peft
import torch
import typer

import loraweave as lw
from benchmarks._models import LIMIT, Context, base_model, changes, difference, prefill, random_adapter, tokens
from benchmarks._run import Run, Table
from benchmarks._timing import Gate, Way, compare, require, timed
from loraweave.common import files as whole_files
from loraweave.common.process import paused_collector
from loraweave.composer.live.residents import Residents

app = typer.Typer()

NUM_ROWS = 8
PREFILL_TOKENS = 64
PROMPT_TOKENS = 16
NEW_TOKENS = 16
NUM_EACH = 5
MARKS = (1, 10, 20, 50, 100, 200, 500, 1000)
Sizes = Annotated[list[int], typer.Option("--size", help="adapters in the pool")]
Folder = Annotated[Path, typer.Option(help="for the hub and peft's folders")]


@contextmanager
def hub_of(model: Any, num_names: int, distinct: int, folder: Path) -> Iterator[lw.Hub]:
    """A hub with that many names in a temporary folder."""
    path = Path(tempfile.mkdtemp(prefix="pool", dir=folder))
    try:
        hub = lw.Hub(path / "hub")
        contents = [random_adapter(model, "random", "all", seed) for seed in range(min(distinct, num_names))]
        named = (renamed(contents[number % distinct], f"adapter{number:05d}") for number in range(num_names))
        hub.add_many(named, anomalies="off")
        del contents
        yield hub
    finally:
        shutil.rmtree(path)


def renamed(adapter: lw.Adapter, name: str) -> lw.Adapter:
    return lw.Adapter(name, adapter.base_model, adapter.layers)


def per_adapter(title: str, taken: Mapping[str, Sequence[float]], num_adapters: int, reference: str) -> Table:
    """Milliseconds an adapter, and their ratio to the reference within each round."""
    table = Table(f"{title}, {len(taken[reference])} rounds", ("way", "ms an adapter", "25-75 %", f"{reference} = 1"))
    for name, seconds in taken.items():
        each = np.asarray(seconds) / num_adapters * 1e3
        low, median, high = np.percentile(each, [25, 50, 75])
        ratio = float(np.median(np.asarray(seconds) / np.asarray(taken[reference])))
        table.add(name, f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{ratio:.2f}")
    return table


@app.command()
def attach(
    context: typer.Context,
    sizes: Sizes = [20, 100, 1000],  # noqa: B006
    distinct: Annotated[int, typer.Option(help="files that the names share")] = 100,
    in_peft: Annotated[int, typer.Option(help="adapters to load into peft, one after the other")] = 100,
    folder: Folder = Path("/dev/shm"),
) -> None:
    """A hub's adapters into a running model: all at once, and one more beside those that are there."""
    run: Run = context.obj
    model, _ = base_model()
    with hub_of(model, max(sizes) + NUM_EACH, distinct, folder) as hub:
        names = [record.name for record in hub]
        for size in sizes:
            title, ways = f"attaching {size:,} adapters", attaching(model, hub, names[:size])
            taken = timed(run, title, ways, rounds=7, seconds=120.0)
            run.show(per_adapter(title, taken, size, next(iter(ways))))
        run.show(one_more(model, hub, names, in_peft, folder, time.process_time if run.cpu else time.perf_counter))


def attaching(model: Any, hub: lw.Hub, names: Sequence[str]) -> dict[str, Way]:
    """Reading the files, and making a Composer of the pool in three ways."""
    digests = {record.name: record.hash for record in hub}
    files = [hub.path / "blobs" / digests[name][:2] / f"{digests[name]}.safetensors" for name in names]

    def read() -> int:
        return sum(len(file.read_bytes()) for file in files)

    def read_and_digest() -> None:
        for file in files:
            hashlib.sha256(file.read_bytes()).digest()

    def unseen(name: str) -> Any:
        # of a file that has not changed, the process remembers the checksum
        whole_files._digests.clear()
        return hub.get(name)

    def first_time() -> None:
        # as Hub.pool does
        with paused_collector():
            lw.Composer(model, [unseen(name) for name in names])

    return {
        "reading the files": Way(read),
        "reading the files and their checksums": Way(read_and_digest),
        "loraweave, files not seen before": Way(first_time),
        "loraweave, files seen before": Way(lambda: lw.Composer(model, hub.pool(names)), lambda: seen(hub)),
        "loraweave, lazy": Way(lambda: lw.Composer(model, hub.pool(names, lazy=True))),
    }


def seen(hub: lw.Hub) -> None:
    """Every file's checksum compared, and remembered."""
    for name in {record.hash: record.name for record in hub}.values():
        hub.get(name)


def one_more(model: Any, hub: lw.Hub, names: Sequence[str], in_peft: int, folder: Path, timer: Callable[[], float]) -> Table:
    """The next adapter beside so many: peft's load_adapter from a folder, and a Composer's load from the hub."""
    title = f"one more adapter, from its file (not seen before), median of {NUM_EACH}"
    table = Table(title, ("loaded before", "peft load_adapter, ms", "loraweave, ms"))
    theirs = loading_into_peft(hub, names[: in_peft + NUM_EACH], folder, timer)
    for mark in MARKS:
        if mark > max(in_peft, len(names) - NUM_EACH):
            continue
        there = theirs[mark : mark + NUM_EACH] if mark <= in_peft else []
        here = []
        if mark <= len(names) - NUM_EACH:
            engine = lw.Composer(model, hub.pool(names[:mark]))
            for name in names[mark : mark + NUM_EACH]:
                whole_files._digests.clear()
                before = timer()
                engine.load(name, hub.get(name))
                here.append(timer() - before)
        table.add(f"{mark:,}", *(f"{np.median(each) * 1e3:.1f}" if each else "" for each in (there, here)))
    return table


def loading_into_peft(hub: lw.Hub, names: Sequence[str], folder: Path, timer: Callable[[], float]) -> list[float]:
    """Seconds of each load_adapter, one after the other into one model."""
    copied, _ = base_model()
    taken: list[float] = []
    found: Any = None
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name in names:
            path = hub[name].save_pretrained(Path(place) / "adapter")
            before = timer()
            if found is None:
                found = peft.PeftModel.from_pretrained(copied, path, adapter_name=name)
            else:
                found.load_adapter(path, adapter_name=name)
            taken.append(timer() - before)
            shutil.rmtree(path)
    return taken


@app.command()
def rows(
    context: typer.Context,
    what: Annotated[Literal["prefill", "decode"], typer.Argument()] = "prefill",
    sizes: Sizes = [20, 100, 1000, 10_000],  # noqa: B006
    distinct: Annotated[int, typer.Option(help="contents that the names share")] = 20,
) -> None:
    """8 rows with 8 different adapters, the activation included, for pools of several sizes."""
    run: Run = context.obj
    model, _ = base_model()
    contents = [random_adapter(model, "random", "all", seed) for seed in range(distinct)]
    ids_BT = tokens(model, NUM_ROWS, PREFILL_TOKENS, run.seed)
    engines = {}
    for size in sizes:
        named = {f"adapter{number:05d}": contents[number % distinct] for number in range(size)}
        engines[f"pool of {size:,}"] = lw.Composer(model, named)
        if size == max(sizes):
            lazy = lw.ExpertPool.on_demand(named, named.__getitem__)
            engines[f"pool of {size:,}, lazy"] = lw.Composer(model, lazy)
    require(equal_answers(model, engines, distinct, ids_BT[:, :9]))
    ways = {"base alone": Way(pass_over(what, model, ids_BT, nullcontext))}
    for name, engine in engines.items():
        ways[name] = Way(pass_over(what, model, ids_BT, lambda engine=engine: engine.activate(chosen(engine, distinct))))
    shape = f"8x{PREFILL_TOKENS}" if what == "prefill" else f"8 rows, {NEW_TOKENS} tokens"
    tables = {"time, base = 1": ("base alone", False), "smallest pool = 1": (f"pool of {sizes[0]:,}", False)}
    compare(run, f"{what} {shape}, own adapter per row, rank 8", ways, tables, seconds=300.0)


def chosen(engine: lw.Composer, distinct: int) -> list[dict[str, float]]:
    """Eight adapters of different contents, spread over the pool."""
    names = engine.pool.names
    step = max(len(names) // distinct // NUM_ROWS, 1) * distinct
    return [{names[(row * step + row) % len(names)]: 1.0} for row in range(NUM_ROWS)]


@torch.inference_mode()
def equal_answers(model: Any, engines: Mapping[str, lw.Composer], distinct: int, ids_BT: torch.Tensor) -> list[Gate]:
    found = []
    for engine in engines.values():
        with engine.activate(chosen(engine, distinct)):
            found.append(model(ids_BT).logits)
    base = model(ids_BT).logits
    gates = [
        Gate(f"{name} answers as the first", difference(logits, found[0]), LIMIT)
        for name, logits in zip(engines, found, strict=True)
    ]
    nearest = min(difference(found[0][row], base[row]) for row in range(NUM_ROWS))
    return [*gates, changes("adapters", nearest)]


def pass_over(what: str, model: Any, ids_BT: torch.Tensor, context: Context) -> Callable[[], None]:
    """All tokens at once, or the first ones and `generate()`."""
    if what == "prefill":
        return prefill(model, ids_BT, context)
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    prompt_BT = ids_BT[:, :PROMPT_TOKENS]

    @torch.inference_mode()
    def run() -> None:
        with context():
            model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **settings)

    return run


@app.command()
def paging(
    context: typer.Context,
    num_adapters: Annotated[int, typer.Option("--adapters", help="brought to their places in each run")] = 16,
    folder: Folder = Path("/dev/shm"),
) -> None:
    """Leases of adapters that are not in their places yet; the CPU stands for a device, too."""
    model, _ = base_model()
    with hub_of(model, num_adapters, num_adapters, folder) as hub:
        seen(hub)
        adapters = {record.name: hub.get(record.name) for record in hub}
        layers = next(iter(adapters.values())).layers
        num_bytes = sum(f.a_RI.nbytes + f.b_OR.nbytes for adapter in adapters.values() for f in adapter.layers.values())
        source, target = torch.ones(num_bytes // 4), torch.empty(num_bytes // 4)

        def leased(dtype: torch.dtype, staged: bool, opener: Callable[[str], lw.Adapter] = adapters.__getitem__) -> Way:
            places = dict.fromkeys(layers, (torch.device("cpu"), dtype))
            return Way(lambda: Residents(opener, lambda: places, staged=lambda device: staged).lease(adapters).release())

        ways = {
            "one copy of as many fp32 bytes": Way(lambda: target.copy_(source)),
            "to the CPU, fp32": leased(torch.float32, staged=False),
            "to the CPU, fp32, each opened from its file": leased(torch.float32, staged=False, opener=hub.get),
            "to the CPU, bf16": leased(torch.bfloat16, staged=False),
            "to the host, and on to a device, fp32": leased(torch.float32, staged=True),
            "from the host's copy to a device, fp32": again_on_device(adapters),
        }
        table = {"time, copy = 1": ("one copy of as many fp32 bytes", False)}
        title = f"{num_adapters} adapters, {num_bytes / 1e6:.0f} MB in fp32"
        compare(context.obj, title, ways, table, seconds=120.0)


def again_on_device(adapters: Mapping[str, lw.Adapter]) -> Way:
    """Each adapter in turn, on a device that has room for one, from a host that has them all."""
    places = dict.fromkeys(next(iter(adapters.values())).layers, (torch.device("cpu"), torch.float32))
    largest = max(sum(f.a_RI.nbytes + f.b_OR.nbytes for f in adapter.layers.values()) for adapter in adapters.values())
    residents = Residents(adapters.__getitem__, lambda: places, staged=lambda device: True, device_budget_bytes=largest)

    def run() -> None:
        for name in adapters:
            residents.lease([name]).release()

    return Way(run)
