"""Work spread over processes of this machine and over Ray and Dask clusters on it, whose workers are killed meanwhile.

    python -m benchmarks spread overhead [--pieces 400]            what handing out a piece costs
    python -m benchmarks spread train [--adapters 200 --every 20]  adapters trained and indexed while workers are killed
    python -m benchmarks spread resume [--workers 2]               a study whose driver is killed
    python -m benchmarks spread replicas                           where requests for a formula go

Clusters are several nodes, as processes of one machine that listen on loopback; of `--backends loky,dask,ray` each needs its
package. The base is a random Llama of two blocks over characters. What a network costs is not measured.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import joblib
import psutil
import torch
import transformers
import typer
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import loraweave as lw
from benchmarks._models import random_adapter
from benchmarks._run import ROOT, Run, Table, console
from loraweave.common.display import progress_bar
from loraweave.common.spread import Failed, logger, spread
from loraweave.extensions.study import study

app = typer.Typer()

WORKERS = 4
# how many pieces of so many seconds
PIECES = {1: 80, 10: 16, 60: 8}
Backends = Annotated[str, typer.Option(help="some of loky, dask, ray")]


@app.command()
def overhead(
    context: typer.Context, backends: Backends = "loky,dask,ray", pieces: Annotated[int, typer.Option(min=50)] = 400
) -> None:
    """Empty and sleeping pieces on four workers, beside concurrent.futures' pool.

    The efficiency is the share of the time between the first and the last piece of each worker in which it had one.
    """
    run: Run = context.obj
    table = Table(
        f"{pieces} empty pieces on {WORKERS} workers, and {', '.join(f'{n} of {each} s' for each, n in PIECES.items())}",
        ("backend", "first result, s", "a piece, ms", *(f"efficiency at {seconds} s" for seconds in PIECES)),
    )
    for backend in ("concurrent.futures", *backends.split(",")):
        with workers(backend):
            first, each = _paced(backend, pieces)
            shares = [_share(_results(backend, [seconds] * count)) for seconds, count in PIECES.items()]
        table.add(backend, f"{first:.1f}", f"{1e3 * each:.2f}", *(f"{share:.2%}" for share in shares))
        console.print(" ".join(table.rows[-1]))
    run.show(table)


def _paced(backend: str, pieces: int) -> tuple[float, float]:
    """Seconds to the first result, and seconds a piece once all workers are there, after the first fifth."""
    asked = time.perf_counter()
    ended = [time.perf_counter() for _ in _results(backend, [0] * pieces)]
    settled = pieces // 5
    return ended[0] - asked, (ended[-1] - ended[settled]) / (len(ended) - 1 - settled)


# which process slept, from when to when; all are of one machine
Slept = tuple[int, float, float]


def _sleep(seconds: float) -> Slept:
    begun = time.monotonic()
    time.sleep(seconds)
    return os.getpid(), begun, time.monotonic()


def _share(slept: Iterator[Slept]) -> float:
    by_worker: dict[int, list[tuple[float, float]]] = {}
    for worker, begun, ended in slept:
        by_worker.setdefault(worker, []).append((begun, ended))
    busy = sum(ended - begun for own in by_worker.values() for begun, ended in own)
    return busy / sum(max(ended for _, ended in own) - min(begun for begun, _ in own) for own in by_worker.values())


def _results(backend: str, seconds: list[float]) -> Iterator[Slept]:
    if backend == "concurrent.futures":
        with ProcessPoolExecutor(WORKERS) as pool:
            yield from (each.result() for each in as_completed([pool.submit(_sleep, each) for each in seconds]))
        return
    pieces = {str(number): each for number, each in enumerate(seconds)}
    with progress_bar(False) as bar:
        for _, found in spread(_sleep, pieces, n_jobs=None, label="sleeping", bar=bar):
            assert not isinstance(found, Failed), found.error
            yield found


@contextmanager
def workers(backend: str, count: int = WORKERS) -> Iterator[None]:
    """So many workers of that kind, over which the block spreads what it does, unless it is this process or has a pool."""
    if backend in ("here", "concurrent.futures"):
        yield
    elif backend == "loky":
        with joblib.parallel_config(backend="loky", n_jobs=count):
            yield
    elif backend == "dask":
        import distributed

        local = {"host": "127.0.0.1", "dashboard_address": None, "threads_per_worker": 1, "silence_logs": logging.CRITICAL}
        with (
            distributed.LocalCluster(n_workers=count, **local) as cluster,
            distributed.Client(cluster),
            joblib.parallel_config(backend="dask"),
        ):
            yield
    else:
        with _ray_cluster(count), joblib.parallel_config(backend="ray"):
            yield


def _ray_settings() -> dict[str, str]:
    # on a busy machine its workers would else yield to everything, and end where others fill the memory
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_memory_monitor_refresh_ms": "0"}
    return {**settings, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


@contextmanager
def _ray_cluster(count: int) -> Iterator[None]:
    """A head without cores, and so many nodes of one core."""
    os.environ.update(_ray_settings())
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.joblib import register_ray

    register_ray()
    # nodes of their own loopback addresses: of 127.0.0.1 Ray makes that of the machine
    local: list[dict[str, Any]] = [
        {"node_ip_address": f"127.0.0.{2 + node}", "include_dashboard": False} for node in range(count + 1)
    ]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **local[0]})
    try:
        for node in local[1:]:
            cluster.add_node(num_cpus=1, **node)
        own = {"_node_ip_address": local[0]["node_ip_address"], "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address=cluster.address, **own)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@app.command()
def train(
    context: typer.Context,
    backends: Backends = "loky,dask,ray",
    adapters: Annotated[int, typer.Option(min=1, help="how many are trained")] = 200,
    every: Annotated[float, typer.Option(help="seconds between two kills")] = 20.0,
    steps: Annotated[int, typer.Option(min=1, help="of each training")] = 100,
) -> None:
    """Adapters trained into a hub on four workers, of which one is killed every few seconds, beside one process."""
    run: Run = context.obj
    tasks = {f"add {n}": [(str(k), str(k + n)) for k in range(8)] for n in range(adapters)}
    table = Table(
        f"{adapters} adapters of {steps} steps on {WORKERS} workers, one killed every {every:g} s",
        (
            "backend",
            "workers killed",
            "pieces handed out again",
            "in the hub",
            "found by its index",
            "equal",
            "s",
        ),
    )
    known: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = tiny_base(Path(folder) / "base")
        for backend in ("here", *backends.split(",")):
            lost = Counting()
            with lw.Hub(Path(folder) / backend) as hub, workers(backend), killing(backend, every, run.seed) as killed, lost:
                started = time.perf_counter()
                settings: dict[str, Any] = {"rank": 4, "steps": steps, "batch_size": 4, "seed": run.seed}
                trained = lw.train_adapters(model, tokenizer, tasks, hub=hub, progress=False, **settings)
                seconds = time.perf_counter() - started
                assert {name: adapter.hash for name, adapter in trained.items()} == {r.name: r.hash for r in hub}
                there = {record.name: record.hash for record in hub}
                known = known or there
                same = sum(known[name] == digest for name, digest in there.items())
                indexed = len({hit.name for hit in hub.search("add 17", k=2 * adapters)})
                problems = hub.verify().problems
            assert not problems, problems
            table.add(backend, *map(str, (len(killed), lost.count, len(there), indexed, same)), f"{seconds:.0f}")
            console.print(" ".join(table.rows[-1]))
    run.show(table)


class Counting(logging.Handler):
    """Counts the pieces that `spread` says it hands out again."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1

    def __enter__(self) -> None:
        logger.addHandler(self)

    def __exit__(self, *error: object) -> None:
        logger.removeHandler(self)


# how the processes that run pieces are called
CALLED = {"loky": "LokyProcess", "dask": "multiprocessing", "ray": "ray::"}


@contextmanager
def killing(backend: str, every: float, seed: int) -> Iterator[list[int]]:
    """Kills one of the workers, drawn by the seed, every few seconds until the block ends; the list has their ids."""
    killed: list[int] = []
    over, generator = threading.Event(), random.Random(seed)

    def kill() -> None:
        while backend in CALLED and not over.wait(every):
            found = [each for each in psutil.Process().children(recursive=True) if _works(each, backend)]
            if found:
                victim = generator.choice(sorted(found, key=lambda process: process.pid))
                victim.kill()
                killed.append(victim.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def _works(process: psutil.Process, backend: str) -> bool:
    try:
        # loky and multiprocessing have processes beside, which track resources; a node of Ray ends with its agents
        words = " ".join(process.cmdline())
        beside = any(word in words for word in ("resource_tracker", "forkserver", "raylet", "Agent"))
        return CALLED[backend] in words and not beside
    except psutil.Error:
        return False


def tiny_base(folder: Path) -> tuple[Any, Any]:
    """A random Llama of two blocks over printable characters, loaded from the folder that it is saved to."""
    known = ["<pad>", "</s>", *string.printable]
    inner = Tokenizer(models.WordLevel({token: place for place, token in enumerate(known)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(known), initializer_range=0.3, pad_token_id=0, eos_token_id=1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, loaded = lw.load_base(folder)
    return model.requires_grad_(False), loaded


@app.command()
def resume(
    context: typer.Context, workers: Annotated[int, typer.Option(min=2)] = 2, after: Annotated[int, typer.Option()] = 30
) -> None:
    """A study of 6 methods on every unseen task whose driver is killed after some cells, beside one that is not."""
    run: Run = context.obj
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, _ = tiny_base(folder / "base")
        for name in "abcd":
            random_adapter(model, name, "qv", run.seed, rank=4).save_pretrained(folder / "pool" / name)
        lora = {"method": "lora", "steps": 5, "batch_size": 2}
        said: dict[str, Any] = {
            "base": "base",
            "pool": "pool",
            "tasks": [str(path) for path in sorted((run.data / "unseen").glob("*.jsonl"))],
            "methods": ["base", "in_context", "0.5*a + 0.5*b", "ties(a, b, c; density=0.5)", "best_single", lora],
            "num_test": 4,
            "max_new_tokens": 8,
            "metrics": ["exact_match"],
        }
        (folder / "study.yaml").write_text(yaml.safe_dump(said))
        command = [sys.executable, "-m", "loraweave", "study", str(folder / "study.yaml"), "--workers", str(workers)]
        cells = folder / "spread" / "cells"
        first = subprocess.Popen([*command, "--out", str(folder / "spread")], stdout=subprocess.DEVNULL)
        while first.poll() is None and len(list(cells.glob("*.json"))) < after:
            time.sleep(0.05)
        children = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGKILL)
        first.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        before = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
        subprocess.run([*command, "--out", str(folder / "spread")], check=True, stdout=subprocess.DEVNULL)
        whole = study(folder / "study.yaml", out=folder / "one", progress=False)
        found = {path.name: _answered(path) for path in cells.glob("*.json")}
        alone = {path.name: _answered(path) for path in (folder / "one" / "cells").glob("*.json")}
        same = sum(found.get(name) == answers for name, answers in alone.items())
        again = sum(path.stat().st_mtime_ns != stamp for path, stamp in before.items())
    columns = (
        "cells",
        "done when the driver was killed",
        "of these done again",
        "workers left behind",
        "equal",
    )
    table = Table(f"{len(said['tasks'])} tasks x {len(said['methods'])} methods, {workers} workers", columns)
    table.add(*map(str, (len(alone), len(before), again, len(alive), same)))
    assert not whole.failures, whole.failures
    run.show(table)


def _answered(path: Path) -> Any:
    """What a cell has answered, without the time that it took."""
    said = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in said.items() if key not in ("seconds", "cpu_seconds")}


@app.command()
def replicas(
    context: typer.Context,
    formulas: Annotated[int, typer.Option(min=1)] = 12,
    turns: Annotated[int, typer.Option(min=2)] = 6,
) -> None:
    """Conversations, each with a formula of its own, on two replicas of Ray Serve, and on two servers taken at random."""
    run: Run = context.obj
    weights = [round((number + 1) / (formulas + 1), 2) for number in range(formulas)]
    names = [f"{weight}*a + {round(1 - weight, 2)}*b" for weight in weights]
    columns = ("way", "answers where the formula was last", "prompt tokens not read again", "ms a request, median")
    table = Table(f"{formulas} formulas, {turns} turns of each", columns)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, _ = tiny_base(folder / "base")
        with lw.Hub(folder / "hub") as hub:
            hub.add_many([random_adapter(model, name, "qv", run.seed, rank=4) for name in "ab"])
        chance = random.Random(run.seed)
        ways: dict[str, Any] = {"two servers, at random": _servers, "Ray Serve, two replicas": _ray_serve}
        for way, started in ways.items():
            with started(folder) as ports:
                table.add(way, *_conversations(names, turns, lambda ports=ports: chance.choice(ports)))
                console.print(" ".join(table.rows[-1]))
    run.show(table)


KEY = "benchmark"
FIRST = "The first lines of every conversation are the same, and long enough to be worth a place in memory. "


def _conversations(names: list[str], turns: int, port: Callable[[], int]) -> tuple[str, str, str]:
    texts, last, again, kept, read = dict.fromkeys(names, FIRST), dict.fromkeys(names, ""), 0, 0, 0
    took = []
    for turn in range(turns):
        for name in names:
            begun = time.perf_counter()
            where, answer = _complete(port(), name, texts[name])
            took.append(time.perf_counter() - begun)
            again += bool(turn) and where == last[name]
            last[name], usage = where, answer["usage"]
            kept += usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
            read += usage["prompt_tokens"]
            texts[name] += answer["choices"][0]["text"] + f" And then, in turn {turn}? "
    return f"{again / (len(names) * (turns - 1)):.0%}", f"{kept / read:.0%}", f"{1e3 * sorted(took)[len(took) // 2]:.1f}"


def _complete(port: int, name: str, prompt: str) -> tuple[str, dict[str, Any]]:
    """Who answered, and what."""
    asked = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.headers.get("X-Loraweave-Replica", str(port)), json.load(answer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _servers(folder: Path) -> Iterator[list[int]]:
    ports = [_free_port() for _ in range(2)]
    command = [sys.executable, "-m", "loraweave", "serve", "--hub", str(folder / "hub"), "--base", str(folder / "base")]
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    servers = [subprocess.Popen([*command, "--api-key", KEY, "--port", str(port)], **silent) for port in ports]
    try:
        for port in ports:
            _wait_for(port)
        yield ports
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def _wait_for(port: int) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"no server on port {port}")


@contextmanager
def _ray_serve(folder: Path) -> Iterator[list[int]]:
    os.environ.update(_ray_settings())
    import ray
    from ray import serve

    from loraweave.extensions.cluster import replicated

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        port = _free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        with lw.Hub(folder / "hub") as hub:
            serve.run(replicated(hub, api_key=KEY, base={"name": str(folder / "base")}), route_prefix="/")
            yield [port]
    finally:
        serve.shutdown()
        ray.shutdown()
