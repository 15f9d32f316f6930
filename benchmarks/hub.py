"""What the hub costs as it grows, its searches beside bare faiss, and opening an adapter beside reading its file.

    python -m benchmarks hub scale [--largest 1000000]     adding, opening, looking up, searching, memory, disk
    python -m benchmarks hub speed [--count 200000]        queries a second and recall@10 beside bare faiss
    python -m benchmarks hub add [--width 576]             adding many, beside reading and hashing their files
    python -m benchmarks hub blobs                         opening an adapter of 420 tensors

Adapters are synthetic: real rows of the catalogue and real keys of 384 dimensions, clustered as keys of texts are, and files
for a sample only. One thread (OMP_NUM_THREADS=1) unless said.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file

import loraweave as lw
from benchmarks._run import Table, best_of, console, status_bytes
from benchmarks._timing import Gate, Way, compare, require, timed
from loraweave import registry
from loraweave.common.files import whole_file, write_new
from loraweave.hub.search.keys import digest_of
from loraweave.hub.search.search import SearchIndex
from loraweave.hub.stores.blobs import read_blob
from loraweave.hub.stores.folder_blobs import blob_path
from loraweave.hub.tables import rows, vectors
from loraweave.hub.tables.filtering import Filters

app = typer.Typer()

DIM = 384
# adapters of one topic, and how far they lie around it, relative to the topic's own direction
_PER_TOPIC = 100
_SPREAD = 0.8
_NUM_FIELDS = 64
_BATCH = 5000
_NUM_QUERIES = 64
PROBE = (sys.executable, "-m", "benchmarks", "hub", "probe")


def _fastest(run: Callable[[], object], times: int = 5) -> float:
    return best_of(run, time.perf_counter, times)


def _once(run: Callable[[], object]) -> float:
    return _fastest(run, 1)


@app.command()
def probe(folder: Path, count: int) -> None:
    """What one fresh process measures on a hub that is there; prints JSON. `scale` calls it."""
    found: dict[str, float] = {}
    opened: list[lw.Hub] = []
    found["open"] = _once(lambda: opened.append(lw.Hub(folder)))
    hub = opened[0]
    found["len"] = _fastest(lambda: len(hub))
    found["by name"] = _fastest(lambda: hub.record(f"adapter {count // 2:07d}"))

    def misspelt() -> None:
        with suppress(lw.AdapterNotFound):
            hub.record("adaptor 12")

    found["by a name that is not there"] = _fastest(misspelt, 2)
    found["10 records of a rare tag"] = _fastest(lambda: hub.records(tags="ten"))
    embedder = Synthetic()
    index = SearchIndex(hub, embedder=embedder)
    query_QD = keys(count, num_keys=_NUM_QUERIES, seed=9)
    found["first search"] = _once(lambda: index.hits(query_QD[:1], 10))
    found["search"] = _fastest(lambda: index.hits(query_QD[:1], 10), 20)
    found["search, batch of 64"] = _fastest(lambda: index.hits(query_QD, 10), 3)
    for tag in ("half", "hundredth", "ten"):
        found[f"search, filter: {tag}"] = _fastest(lambda tag=tag: index.hits(query_QD[:1], 10, Filters(tags=tag)))
    found |= {f"{name}, MB": status_bytes(name) / 1e6 for name in ("RssAnon", "RssFile")}
    print(json.dumps(found))


def _probed(folder: Path, count: int) -> dict[str, float]:
    run = subprocess.run([*PROBE, str(folder), str(count)], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def _measured(folder: Path, count: int) -> dict[str, float]:
    vectors_ND = keys(count)
    found: dict[str, float] = {}
    start, begun = 0, 0.0
    for records in batches(count):
        begun += _once(lambda: fill(folder, records, vectors_ND[start : start + len(records)]))  # noqa: B023
        start += len(records)
    found["a row and its key, in transactions"] = begun / count
    with lw.Hub(folder) as hub:
        made = [small_adapter(f"real {number}", number) for number in range(64)]
        found["add, one by one"] = _once(lambda: [hub.add(one) for one in made]) / len(made)
        many = [small_adapter(f"many {number}", 1000 + number) for number in range(256)]
        found["add, a batch of 256"] = _once(lambda: hub.add_many(many)) / len(many)
        # its keys are made first, so that following one change is measured and not the encoder
        index = SearchIndex(hub, embedder=Synthetic())
        query_QD = keys(count, num_keys=1, seed=8)
        found["index made of the rows"] = _once(lambda: index.hits(query_QD, 10))

        def changed() -> None:
            hub.update("adapter 0000001", description=f"another text {time.perf_counter()}")
            index.hits(query_QD, 10)

        found["update and search"] = _fastest(changed)
        found["list all, a record"] = _once(hub.records) / len(hub)
    return found | _probed(folder, count) | _sizes(folder)


def _sizes(folder: Path) -> dict[str, float]:
    catalogue = sum(path.stat().st_size for path in folder.glob("catalogue.sqlite*"))
    index = sum(path.stat().st_size for path in (folder / "index").glob("*")) if (folder / "index").exists() else 0
    return {"catalogue, MB": catalogue / 1e6, "index file, MB": index / 1e6}


@app.command()
def scale(
    context: typer.Context,
    largest: Annotated[int, typer.Option(help="adapters; powers of ten from 1000 on")] = 1_000_000,
    folder: Annotated[Path | None, typer.Option(help="where the hubs are made; they need 6 kB an adapter")] = None,
) -> None:
    """Every cost at 10^3, 10^4, ... adapters, and its growth over the last power of ten: 0 is constant, 1 linear."""
    counts = [10**power for power in range(3, round(math.log10(largest)) + 1)]
    columns = []
    for count in counts:
        place = Path(tempfile.mkdtemp(prefix="hub-", dir=folder))
        try:
            columns.append(_measured(place / "hub", count))
        finally:
            shutil.rmtree(place)
        console.print(f"{count:,}: {json.dumps({name: float(f'{value:.4g}') for name, value in columns[-1].items()})}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    title = f"costs as the hub grows; peak memory of the process that made them: {peak:,.0f} MB"
    table = Table(title, ("milliseconds, or as said", *(f"{count:,}" for count in counts), "growth"))
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, math.nan) * (1 if name.endswith("MB") else 1e3) for column in columns]
        known = [value for value in values if value > 0]
        growth = math.log10(known[-1] / known[-2]) if len(known) > 1 else math.nan
        table.add(name, *(f"{value:.3g}" for value in values), f"{growth:.2f}")
    context.obj.show(table)


@app.command()
def speed(
    context: typer.Context,
    count: Annotated[int, typer.Option(help="keys, 20,000 or more")] = 200_000,
    smooth: Annotated[bool, typer.Option(help="keys without clusters, the worst case of the lists")] = False,
) -> None:
    """Searching an index beside bare faiss on the same keys and of the same kind, k = 10, processor time of one thread."""
    run = replace(context.obj, cpu=True)
    faiss.omp_set_num_threads(1)
    made = smooth_keys if smooth else keys
    vectors_ND, query_QD = made(count), made(count, num_keys=256, seed=9)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors_ND)
    half = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    half.add(vectors_ND)
    ours: dict[str, Any] = {}
    for name in ("faiss_half", "faiss_ivf"):
        before = time.perf_counter()
        ours[name] = registry.get("indexes", name).from_arrays(DIM, {"vectors": vectors_ND})
        console.print(f"{name} is made in {time.perf_counter() - before:.1f} s")
    bare = {"IndexScalarQuantizer": half, "IndexIVFScalarQuantizer": _bare_ivf(ours["faiss_ivf"])}
    want = ours["faiss_half"].search(query_QD, 10)[1]
    require([Gate("faiss_half and IndexFlatIP, share of the ten best that differ", 1 - _recall(flat, query_QD, want), 1e-3)])
    figures = Table(f"{count:,} keys", ("index", "recall@10", "queries a second", "in batches of 64"))
    speeds: dict[str, list[str]] = {name: [] for name in (*bare, *ours)}
    for batch in (1, 64):
        ways = {name: _way(index, query_QD, batch) for name, index in {**bare, **ours}.items()}
        title = f"{count:,} keys, {batch} queries a call"
        for own, its in zip(ours, bare, strict=True):
            pair = {its: ways[its], own: ways[own]}
            compare(run, title, pair, {f"time, {its} = 1": (its, False)}, rounds=9)
        for name, way in ways.items():
            speeds[name].append(f"{way.work / best_of(way.run, time.process_time, 1):,.0f}")
    for name, index in {**bare, **ours}.items():
        figures.add(name, f"{_recall(index, query_QD, want):.4f}", *speeds[name])
    context.obj.show(figures)


def _bare_ivf(ours: Any) -> Any:
    """faiss's own inverted lists of fp16 codes over the same centres, looking into as many lists."""
    arrays = ours.arrays()
    centres_CD = np.ascontiguousarray(arrays["centres"])
    coarse = faiss.IndexFlatIP(DIM)
    coarse.add(centres_CD)
    index = faiss.IndexIVFScalarQuantizer(
        coarse, DIM, len(centres_CD), faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.train(arrays["vectors"][:1000])
    index.add(arrays["vectors"])
    index.nprobe = math.ceil(len(centres_CD) * float(arrays["share"][0]))
    console.print(f"{index.nprobe} of {len(centres_CD)} lists are looked into")
    return index


def _way(index: Any, query_QD: np.ndarray, batch: int) -> Way:
    calls = [query_QD[start : start + batch] for start in range(0, 8 if batch == 1 else batch, batch)]
    return Way(lambda: [index.search(part, 10) for part in calls], work=len(calls) * batch)


def _recall(index: Any, query_QD: np.ndarray, want_QK: np.ndarray) -> float:
    found_QK = index.search(query_QD, 10)[1]
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(found_QK, want_QK, strict=True)]) / want_QK.shape[1])


@app.command()
def add(
    context: typer.Context, width: Annotated[int, typer.Option(help="of the model; 576 is SmolLM2-135M's")] = 576
) -> None:
    """`add_many` of 64 adapters of 120 tensors (q and v of 30 blocks, rank 8), beside reading and hashing files alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = {f"model.layers.{n}.self_attn.{m}_proj": width // part for n in range(30) for m, part in (("q", 1), ("v", 3))}

    def factors(outputs: int) -> lw.Factors:
        return lw.Factors(torch.randn(8, width, generator=generator), torch.randn(outputs, 8, generator=generator))

    adapters = [lw.Adapter(f"a{n}", "base", {name: factors(size) for name, size in sizes.items()}) for n in range(64)]
    with tempfile.TemporaryDirectory() as place:
        folders = [adapter.save_pretrained(Path(place) / adapter.name) for adapter in adapters]
        files = [folder / "adapter_model.safetensors" for folder in folders]
        numbers = itertools.count()

        def added(sources: Sequence[Any]) -> None:
            with lw.Hub(Path(place) / f"hub{next(numbers)}") as hub:
                if refused := hub.add_many(sources).refused:
                    raise SystemExit(f"{len(refused)} are refused, the first: {refused[0]}")

        def forget() -> None:
            for adapter in adapters:
                vars(adapter).pop("hash", None)

        def stored() -> None:
            """What no hub can do without: a hash of the content, one of the file, and the file on the disk."""
            for file in files:
                load_file(file)
                data = file.read_bytes()
                hashlib.sha256(data), hashlib.sha256(data)
                with whole_file(Path(place) / "stored") as temporary:
                    write_new(temporary, data)

        ways = {
            "load_file and sha256 of each": Way(
                lambda: [(load_file(file), hashlib.sha256(file.read_bytes()).digest()) for file in files], work=64
            ),
            "load_file, two sha256, written and synced": Way(stored, work=64),
            "add_many of adapters": Way(lambda: added(adapters), forget, work=64),
            "add_many of folders": Way(lambda: added(folders), work=64),
        }
        taken = timed(replace(context.obj, cpu=True), "adding", ways, rounds=7, seconds=90.0)
    table = Table(f"64 adapters of 120 tensors, width {width}: processor time", ("way", "ms an adapter"))
    for name, seconds in taken.items():
        table.add(name, f"{min(seconds) / 64 * 1e3:.2f}")
    context.obj.show(table)


@app.command()
def blobs(context: typer.Context) -> None:
    """Opening an adapter of 210 layers of SmolLM2-135M, rank 8, beside `load_file`, peft, and copying its bytes."""
    generator = torch.Generator().manual_seed(0)
    sizes = {f"self_attn.{module}": (576, num_out) for module, num_out in zip("qkvo", (576, 192, 192, 576), strict=True)}
    sizes |= {"mlp.gate": (576, 1536), "mlp.up": (576, 1536), "mlp.down": (1536, 576)}
    layers = {
        f"model.layers.{block}.{module}_proj": lw.Factors(
            torch.randn(8, num_in, generator=generator), torch.randn(num_out, 8, generator=generator)
        )
        for block in range(30)
        for module, (num_in, num_out) in sizes.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        hub = lw.Hub(Path(folder) / "hub")
        record = hub.add(lw.Adapter("big", "base", layers))
        path = blob_path(hub.path, record.hash)
        apart = Path(folder) / "apart.safetensors"
        tensors = {f"{layer}.{part}": tensor for layer, f in layers.items() for part, tensor in f.tensors().items()}
        save_file(tensors, apart)
        numbers = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        read = read_blob(path, "big").layers
        wrong = sum(
            not torch.equal(f.a_RI, read[layer].a_RI) or not torch.equal(f.b_OR, read[layer].b_OR)
            for layer, f in layers.items()
        )
        require([Gate("layers that come back changed", float(wrong), 0.0)])
        ways = {
            "safetensors load_file, 420 tensors": Way(lambda: load_file(apart)),
            "read_blob": Way(lambda: read_blob(path, "big")),
            "hub[name], digest known": Way(lambda: hub["big"]),
            "read_blob, and every number copied": Way(
                lambda: [tensor.clone() for f in read_blob(path, "big").layers.values() for tensor in f.tensors().values()]
            ),
            "a copy of the numbers in memory": Way(lambda: numbers.clone()),
            "peft load_adapter": Way(_peft_loading(hub["big"], Path(folder) / "peft")),
        }
        title = f"opening {len(tensors)} tensors of {numbers.nbytes / 1e6:.1f} MB"
        tables = {"time, load_file = 1": (next(iter(ways)), False), "a copy = 1": ("a copy of the numbers in memory", False)}
        compare(context.obj, title, ways, tables, seconds=120.0)
        console.print(f"read_blob: {1e3 * _fastest(ways['read_blob'].run, 20):.2f} ms")
        hub.close()


def _peft_loading(adapter: lw.Adapter, folder: Path) -> Callable[[], object]:
    """peft putting the adapter into a model of SmolLM2-135M's shape that has another already, and taking it out again."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter.save_pretrained(folder)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 64}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3)
    model = PeftModel.from_pretrained(LlamaForCausalLM(config), folder)

    def load() -> None:
        model.load_adapter(folder, "other")
        model.delete_adapter("other")

    return load


class Synthetic:
    """Texts to unit vectors that depend on nothing but the text: the encoder's cost is not what is measured here."""

    dim = DIM
    id = "synthetic-384"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([_unit(_normal(zlib.crc32(text.encode()), 1))[0] for text in texts])


def keys(count: int, *, num_keys: int | None = None, seed: int = 0) -> np.ndarray:
    """`num_keys` unit vectors (default `count`) around the topics of a hub of `count`: fields of topics of adapters."""
    num_topics = max(8, count // _PER_TOPIC)
    fields = _unit(_normal(1, _NUM_FIELDS))
    rng = np.random.default_rng(2)
    topics = _unit(fields[rng.integers(_NUM_FIELDS, size=num_topics)] + _SPREAD * _unit(_normal(3, num_topics)))
    found = np.empty((num_keys or count, DIM), np.float32)
    for start in range(0, len(found), _BATCH):
        part = found[start : start + _BATCH]
        rng = np.random.default_rng([seed, start])
        part[:] = _unit(
            topics[rng.integers(num_topics, size=len(part))] + _SPREAD * _unit(_normal([seed, start], len(part)))
        )
    return found


def smooth_keys(count: int, *, num_keys: int | None = None, seed: int = 0) -> np.ndarray:
    """As many without any clusters: mixtures of 32 directions, and noise."""
    weights = np.random.default_rng([seed, 4]).standard_normal((num_keys or count, 32), dtype=np.float32)
    noise = np.random.default_rng([seed, 5]).standard_normal((num_keys or count, DIM), dtype=np.float32)
    return _unit(weights @ _normal(6, 32) / np.float32(32**0.5) + 0.3 * noise)


def record(number: int, count: int) -> lw.Record:
    """Tags let through a half, a hundredth and ten of all."""
    tags = ["half"] * (number % 2 == 0) + ["hundredth"] * (number % 100 == 0) + ["ten"] * (number % max(1, count // 10) == 0)
    description = f"what adapter {number} does"
    return lw.Record(
        name=f"adapter {number:07d}",
        hash=f"{number:064x}",
        base_model=f"base {number % 3}",
        rank=8,
        target_modules=("q_proj", "v_proj"),
        license="Apache-2.0",
        tags=tuple(tags),
        description=description,
        size_bytes=0,
        created="2026-01-01T00:00:00+00:00",
        card={"description": description, "tags": tags, "license": "Apache-2.0"},
    )


def batches(count: int) -> Iterator[list[lw.Record]]:
    for start in range(0, count, _BATCH):
        yield [record(number, count) for number in range(start, min(count, start + _BATCH))]


def fill(folder: Path, records: Sequence[lw.Record], keys_ND: np.ndarray) -> None:
    """Adds rows and keys in one transaction, as `Hub.add` and a search would one by one; no blob is written."""
    with lw.Hub(folder) as hub, hub._catalogue.writing("filling") as connection:
        for one in records:
            rows.put_blob(connection, rows.BlobRow(one.hash, "0" * 64, 1000))
            rows.insert(connection, one)
        made = [(one.name, digest_of(one), key_D) for one, key_D in zip(records, keys_ND, strict=True)]
        vectors.write_vectors(connection, Synthetic.id, made)


def small_adapter(name: str, number: int) -> lw.Adapter:
    """One with a blob of its own, of some 10 kB."""
    generator = torch.Generator().manual_seed(number)
    factors = lw.Factors(torch.randn(8, 128, generator=generator), torch.randn(128, 8, generator=generator))
    return lw.Adapter(name, "base 0", {"model.layers.0.self_attn.q_proj": factors})


def _normal(seed: int | list[int], count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return scaled
