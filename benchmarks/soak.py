"""A server under its smallest limits, attacked, killed and started again, while its hub and its keys change.

    python -m benchmarks --out runs/attacked soak --tiny --requests 20000      a random model of two blocks, in float64
    python -m benchmarks --out runs/attacked-135m soak --requests 200          SmolLM2-135M

Four honest clients ask for the random formulas of `serve`, each as soon as it has its last answer. In the first of every
four parts they are alone; in the others a process attacks with endless heads, slow bodies, silent connections, prompts of
a megabyte, wrong keys, new merges, formulas beyond all limits, and more requests than a key may send (`_attacks`). One
adapter is added, replaced and removed throughout, by another process than the server's. In every tenth part the server is
ended, by SIGKILL and by SIGTERM in turn, and started again with other keys for the honest clients.

A whole answer has to be one that transformers' greedy search gives for its prompt alone, under contents that the hub had
between the request and its answer. Clients ask again after a 429 or 503, when its Retry-After says, and after a lost
connection; their seconds count from the first attempt. Parts in which the server was ended count in no percentile. Memory is
looked at every 0.1 s, and its bound is that after the server's first answers, and then what the limits allow, and 64 MiB.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

import loraweave as lw
from benchmarks._data import kept, known
from benchmarks._models import random_adapter
from benchmarks._run import ROOT, Run, Table, console
from benchmarks._served import Served, free_port, started
from benchmarks.serve import COMING_AND_GOING, Alone, Asked, base_and_adapters, compared, drawn
from loraweave.extend.serving import Limits, make_server

app = typer.Typer()

CLIENTS = 4
# of the adapter that comes and goes: contents one after the other, None while it is not there, and seconds of each
CONTENTS = (0, 1, None, 2, 1, None)
CHANGE_S = 1.0
# between two looks at the server's memory
LOOK_S = 0.1
ENDED_EVERY, ALONE_EVERY = 10, 4
# beyond what the limits allow: one layer of a merge, and what the allocator keeps
BESIDE_BYTES = 64 << 20
# the smallest under which the honest clients' requests fit beside one of each attacker's key
SMALLEST = {
    "rows": 2,
    "cache_tokens": 512,
    "prefix_bytes": 1 << 16,
    "waiting": 7,
    "choices": 1,
    "new_tokens": 8,
    "seconds": 60.0,
    "formula_characters": 256,
    "adapters": 3,
    "loaded": 1,
    "head_bytes": 2048,
    "head_seconds": 1.0,
    "body_seconds": 1.0,
    "reading_bytes": 1 << 20,
    "connections": 24,
    "prompt_characters": 2048,
    "grace": 2.0,
}
ATTACKERS = {
    "bodies": {"rows": 1},
    "prompts": {"rows": 1},
    "merges": {"rows": 1},
    "crowd": {"rows": 1, "formulas_per_minute": 60},
    "rate": {"requests_per_minute": 1, "formulas_per_minute": 1, "rows": 1},
}
# formulas of each kind
FIRST = (
    "base",
    "passive",
    "0.5*plural - 0.2*negation",
    "ties(passive, plural; density=0.5)",
    "arrow(passive, plural; top_k=1)",
)
# bytes for everything that is loaded: a merge of the tiny model has 320 kB, one of SmolLM2-135M 93 MiB
MEMORY_BYTES = {True: 2 << 20, False: 250_000_000}


@dataclass(frozen=True)
class Heard:
    """What a request came to: its status and body, when it began and ended, and why it was sent again, each time."""

    status: int
    body: Any
    begun: float
    ended: float
    again: list[str]


@app.command()
def main(
    context: typer.Context,
    requests: Annotated[int, typer.Option(help="how many in all")] = 1000,
    part: Annotated[int, typer.Option(help="how many between two looks at the answers")] = 500,
    tiny: Annotated[bool, typer.Option("--tiny", help="a random model of two blocks, in float64")] = False,
) -> None:
    """Wrong answers, memory and waiting of honest clients beside attackers, under the smallest limits."""
    run: Run = context.obj
    parts = known(run.folder(), "part-*.json") if run.report else soaked(run, requests, part, tiny)
    counted = sum((Counter(each["counts"]) for each in parts), Counter({"wrong": 0}))
    of = "a random model" if tiny else "SmolLM2-135M-Instruct"
    num_ended = sum(each["ended_by"] is not None for each in parts)
    title = f"{sum(counted.values())} honest requests to {of} by {CLIENTS} clients, seed {run.seed}, {num_ended} restarts"
    counts = Table(title, ("what became of them", "requests"))
    for what in sorted({*counted, "wrong"}):
        counts.add(what, str(counted[what]))
    again = Table("why a request was sent again", ("why", "alone", "beside attackers", "where the server was ended"))
    kinds = (lambda it: not it["attacked"], lambda it: it["attacked"] and not it["ended_by"], lambda it: it["ended_by"])
    sums = [sum((Counter(each["again"]) for each in parts if kind(each)), Counter()) for kind in kinds]
    for why in sorted({why for counted in sums for why in counted}):
        again.add(why, *(str(counted[why]) for counted in sums))
    waits = Table("seconds of an honest request, without restarts", ("clients", "requests", "50 %", "95 %", "99 %"))
    for name, is_attacked in (("alone", False), ("beside attackers", True)):
        taken = [s for each in parts if each["attacked"] is is_attacked and not each["ended_by"] for s in each["seconds"]]
        if taken:
            waits.add(name, str(len(taken)), *(f"{value:.2f}" for value in np.percentile(taken, [50, 95, 99])))
    most = max(parts, key=lambda each: each["most"] - each["bound"])
    memory = Table("the server's memory but for pages of files, MB, where it came nearest to its bound", ("", "MB"))
    for what in ("first", "most", "bound"):
        memory.add(what, f"{most[what] / 1e6:.0f}")
    attacks = Table("what the attacks were answered", ("attack", "times", "answers"))
    outcomes: dict[str, Counter[str]] = {}
    for each in parts:
        for name, found in each["attacks"].items():
            outcomes.setdefault(name, Counter()).update(found)
    for name, found in outcomes.items():
        attacks.add(name, str(sum(found.values())), ", ".join(f"{what}: {count}" for what, count in sorted(found.items())))
    run.show(counts, waits, again, memory, attacks)
    if counted["wrong"] or most["most"] > most["bound"]:
        raise typer.Exit(1)


def serve(hub: str, base: str, port: str, key_file: str, limits: str) -> None:
    """Serve in this process until it is told to stop; `base` is "" for the default one."""
    model, tokenizer = lw.load_base(base or None)
    with lw.Hub(hub) as opened:
        settings: dict[str, Any] = {"limits": Limits(**json.loads(limits)), "key_file": key_file, "log_level": "warning"}
        make_server(opened, model, tokenizer, port=int(port), **settings).run()


class Life:
    """A server that can be ended and started again, on one port, with the keys of its honest clients."""

    def __init__(self, hub: Path, base: Path | None, folder: Path, limits: dict[str, float]) -> None:
        self.port = free_port()
        self.keys: list[str] = []
        self.attackers: dict[str, str] = {name: f"of-the-attack-{name:-<10}" for name in ATTACKERS}
        self.first = self.most = 0
        self._limits = limits
        self._key_file = folder / "keys.json"
        call = f"from {__name__} import serve; serve(*__import__('sys').argv[1:])"
        words = [str(hub), "" if base is None else str(base), str(self.port), str(self._key_file), json.dumps(limits)]
        self._command = [sys.executable, "-c", call, *words]
        self._stack = ExitStack()
        self._served: Served | None = None
        self._watching = threading.Lock()

    @property
    def bound(self) -> int:
        """The bytes that the server may have beside pages of files."""
        return int(self.first + self._limits["memory_bytes"] + self._limits["reading_bytes"] + BESIDE_BYTES)

    def start(self) -> None:
        """Start the server with new keys for the honest clients, and send it one request of each kind of formula."""
        keys = [os.urandom(16).hex() for _ in range(CLIENTS)]
        holders = {f"client {number}": {"key": key, "rows": 2} for number, key in enumerate(keys)}
        holders |= {name: {"key": self.attackers[name], **limits} for name, limits in ATTACKERS.items()}
        self._key_file.write_text(json.dumps(holders))
        before, self.keys = self.keys[:1], keys
        self._served = self._stack.enter_context(started(self._command, self.port, {"PYTHONPATH": str(ROOT)}))
        for formula in FIRST * 4:
            body = json.dumps({"model": formula, "prompt": "a", "max_tokens": 8, "temperature": 0}).encode()
            heard = self.answer(Asked("whole", body), 0)
            assert heard.status == 200, heard
        for old in before:
            assert self.attempt(Asked("whole", b"{}"), old)[0] == 401
        # a later start may be beside attackers
        self.first = self.first or self._own()
        with self._watching:
            self.most = max(self.most, self.first)

    def end(self, by: signal.Signals) -> int:
        """End the server by a signal; return its exit status."""
        assert self._served is not None
        process, self._served = self._served.process, None
        process.send_signal(by)
        status = process.wait(timeout=60)
        self._stack.close()
        return int(status or 0)

    def close(self) -> None:
        self._stack.close()

    def attempt(self, asked: Asked, key: str) -> tuple[int, Any, Mapping[str, str]]:
        """(status, body, headers) of one attempt; a client that leaves reads one event and has no body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            connection.request("POST", "/v1/completions", asked.body, head)
            answer = connection.getresponse()
            if answer.status == 200 and asked.kind == "leaves":
                answer.readline()
                return 200, None, {}
            return answer.status, json.loads(answer.read()), dict(answer.headers)
        finally:
            connection.close()

    def answer(self, asked: Asked, client: int) -> Heard:
        """Send a request until it is neither refused for now nor lost."""
        begun, again = time.monotonic(), []
        while True:
            try:
                status, body, headers = self.attempt(asked, self.keys[client])
            except (OSError, http.client.HTTPException, ValueError):
                again.append("the connection was lost")
                time.sleep(0.05)
                continue
            # 401: the server has new keys
            if status not in (401, 429, 503):
                return Heard(status, body, begun, time.monotonic(), again)
            again.append(f"{status}: {re.sub(r'[0-9]+', 'N', body['error']['message'])}")
            time.sleep(float(headers.get("retry-after", "0.1")))

    def _own(self) -> int:
        served = self._served
        try:
            return served.memory()["own"] if served is not None else 0
        except psutil.NoSuchProcess:
            return 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep the most memory that the server has during the block."""
        self.most = self._own()

        def look() -> None:
            with self._watching:
                self.most = max(self.most, self._own())

        with repeated(look, LOOK_S):
            yield


class Changes:
    """The contents that one name of a hub has had, each with the times at which the change to it began and ended."""

    def __init__(self, hub: lw.Hub, contents: list[lw.Adapter]) -> None:
        self._hub = hub
        self._contents = contents
        self._number = 0
        self._past: list[tuple[float, float, int | None]] = [(0.0, 0.0, None)]

    def next(self) -> None:
        """Make the next change."""
        content = CONTENTS[self._number % len(CONTENTS)]
        self._number += 1
        begun = time.monotonic()
        if content is None:
            self._hub.remove(COMING_AND_GOING)
        else:
            self._hub.add(self._contents[content], name=COMING_AND_GOING, replace=COMING_AND_GOING in self._hub)
        self._past.append((begun, time.monotonic(), content))

    def between(self, begun: float, ended: float) -> set[int | None]:
        """The contents that a request of this time may have seen."""
        until = [*(done for _, done, _ in self._past[1:]), float("inf")]
        return {
            content for (since, _, content), last in zip(self._past, until, strict=True) if since <= ended and last >= begun
        }


@contextmanager
def repeated(act: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `act` in a thread every so many seconds during the block. Raises its first error at the end."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            act()

    with ThreadPoolExecutor(1) as thread:
        repeating = thread.submit(repeat)
        try:
            yield
        finally:
            ended.set()
    repeating.result()


def soaked(run: Run, requests: int, size: int, tiny: bool) -> list[dict[str, Any]]:
    """What each part of the run has shown."""
    folder = run.folder()
    model, tokenizer, base, adapters = base_and_adapters(run, folder, tiny)
    contents = [random_adapter(model, f"comes{number}", "all", run.seed) for number in range(3)]
    alone = [Alone(model, tokenizer, lw.ExpertPool({**adapters, COMING_AND_GOING: each})) for each in contents]
    limits = {**SMALLEST, "memory_bytes": MEMORY_BYTES[tiny]}
    found = []
    with run.hub(without=[path.name for path in run.adapters()]) as hub, ExitStack() as stack:
        for name, adapter in adapters.items():
            hub.add(adapter, name=name)
        assert hub.path is not None
        life, changes = Life(Path(hub.path), base, folder, limits), Changes(hub, contents)
        stack.callback(life.close)
        life.start()
        for number in range(-(-requests // size)):
            asked = drawn(run, random.Random(f"{run.seed} {number}"), min(size, requests - number * size))
            shown = partial(part, life, changes, asked, alone, number)
            found.append(kept(folder / f"part-{number:04d}.json", shown))
            wrong = sum(each["counts"].get("wrong", 0) for each in found)
            last = found[-1]
            again = sum(last["again"].values())
            console.print(
                f"part {number}{', attacked' * last['attacked']}: {wrong} wrong so far, 99 % within "
                f"{np.percentile(last['seconds'], 99):.2f} s, {again} sent again, at most {last['most'] / 1e6:.0f} "
                f"of {last['bound'] / 1e6:.0f} MB"
            )
        assert life.end(signal.SIGTERM) == 0
        assert not hub.verify().problems
    return found


def part(life: Life, changes: Changes, asked: list[Asked], alone: list[Alone], number: int) -> dict[str, Any]:
    """Send the requests of one part; return what became of them, and of the attacks."""
    is_attacked, ended_by = number % ALONE_EVERY != 0, None
    if number % ENDED_EVERY == ENDED_EVERY - 1:
        ended_by = signal.SIGKILL if number // ENDED_EVERY % 2 == 0 else signal.SIGTERM
    heard: dict[int, Heard] = {}
    waiting = iter(list(enumerate(asked)))
    taking = threading.Lock()

    def client(mine: int) -> None:
        while True:
            with taking:
                place, each = next(waiting, (None, None))
            if place is None or each is None:
                return
            heard[place] = life.answer(each, mine)

    with ExitStack() as stack:
        stack.enter_context(life.watched())
        outcomes = stack.enter_context(attacked(life)) if is_attacked else {}
        stack.enter_context(repeated(changes.next, CHANGE_S))
        threads = stack.enter_context(ThreadPoolExecutor(CLIENTS))
        futures = [threads.submit(client, mine) for mine in range(CLIENTS)]
        if ended_by is not None:
            while len(heard) < len(asked) / 2:
                time.sleep(0.02)
            status = life.end(ended_by)
            assert status == (0 if ended_by == signal.SIGTERM else -ended_by), status
            life.start()
        for future in futures:
            future.result()
    answers = [heard[place] for place in range(len(asked))]
    return {
        "counts": judged(alone, changes, asked, answers),
        "seconds": [each.ended - each.begun for each in answers],
        "again": Counter(why for each in answers for why in each.again),
        "attacked": is_attacked,
        "ended_by": ended_by and ended_by.name,
        "attacks": outcomes,
        **{what: getattr(life, what) for what in ("first", "most", "bound")},
    }


@contextmanager
def attacked(life: Life) -> Iterator[dict[str, dict[str, int]]]:
    """Attack from a process of its own during the block; the dictionary has each attack's outcomes afterwards."""
    command = [sys.executable, "-m", "benchmarks._attacks", str(life.port), json.dumps({"keys": life.attackers})]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    outcomes: dict[str, dict[str, int]] = {}
    with subprocess.Popen(command, **pipes) as process:
        yield outcomes
        outcomes |= json.loads(process.communicate()[0])


def judged(alone: list[Alone], changes: Changes, asked: list[Asked], answers: list[Heard]) -> Counter[str]:
    """How many of each kind there are; "wrong" are answers that differ beyond rounding, and statuses that do not fit."""
    counted = Counter({"wrong": 0})
    for each, heard in zip(asked, answers, strict=True):
        seen: set[int | None] = {0}
        if COMING_AND_GOING in each.formula:
            seen = changes.between(heard.begun, heard.ended)
        contents = [alone[content] for content in seen if content is not None]
        what = "wrong"
        if each.kind == "malformed":
            what = "malformed and refused" if heard.status in (400, 404) else "wrong"
        elif heard.status == 404:
            what = "refused, since the adapter had gone" if None in seen else "wrong"
        elif heard.status == 413 and "ties(" in each.formula and COMING_AND_GOING in each.formula:
            # of adapters on all layers, whose merge has full rank
            what = "refused, since the merge does not fit alone"
        elif heard.status == 200 and each.kind == "leaves":
            what = "left after one event"
        elif heard.status == 200:
            results = [compared(*one.answer(each.formula, each.prompt), heard.body["choices"][0]) for one in contents]
            what = min(results, key=("equal", "equal but for a tie", "wrong").index, default="wrong")
        counted[what] += 1
        if what == "wrong":
            console.print(f"wrong: {each.body!r} was answered {heard.status} {json.dumps(heard.body)}", markup=False)
    return counted
