"""A server in a process of its own: `loraweave serve`, or another engine's; its processor time and memory, from outside."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks._run import ROOT

START_S = 1200


@dataclass(frozen=True)
class Served:
    """A process that answers on a port of loopback."""

    port: int
    process: psutil.Process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """Processor time so far of the process and of all that it started."""
        total = 0.0
        for each in (self.process, *self.process.children(recursive=True)):
            times = each.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def memory(self) -> dict[str, int]:
        """Bytes that are resident, and those of them that are no pages of files, which the system may take back."""
        found = self.process.memory_info()
        return {"resident": found.rss, "own": found.rss - found.shared}

    def post(self, path: str, body: Mapping[str, Any] | bytes) -> tuple[int, Any]:
        """(status, JSON body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


@contextmanager
def serving(hub: Path, base: Path | None, *words: str) -> Iterator[Served]:
    """`loraweave serve` of this checkout over a hub, one thread, until the block ends."""
    port = free_port()
    command = [sys.executable, "-m", "loraweave", "serve", "--hub", str(hub), "--port", str(port), *words]
    command += [] if base is None else ["--base", str(base)]
    with started(command, port, {"PYTHONPATH": str(ROOT)}) as served:
        yield served


@contextmanager
def started(command: Sequence[str], port: int, environment: Mapping[str, str]) -> Iterator[Served]:
    """The process of a command, from its first answer to /health until the block ends. RuntimeError where it ends before."""
    with tempfile.TemporaryFile() as log:
        own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            until = time.monotonic() + START_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} does not answer: {log.read().decode(errors='replace')[-4000:]}")
                time.sleep(0.5)
            yield Served(port, psutil.Process(process.pid))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@contextmanager
def vllm(python: str, base: Path, folders: Mapping[str, Path], *, slots: int, max_rank: int) -> Iterator[Served]:
    """vLLM's own server in fp32 with one thread, whose base is called "org/base"."""
    port = free_port()
    words = f"""-m vllm.entrypoints.openai.api_server --model {base} --served-model-name org/base --host 127.0.0.1
        --port {port} --dtype float32 --max-model-len 512 --max-num-seqs 16 --enforce-eager --enable-lora
        --max-lora-rank {max_rank} --max-loras {slots} --max-cpu-loras {len(folders) + slots} --lora-modules"""
    command = [python, *shlex.split(words), *(f"{name}={folder}" for name, folder in folders.items())]
    # bound to a core, several engines on one machine would share the first
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    own["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    with started(command, port, own) as served:
        yield served


@contextmanager
def llama_cpp(base: str, adapters: Sequence[Path], *, slots: int = 8, cache_mib: int = 8192) -> Iterator[Served]:
    """llama.cpp's own server with one thread; `base` "" is the GGUF of the embedded base's package.

    `cache_mib` is for prompts beside the slots, which it finds whatever adapter read them.
    """
    port = free_port()
    code = f"import sys, time; from {__name__} import llama; server = llama(*sys.argv[1:]); time.sleep(10**6)"
    words = [str(port), base, str(slots), str(cache_mib), *map(str, adapters)]
    with started([sys.executable, "-c", code, *words], port, {"PYTHONPATH": str(ROOT)}) as served:
        yield served


def llama(port: str, base: str, slots: str, cache_mib: str, *adapters: str) -> Any:
    """llama.cpp's own server in this process, with a cache in fp32."""
    import xllamacpp

    from loraweave.hub.gguf_base import embedded_file

    parameters = xllamacpp.CommonParams()
    parameters.model.path = base or str(embedded_file())
    parameters.n_ctx, parameters.n_batch, parameters.n_parallel = int(slots) * 512, 512, int(slots)
    parameters.cache_ram_mib = int(cache_mib)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = parameters.fit_params = False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    parameters.port = int(port)
    return xllamacpp.Server(parameters)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
