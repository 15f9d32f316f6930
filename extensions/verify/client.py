"""A client of a model server: OpenAI's completions, vLLM's loading of adapters, and llama.cpp's scales of adapters.

Nothing but JSON is read, at most `MAX_BYTES` of it; no redirect is followed.
"""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from loraweave import SourceUnavailable
from loraweave.extend.formats import entry
from loraweave.extensions.verify.answers import Answer, top_of

MAX_BYTES = 8 << 20
# numbers of alternatives for each token, tried in order until the server takes one; None asks for text alone
ALTERNATIVES = (20, 5, None)
NUM_TRIES, MAX_WAIT_S = 5, 10.0


class Refused(Exception):
    """The error that a server answers a request with: its status and its text."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status = status


@dataclass(frozen=True)
class Listed:
    """A name that a server lists, with its folder or file (`root`) and its base (`parent`), "" if unknown."""

    name: str
    root: str = ""
    parent: str = ""


class Server:
    """A client of one server, safe for several threads. Raises SourceUnavailable if it is unreachable or no such server."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise SourceUnavailable(f"{url!r} is not the address of a server: give http://HOST:PORT")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._alternatives = 0
        self.num_requests = 0
        self.llama_adapters = self._llama_adapters()

    @property
    def has_logprobs(self) -> bool:
        """True if the last answers came with log-probabilities."""
        return ALTERNATIVES[self._alternatives] is not None

    def listed(self) -> list[Listed]:
        """Return the names that the server says it serves."""
        if self.llama_adapters:
            return [Listed(name) for name in self.llama_adapters]
        rows = _rows(self._call("GET", "/v1/models").get("data"))
        return [Listed(str(row.get("id")), str(row.get("root") or ""), str(row.get("parent") or "")) for row in rows]

    def complete(
        self, name: str, scales: Mapping[str, float], ids: Sequence[int], num_tokens: int, *, cached: bool = True
    ) -> Answer:
        """Return the greedy answer of the named model to a prompt of token ids. Raises Refused.

        llama.cpp has no names: it gets the adapters' `scales`, and without `cached` reads the whole prompt again.
        """
        body: dict[str, Any] = {"prompt": list(ids), "max_tokens": num_tokens, "temperature": 0}
        if self.llama_adapters:
            lora = [{"id": number, "scale": scales.get(adapter, 0.0)} for adapter, number in self.llama_adapters.items()]
            body |= {"lora": lora, "cache_prompt": cached}
        else:
            body["model"] = name
        while True:
            level = self._alternatives
            request = body if ALTERNATIVES[level] is None else {**body, "logprobs": ALTERNATIVES[level]}
            try:
                return _answer(self._call("POST", "/v1/completions", request))
            except Refused as error:
                # some servers give fewer alternatives or none; an unknown name (404) is an error of its own
                if error.status not in (400, 422) or ALTERNATIVES[level] is None:
                    raise
                with self._lock:
                    self._alternatives = max(self._alternatives, level + 1)

    def reload(self, listed: Listed) -> bool:
        """Unload an adapter and load it again by vLLM's routes; return False if the server does not have them."""
        if not listed.root or not listed.parent:
            return False
        try:
            self._call("POST", "/v1/unload_lora_adapter", {"lora_name": listed.name})
        except Refused:
            return False
        self._call("POST", "/v1/load_lora_adapter", {"lora_name": listed.name, "lora_path": listed.root})
        return True

    def _llama_adapters(self) -> dict[str, int]:
        """Return {name: number} of the adapters that a llama.cpp server has; empty for any other server."""
        try:
            rows = _rows(self._call("GET", "/lora-adapters").get(""))
        except Refused:
            return {}
        paths = [PurePath(str(row.get("path"))) for row in rows]
        # our exports are all called adapter.gguf, each in a folder of its own
        names = [path.parent.name if path.stem == "adapter" else path.stem for path in paths]
        return {name: int(row.get("id", 0)) for name, row in zip(names, rows, strict=True)}

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send one request and return its JSON object; wait and try again while the server is busy.

        A list, or text that is not JSON, is under the key "". Raises Refused for an error status, SourceUnavailable for a
        server that cannot be reached.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers, method=method)
        for attempt in range(NUM_TRIES):
            with self._lock:
                self.num_requests += 1
            try:
                with self._opener.open(request, timeout=self._timeout_s) as answer:
                    return _json(answer.read(MAX_BYTES + 1))
            except urllib.error.HTTPError as error:
                if error.code not in (429, 503) or attempt == NUM_TRIES - 1:
                    raise Refused(error.code, _said(error.read(MAX_BYTES))) from None
                time.sleep(min(MAX_WAIT_S, _seconds(error.headers.get("Retry-After"))))
            except OSError as error:
                raise SourceUnavailable(f"{method} {self.url}{path}: {error}; is the server running?") from error
        raise AssertionError


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *given: Any) -> None:
        return None


def _answer(body: Mapping[str, Any]) -> Answer:
    try:
        choice = body["choices"][0]
        words, tops = _words(choice.get("logprobs") or {})
        return Answer(str(choice["text"]), words, tops, ended=choice.get("finish_reason") == "stop")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Refused(200, f"the answer is not an OpenAI completion ({type(error).__name__}: {error})") from error


def _words(logprobs: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[dict[str, float], ...]]:
    """Return each token's text and its alternatives' log-probabilities, in either of the forms that servers use."""
    if "content" in logprobs:
        entries = logprobs["content"]
        words = tuple(str(entry["token"]) for entry in entries)
        tops = [top_of((str(top["token"]), float(top["logprob"])) for top in entry["top_logprobs"]) for entry in entries]
        return words, tuple(tops)
    words = tuple(map(str, logprobs.get("tokens") or ()))
    listed = logprobs.get("top_logprobs") or []
    return words, tuple(top_of((str(word), float(value)) for word, value in top.items()) for top in listed)


def _json(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise Refused(200, f"the answer has more than {MAX_BYTES} bytes")
    try:
        value = json.loads(data)
    except ValueError:
        value = data.decode(errors="replace")
    return value if isinstance(value, dict) else {"": value}


def _rows(found: Any) -> list[Mapping[str, Any]]:
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def _said(data: bytes) -> str:
    body = _json(data)
    error = body.get("error", body)
    return str(entry(error, "message", object) or error)[:300]


def _seconds(text: str | None) -> float:
    try:
        return float(text or 1)
    except ValueError:
        return 1.0
