"""Attacks on a server, each in a thread of this process, until its input ends.

At the end it prints, as JSON, how often each attack was answered by which status; "cut" is a connection that was ended.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

# seconds between two bursts of one attack, and for which a connection waits for more
PAUSE, PATIENCE = 0.1, 3.0
MERGED = ("passive", "negation", "antonym", "plural")


class Attacker:
    """The attacks on one port of loopback; `keys` are those that the server accepts, by the attack that has each."""

    def __init__(self, port: int, keys: dict[str, str]) -> None:
        self._port = port
        self._keys = keys
        self._generator = random.Random(0)

    def attacks(self) -> dict[str, Callable[[], Iterator[str]]]:
        """The attacks by name; each call is one burst, which yields the outcome of each of its connections."""
        return {
            "endless head": self._endless_head,
            "slow bodies": self._slow_bodies,
            "silent connections": self._silent,
            "megabyte prompts": self._megabyte_prompts,
            "a body of 100 GB": self._announced,
            "wrong keys": self._wrong_keys,
            "new merges": self._merges,
            "new merges, four at once": self._merges_at_once,
            "long formulas": self._long_formulas,
            "above a key's rate": self._too_often,
        }

    def _opened(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE)

    def _head(self, key: str, length: int) -> bytes:
        return (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    def _asked(self, key: str, **fields: object) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            sent = {"prompt": "a", "max_tokens": 8, "temperature": 0, **fields}
            connection.request("POST", "/v1/completions", json.dumps(sent).encode(), head)
            answer = connection.getresponse()
            answer.read()
            return str(answer.status)
        finally:
            connection.close()

    def _endless_head(self) -> Iterator[str]:
        with self._opened() as opened:
            opened.sendall(b"GET /v1/models HTTP/1.1\r\nX-Long: ")
            for _ in range(1600):
                opened.sendall(b"a" * 65536)
        yield "100 MiB were taken"

    def _slow_bodies(self) -> Iterator[str]:
        with ExitStack() as stack:
            slow = [stack.enter_context(self._opened()) for _ in range(4)]
            for opened in slow:
                opened.sendall(self._head(self._keys["bodies"], 300_000) + b"a" * 200_000)
            for opened in slow:
                yield opened.recv(12)[9:].decode() or "cut"

    def _silent(self) -> Iterator[str]:
        with ExitStack() as stack:
            silent = [stack.enter_context(self._opened()) for _ in range(30)]
            for opened in silent:
                yield opened.recv(12)[9:].decode() or "cut"

    def _megabyte_prompts(self) -> Iterator[str]:
        yield self._asked(self._keys["prompts"], model="passive", prompt="word " * 200_000)

    def _announced(self) -> Iterator[str]:
        with self._opened() as opened:
            opened.sendall(self._head(self._keys["bodies"], 99_999_999_999))
            yield opened.recv(12)[9:].decode() or "cut"

    def _wrong_keys(self) -> Iterator[str]:
        for _ in range(5):
            yield self._asked(f"{self._generator.getrandbits(128):x}", model="passive")

    def _merge(self, of: str) -> str:
        first, second = self._generator.sample(MERGED, 2)
        density = round(self._generator.uniform(0.1, 0.9), 6)
        return self._asked(self._keys[of], model=f"ties({first}, {second}; density={density})")

    def _merges(self) -> Iterator[str]:
        yield self._merge("merges")

    def _merges_at_once(self) -> Iterator[str]:
        outcomes: list[str] = []

        def one() -> None:
            with suppress(OSError, http.client.HTTPException):
                outcomes.append(self._merge("crowd"))

        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield from outcomes

    def _long_formulas(self) -> Iterator[str]:
        yield self._asked(self._keys["prompts"], model="0.1*passive + " * 5000 + "plural")
        yield self._asked(self._keys["prompts"], model="(" * 200 + "passive" + ")" * 200)

    def _too_often(self) -> Iterator[str]:
        yield self._asked(self._keys["rate"], model="plural")


def main(port: str, settings: str) -> None:
    """Attack until standard input ends, then print the outcomes."""
    attacker = Attacker(int(port), json.loads(settings)["keys"])
    ended = threading.Event()
    outcomes: dict[str, Counter[str]] = {}

    def repeat(name: str, burst: Callable[[], Iterator[str]]) -> None:
        counted = outcomes[name] = Counter()
        while not ended.wait(PAUSE):
            try:
                for outcome in burst():
                    counted[outcome] += 1
            except (OSError, http.client.HTTPException):
                counted["cut"] += 1

    threads = [threading.Thread(target=repeat, args=each) for each in attacker.attacks().items()]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
